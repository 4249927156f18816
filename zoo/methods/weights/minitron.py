"""Minitron: one look at the activations ranks width and depth; the smaller model then learns from the large one.

Muralidharan et al.: Compact Language Models via Pruning and Knowledge Distillation, NeurIPS 2024 (arXiv 2407.14679).
Every importance is taken on the dense model, forward passes only: a feature's is its mean absolute value over a
sequence, L2 over the sequences (Sec. 2.2, the aggregation that the paper recommends). FFN channels are measured where
the down projection reads them, heads where the output projection does, the residual stream behind the norms; a layer by
how much it turns its hidden states. The shape of the smaller model is given, or the best of those that meet
``sparsity``; a subclass that overrides ``quality`` says what is best.

Nothing is rescaled, so a model that lost residual channels is of little use before ``zoo train minitron``, which
distils the logits of the dense model into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from zoo.engines.gradients import language_model_loss
from zoo.engines.language_modelling import IGNORED
from zoo.engines.shapes import FeatureNorm, Importance, Shape, apply_shape, candidate_shapes, shape_of
from zoo.engines.statistics import BlockDistance, Watch
from zoo.engines.stepping import evaluating
from zoo.engines.surgery import share_parameters
from zoo.engines.training import Loss, Recipe
from zoo.errors import BadParameter, Refused
from zoo.families.retraining import Retraining
from zoo.families.weights import AppliedPruning, Facts, Work
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import DecoderLayer
from zoo.training import Setting


@register("minitron")
class Minitron(Retraining):
    """Pruning of residual width, FFN channels, heads and layers by activations, and distillation.

    Give the shape (what is left out stays as it is), or ``sparsity`` for a search.
    """

    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-4, warmup=0.05, batch=8)

    sparsity: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Fraction of decoder-layer weights to remove, at least; the shape is searched for.",
    )
    hidden: int | None = Field(None, ge=1, description="Shape: channels of the residual stream that stay.")
    channels: int | None = Field(None, ge=1, description="Shape: FFN channels of each layer that stay.")
    heads: int | None = Field(None, ge=1, description="Shape: query heads of each layer that stay.")
    layers: int | None = Field(None, ge=1, description="Shape: layers that stay.")
    max_width: float = Field(0.4, ge=0, lt=1, description="Search: largest fraction removed of any width.")
    max_depth: float = Field(0.2, ge=0, lt=1, description="Search: largest fraction of layers removed.")
    multiple: int = Field(64, ge=1, description="Search: hidden size and FFN channels are multiples of this.")
    top_k: int = Field(10, ge=1, description="Search: try so many shapes, the largest that meet the budget.")
    trial_windows: int = Field(
        8, ge=1, description="Search: calibration windows that each shape is tried on."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Minitron:
        if self._given and "sparsity" in self.model_fields_set:
            raise ValueError("give sparsity or a shape (hidden, channels, heads, layers), not both")
        return self

    @property
    def _given(self) -> dict[str, int]:
        """The parts of the shape that are given."""
        names = ("hidden", "channels", "heads", "layers")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero and no shape is given."""
        return not self._given and self.sparsity == 0

    def check(self, loaded: LoadedModel) -> None:
        """As all weight methods; and all layers are whole and alike.

        Raises:
            Refused: it is something else.
        """
        super().check(loaded)
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        if shape_of(decoder) is None:
            raise Refused(f"{self.slug} needs layers of one shape; this model was pruned layer by layer")
        if self.hidden is not None and loaded.anatomy.kind == "vlm":
            raise Refused(
                f"{self.slug} cannot narrow the residual stream that visual tokens enter: leave out hidden"
            )

    def widths(self, layer: DecoderLayer) -> dict[str, int]:
        """Heads and channels, and the residual stream."""
        norm: Any = layer.input_norm
        return {**super().widths(layer), "residual channels": norm.weight.numel()}

    def observe(self, layer: DecoderLayer) -> Mapping[str, Watch]:
        """Everything that is ranked, in one pass."""
        return {
            "input norm": Watch(layer.attention.query, FeatureNorm()),
            "MLP norm": Watch(layer.mlp.up, FeatureNorm()),
            "heads": Watch(layer.attention.output, FeatureNorm()),
            "channels": Watch(layer.mlp.down, FeatureNorm()),
            "layer": Watch("layer", BlockDistance("cosine")),
        }

    def transform(self, work: Work) -> Facts:
        """Measure the dense model, settle the shape, cut."""
        dense = shape_of(work.decoder)
        assert dense is not None
        seen = work.observe(self.observe)
        importance = Importance(
            hidden=sum(
                (layer[name].importance for layer in seen for name in ("input norm", "MLP norm")),
                torch.zeros(()),
            ),
            heads=[layer["heads"].importance.view(dense.heads, -1).norm(dim=1) for layer in seen],
            channels=[layer["channels"].importance for layer in seen],
            layers=torch.tensor([layer["layer"].total / layer["layer"].tokens for layer in seen]),
        )
        shape = dense.with_parts(**self._given) if self._given else self._search(work, dense, importance)
        apply_shape(work.decoder, shape, importance)
        return {"shape": str(shape), "shape before": str(dense)}

    def _search(self, work: Work, dense: Shape, importance: Importance) -> Shape:
        """The best of the largest shapes that meet the budget.

        Raises:
            BadParameter: none of the shapes that may be tried meets it.
        """
        limit = (1 - self.sparsity) * dense.weights
        max_hidden = 0.0 if work.loaded.anatomy.kind == "vlm" else self.max_width
        shapes = candidate_shapes(dense, max_hidden, self.max_width, self.max_depth, self.multiple)
        fitting = sorted(
            (shape for shape in shapes if shape.weights <= limit), key=lambda shape: -shape.weights
        )
        if not fitting:
            least = min(shape.weights for shape in shapes) / dense.weights
            raise BadParameter(
                f"{self.slug}: within max_width, max_depth and multiple at most {1 - least:.1%} of this decoder can "
                f"leave, less than sparsity {self.sparsity}; change them"
            )
        qualities = []
        for shape in fitting[: self.top_k]:
            model = share_parameters(work.model)
            trial = LoadedModel(model, work.loaded.processor, work.loaded.ref)
            decoder = trial.anatomy.decoder
            assert decoder is not None
            apply_shape(decoder, shape, importance)
            qualities.append(self.quality(trial, work.windows[: self.trial_windows]))
            work.step(len(qualities), min(self.top_k, len(fitting)))
        return fitting[max(range(len(qualities)), key=qualities.__getitem__)]

    def quality(self, loaded: LoadedModel, windows: torch.Tensor) -> float:
        """What a shape is chosen by, higher is better: the loss on calibration windows, negated, unless overridden."""
        with torch.no_grad(), evaluating(loaded.model):
            return -float(language_model_loss(loaded.model, windows))

    def begin(
        self, loaded: LoadedModel, setting: Setting
    ) -> tuple[LoadedModel, Callable[[], AppliedPruning]]:
        """The pruned model, which learns from the dense one."""
        applied = self.apply(
            loaded,
            calibration=setting.calibration,
            samples=setting.windows,
            seed=setting.seed,
            progress=lambda done, total: setting.progress("pruning", done, total),
        )
        return applied.loaded, lambda: applied

    def batch_loss(self, given: LoadedModel, learning: LoadedModel, batch: dict[str, torch.Tensor]) -> Loss:
        """Forward KL divergence of the dense model's next-token distributions, temperature 1; no label is looked at."""
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "use_cache": False,
        }
        predicted = batch["labels"][:, 1:] != IGNORED
        with torch.no_grad():
            taught = given.model(**inputs).logits[:, :-1][predicted].float().log_softmax(-1)
        learnt = learning.model(**inputs).logits[:, :-1][predicted].float().log_softmax(-1)
        total = functional.kl_div(learnt, taught, reduction="sum", log_target=True)
        return Loss(total, int(predicted.sum()))
