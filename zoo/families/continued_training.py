"""Continued training: after pruning, all weights that are left go on learning from text, as in pre-training.

``zoo train METHOD`` prunes as ``zoo run METHOD`` does, or takes a model that the method pruned and saved before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from zoo.engines.training import Recipe
from zoo.families.recovery import pruned_model
from zoo.families.retraining import Retraining
from zoo.families.weights import AppliedPruning
from zoo.models import LoadedModel
from zoo.training import Setting


class ContinuedTraining(Retraining):
    """Mixin of weight methods whose paper trains what is left."""

    recipe: ClassVar[Recipe] = Recipe()

    def begin(
        self, loaded: LoadedModel, setting: Setting
    ) -> tuple[LoadedModel, Callable[[], AppliedPruning]]:
        """The pruned model.

        Raises:
            Refused: another method has pruned the model.
        """
        _, applied = pruned_model(self, loaded, setting)
        return applied.loaded, lambda: applied
