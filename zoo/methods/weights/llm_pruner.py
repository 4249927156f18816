"""LLM-Pruner: heads and channels leave whose removal changes the loss least, by a Taylor expansion around the weights.

Ma, Fang & Wang: LLM-Pruner: On the Structural Pruning of Large Language Models, NeurIPS 2023 (arXiv 2305.11627),
block-wise mode. With the gradient ``g`` of the language-model loss, what a weight ``w`` is worth (Sec. 3.2) is

- ``param_first``: ``|w g|``, summed over the weights of a structure (the default of the code);
- ``vectorize``: ``|sum w g|`` over the weights of a structure;
- ``param_second``: ``|w F w|``, with ``F`` the mean squared gradient of single examples (the diagonal of the Fisher
  information in place of the Hessian's);
- ``param_mix``: ``|w g - w F w / 2|``.

``l1`` and ``l2`` are magnitudes and need no data. The first and last layers stay whole: they matter most. Recovery
(``zoo train llm-pruner``) is LoRA on instructions.

With grouped queries the code adds the score of query head ``h`` to key-value head ``h mod H_kv``, although ``h // g``
is the one it reads; here each is added to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.coupling import Group, Member, Reduction
from zoo.engines.gradients import GradientSums, language_model_loss, sum_gradients
from zoo.engines.training import Recipe
from zoo.errors import BadParameter
from zoo.families.group_pruning import GroupPruner, Size
from zoo.families.recovery import LoraRecovery
from zoo.families.weights import Work
from zoo.interface import register
from zoo.models.anatomy import Decoder, LinearPart


@register("llm-pruner")
class LlmPruner(LoraRecovery, GroupPruner):
    """Structured pruning by Taylor scores, and recovery with LoRA."""

    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-4, epochs=2, batch=8, accumulate=8)
    adapter_dropout: ClassVar[float] = 0.05

    importance: Literal["param_first", "vectorize", "param_second", "param_mix", "l1", "l2"] = Field(
        "param_first", description="What a weight is worth: a Taylor term, or its magnitude."
    )
    grouping: Reduction = Field(
        "sum", description="How the scores of coupled matrices become one (the code's magnitudes: mean)."
    )
    keep_first: int = Field(4, ge=0, description="First layers that stay whole.")
    keep_last: int = Field(2, ge=0, description="Last layers that stay whole.")

    def pruned_layers(self, decoder: Decoder) -> range:
        """All but the first and the last ones.

        Raises:
            BadParameter: no layer is left between them.
        """
        between = range(self.keep_first, len(decoder.layers) - self.keep_last)
        if not between:
            raise BadParameter(
                f"{self.slug} keeps {self.keep_first} layers at the beginning and {self.keep_last} at the end whole, "
                f"all {len(decoder.layers)} of this model: lower keep_first and keep_last"
            )
        return between

    def units_removed(self, size: Size, ratio: float) -> int:
        """``C - int(C (1 - ratio))`` of ``C`` channels; whole heads, as many as fit into that."""
        channels = size.units * size.block
        return (channels - int(channels * (1 - ratio))) // size.block

    def score(self, work: Work, groups: Sequence[Group]) -> list[torch.Tensor]:
        """Scores of the units of all groups, from one pass over the windows (none for magnitudes)."""
        sums = None
        if self.importance not in ("l1", "l2"):
            parts = [member.part for group in groups for member in group.members]
            alone = self.importance in ("param_second", "param_mix")
            sums = sum_gradients(
                work.model,
                [part for part in parts if isinstance(part, LinearPart)],
                work.windows.split(1 if alone else work.batch),
                lambda ids: language_model_loss(work.model, ids),
                squares=alone,
            )
        return [
            group.scores(lambda member: self.salience(member, sums), self.grouping)
            .view(group.units, group.block)
            .sum(1)
            for group in groups
        ]

    def salience(self, member: Member, sums: GradientSums | None) -> torch.Tensor:
        """What the channels of one tensor are worth, ``[channels]`` float32."""
        weight = member.weight.detach().float()
        if sums is None:
            return member.per_channel(weight.abs() if self.importance == "l1" else weight.square())
        assert isinstance(member.part, LinearPart)
        first = weight * sums.mean(member.part)
        if self.importance in ("param_first", "vectorize"):
            if self.importance == "param_first":
                return member.per_channel(first.abs())
            return member.fold(first.sum(1 - member.dim).abs())
        second = weight.square() * sums.mean_square(member.part)
        return member.per_channel((second if self.importance == "param_second" else first - second / 2).abs())
