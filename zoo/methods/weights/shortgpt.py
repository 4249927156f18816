"""ShortGPT: remove the layers that change their hidden states least.

Men et al.: ShortGPT: Layers in Large Language Models are More Redundant Than You Expect,
Findings of ACL 2025 (arXiv 2403.03853). Block Influence of layer ``i``: ``BI_i = 1 - E[cos(h_i, h_i+1)]`` over
the tokens of calibration text, from one pass over the dense model; the layers with the lowest go.

The other criterion is its neighbour in the literature: Gromov et al.: The Unreasonable
Ineffectiveness of the Deeper Layers (arXiv 2403.17887). Of all runs of ``n`` layers, the one leaves that
turns the last token least: ``d(i, n) = arccos(cos(h_i, h_i+n)) / pi``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from zoo.engines.angular import LastToken, angular_distances
from zoo.engines.statistics import BlockDistance, Watch, stream
from zoo.engines.surgery import Block
from zoo.families.layer_removal import LayerRemover
from zoo.families.weights import Work
from zoo.interface import register
from zoo.models.anatomy import Decoder, DecoderLayer


class Influence(BlockDistance):
    """Sum over tokens of one minus the cosine between input and output, the latter behind ``norm`` if given."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__("cosine")
        self.norm = norm

    def update(self, *activations: torch.Tensor) -> None:
        """Add one sequence: input and output of the layer, ``[tokens, hidden]`` each."""
        before, after = activations
        super().update(before, after if self.norm is None else normalised(self.norm, after))


def normalised(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """``norm(hidden)`` in float32, computed where and in the type that the norm has."""
    weight = next(norm.parameters())
    normed: torch.Tensor = norm(hidden.to(weight.device, weight.dtype))
    return normed.to(hidden.device, torch.float32)


@register("shortgpt")
class ShortGpt(LayerRemover):
    """Layer removal by Block Influence."""

    criterion: Literal["block-influence", "angular"] = Field(
        "block-influence",
        description="Layers of lowest Block Influence, or the run of layers with the smallest angular distance.",
    )
    final_norm: bool = Field(
        True, description="Take the last layer's output behind the final norm, as the authors' code does."
    )
    stride: int = Field(
        256, ge=1, description="Longer calibration windows are cut into pieces of this many tokens."
    )

    def importance(self, decoder: Decoder, windows: torch.Tensor, **how: Any) -> torch.Tensor:
        """Block Influence summed over all tokens, ``[layers]`` float64.

        Args:
            decoder: dense.
            windows: calibration ids ``[windows, tokens]``.
            how: ``device`` and ``progress`` of ``zoo.engines.statistics.stream``.
        """
        last = decoder.layers[-1]

        def observe(layer: DecoderLayer) -> dict[str, Watch]:
            norm = decoder.norm if self.final_norm and layer is last else None
            return {"influence": Watch("layer", Influence(norm))}

        even = windows.shape[1] // self.stride * self.stride
        pieces = [windows[:, :even].reshape(-1, self.stride), windows[:, even:]]
        total = torch.zeros(len(decoder.layers), dtype=torch.float64)
        for piece in pieces:
            if piece.numel():
                seen = stream(decoder, piece, observe, batch=max(1, 1024 // piece.shape[1]), **how)
                total += torch.tensor([layer["influence"].total for layer in seen], dtype=torch.float64)
        return total

    def distances(self, decoder: Decoder, windows: torch.Tensor, run: int, **how: Any) -> torch.Tensor:
        """Angular distance over each run of ``run`` layers, summed over windows, ``[layers + 1 - run]``."""
        seen = stream(decoder, windows, lambda _: {"last": Watch("layer", LastToken())}, **how)
        hidden = [torch.stack(layer["last"].before) for layer in seen]
        final = torch.stack(seen[-1]["last"].after)
        hidden.append(normalised(decoder.norm, final) if self.final_norm else final)
        return angular_distances(torch.stack(hidden), run)

    def choose(self, work: Work) -> list[Block]:
        """The ``count`` layers of lowest influence, or the run that turns least."""
        decoder, how = work.decoder, {"device": work.device, "progress": work.progress}
        count = self.count(len(decoder.layers))
        if self.criterion == "angular":
            start = int(self.distances(decoder, work.windows, count, batch=work.batch, **how).argmin())
            return [Block(index) for index in range(start, start + count)]
        order = self.importance(decoder, work.windows, **how).argsort(stable=True)
        return [Block(int(index)) for index in order[:count]]
