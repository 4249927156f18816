"""CFSP: remove FFN channels, coarse to fine, from one calibration pass.

Wang et al.: CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information,
COLING 2025 (arXiv 2409.13199). Coarse: the more a layer turns its hidden states, the more channels it keeps. Fine:
channels are ranked by their activation norm and relative weights. Attention is left alone.

Recovery (``zoo train cfsp``): LoRA whose rank in each layer follows the layer's coarse importance.

In the authors' code a relative weight is normalised over the axis that is averaged afterwards, so every such term is
the same for all channels and activations alone rank them; ``relative_to="layer"`` normalises over channels instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from zoo.engines.budgets import sigmoid_keep_ratios, top_threshold
from zoo.engines.lora import shared_ranks
from zoo.engines.scores import weight_times_norm
from zoo.engines.statistics import BlockDistance, BlockMetric, SquareSum, Watch, stream
from zoo.engines.surgery import LayerCut
from zoo.engines.training import Recipe
from zoo.errors import BadParameter
from zoo.families.recovery import LoraRecovery
from zoo.families.weights import WeightPruner
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, DecoderLayer, Mlp
from zoo.training import Setting

Fine = Literal["three_w_one_wa", "three_w_one_a", "one_wa", "one_a", "wanda_base", "mag_base"]

RELEASED_SCALE = 1e-4
"""What the authors' code multiplies summed distances by, tuned for ..."""
RELEASED_TOKENS = 128 * 1024
"""... this many calibration tokens. Their product makes the scale independent of the calibration size."""


def relative(matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """``|matrix| / sum |matrix|`` along ``axis``."""
    size = matrix.abs()
    return size / size.sum(axis, keepdim=True)


@register("cfsp")
class Cfsp(LoraRecovery, WeightPruner):
    """Coarse-to-fine structured pruning of FFN channels, and recovery with importance-guided adapters.

    The paper's ratio counts FFN channels. ``sparsity`` counts all decoder weights, so it is converted; give
    ``ffn_sparsity`` instead to set the paper's ratio itself.
    """

    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-4, epochs=2, batch=8, accumulate=8)

    ffn_sparsity: float | None = Field(
        None, ge=0, lt=1, description="The paper's pruning ratio: mean fraction of FFN channels to remove."
    )
    coarse: BlockMetric = Field("angular", description="Distance between a layer's input and output.")
    fine: Fine = Field("three_w_one_wa", description="Score of a channel.")
    relative_to: Literal["channel", "layer"] = Field(
        "channel",
        description="Weights relative to their own channel (as released) or to all channels of the layer.",
    )
    slope: float = Field(
        1.0, ge=0, description="Steepness a of the sigmoid that shares the budget among layers."
    )
    weight_exponent: float = Field(
        1.0, ge=0, description="Exponent b of the activation norm inside the weight term."
    )
    norm_exponent: float = Field(1.0, ge=0, description="Exponent c of the activation norm outside.")
    round_to: int | None = Field(
        None, ge=1, description="Keep a multiple of this many channels (128 suits GPU kernels)."
    )
    scale: Literal["per-token", "released"] = Field(
        "per-token", description="Distances per token, or summed as in the code (equal at 128 x 1024 tokens)."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Cfsp:
        if self.ffn_sparsity is not None and "sparsity" in self.model_fields_set:
            raise ValueError("give sparsity (of the decoder) or ffn_sparsity (of its FFN channels), not both")
        return self

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return (self.sparsity if self.ffn_sparsity is None else self.ffn_sparsity) == 0

    def observe(self, layer: DecoderLayer) -> dict[str, Watch]:
        """How far the layer moves its tokens, and the inputs of its down projection."""
        return {
            "distance": Watch("layer", BlockDistance(self.coarse)),
            "norm": Watch(layer.mlp.down, SquareSum()),
        }

    def channel_ratio(self, decoder: Decoder) -> float:
        """The paper's pruning ratio: the fraction of FFN channels whose removal meets the budget.

        Raises:
            BadParameter: the FFN layers hold fewer weights than shall leave.
        """
        if self.ffn_sparsity is not None:
            return self.ffn_sparsity
        total = decoder.prunable_parameters()
        ffn = sum(part.weight.numel() for x in decoder.layers for part in (*x.mlp.inputs, x.mlp.down))
        if self.sparsity * total >= ffn:
            raise BadParameter(
                f"{self.slug} removes FFN channels only, {ffn / total:.0%} of this decoder: "
                f"sparsity must be below {ffn / total:.4f} (given: {self.sparsity})"
            )
        return self.sparsity * total / ffn

    def keep_ratios(
        self, decoder: Decoder, seen: Sequence[Mapping[str, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Coarse step: sigmoid scores and keep ratios of the layers, ``[layers]`` float64 each."""
        summed = torch.tensor([layer["distance"].total for layer in seen], dtype=torch.float64)
        scale = RELEASED_SCALE
        if self.scale == "per-token":
            scale *= RELEASED_TOKENS / seen[0]["distance"].tokens
        return sigmoid_keep_ratios(summed * scale, self.channel_ratio(decoder), self.slope)

    def channel_scores(self, mlp: Mlp, square_sum: torch.Tensor) -> torch.Tensor:
        """Fine step: the score of each channel, ``[channels]`` float32."""
        down = mlp.down.weight.float()
        if self.fine == "wanda_base":
            return weight_times_norm(down, square_sum)
        if self.fine == "mag_base":
            return down.norm(dim=0)
        norm = square_sum.to(down.device).sqrt()
        axis = 0 if self.relative_to == "channel" else 1
        if self.fine == "one_a":
            return (relative(down, axis) * norm.sqrt()).mean(0)
        weighted = self.fine in ("three_w_one_wa", "one_wa")
        terms = relative(down * norm**self.weight_exponent if weighted else down, axis)
        if self.fine.startswith("three_w"):
            for part in mlp.inputs:
                terms = terms + relative(part.weight.float().T, axis)
        return (terms * norm**self.norm_exponent).mean(0)

    def decide(self, decoder: Decoder, seen: Sequence[Mapping[str, Any]]) -> list[LayerCut]:
        """One threshold per layer."""
        _, ratios = self.keep_ratios(decoder, seen)
        cuts = []
        for layer, statistics, ratio in zip(decoder.layers, seen, ratios.tolist(), strict=True):
            scores = self.channel_scores(layer.mlp, statistics["norm"].mean)
            cuts.append(LayerCut(channels=scores >= top_threshold(scores, ratio, self.round_to)))
        return cuts

    def facts(self, decoder: Decoder, cuts: Sequence[LayerCut]) -> dict[str, float | int | str]:
        """The paper's ratio, asked for and met."""
        masks = [cut.channels for cut in cuts if cut.channels is not None]
        kept, total = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
        return {
            "paper's pruning ratio": round(self.channel_ratio(decoder), 6),
            "FFN channels removed": round(1 - kept / total, 6),
        }

    def adapter_ranks(self, dense: LoadedModel, pruned: LoadedModel, setting: Setting) -> list[int]:
        """Ranks in proportion to the coarse importance of the layers, measured on the model that was given."""
        decoder = dense.anatomy.decoder
        assert decoder is not None
        windows = self.calibration_windows(dense, setting)

        def observe(layer: DecoderLayer) -> dict[str, Watch]:
            return {"distance": Watch("layer", BlockDistance(self.coarse))}

        scores, _ = self.keep_ratios(decoder, stream(decoder, windows, observe))
        return shared_ranks(scores.tolist(), self.recovery_rank)
