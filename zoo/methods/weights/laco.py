"""LaCo: collapse runs of layers into one, from the rear to the front, as long as the final hidden states stay alike.

Yang, Cao, Zhao: LaCo: Large Language Model Pruning via Layer Collapse, Findings of EMNLP 2024 (arXiv 2402.11187).
Layer ``l`` takes in the ``m`` layers behind it ("reserving differences while seeking common"):
``theta_l* = theta_l + sum_k (theta_l+k - theta_l)``, ``k = 1 .. m``. A merge is accepted if the output for a few
sentences stays similar to the dense model's; so how many layers leave is an outcome.

The authors' code subtracts from each difference the layer that it is just updating. The sum then telescopes: the merged
layer has the projections of the last layer of the run and the norms of the first. Results published with the code come
from that; ``rule`` chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.func import functional_call

from zoo.engines.statistics import Progress
from zoo.engines.stepping import evaluating, layer_arguments, moved
from zoo.engines.surgery import Block, remove_blocks
from zoo.errors import BadParameter, RunFailed
from zoo.families.weights import Facts, WeightMethod, Work
from zoo.interface import refuse, register
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, DecoderLayer

Rule = Literal["released", "paper"]


@dataclass(frozen=True)
class Collapsed:
    """A layer of the shortened stack: the dense layer whose norms it has, and its projections by name."""

    index: int
    projections: Mapping[str, torch.Tensor]


def projections(layer: DecoderLayer) -> dict[str, torch.Tensor]:
    """Weights and biases of all linear layers, by their names in the layer's module."""
    return {
        f"{name}.{leaf}": parameter.detach()
        for name, module in layer.module.named_modules()
        if isinstance(module, nn.Linear)
        for leaf, parameter in module.named_parameters()
    }


def merge(run: Sequence[Collapsed], rule: Rule) -> Collapsed:
    """One layer in place of two or more."""
    first, *others = run
    if rule == "released":
        return Collapsed(first.index, others[-1].projections)
    merged = {}
    for name, theta in first.projections.items():
        base = theta.float()
        merged[name] = (base + sum(other.projections[name].float() - base for other in others)).to(theta)
    return Collapsed(first.index, merged)


@torch.no_grad()
def final_states(
    decoder: Decoder, stack: Sequence[Collapsed], input_ids: torch.Tensor, batch: int
) -> torch.Tensor:
    """Output of the final norm when ``stack`` runs in place of the layers, a row per sentence.

    Args:
        decoder: left as it is.
        stack: layers in running order.
        input_ids: ``[sentences, tokens]``.
        batch: sentences run at once.

    Returns:
        ``[sentences, tokens * hidden]`` float32: products of very large activations overflow in half precision.
    """
    rows = []
    for ids in input_ids.to(decoder.embed.weight.device).split(batch):
        hidden, arguments = layer_arguments(decoder, ids)
        for layer in stack:
            module = decoder.layers[layer.index].module
            output = functional_call(module, dict(layer.projections), (hidden,), arguments[layer.index])
            hidden = output[0] if isinstance(output, tuple) else output
        rows.append(decoder.norm(hidden).flatten(1).float())
    return torch.cat(rows)


@register("laco")
class LaCo(WeightMethod):
    """Layer collapse."""

    merge_layers: int = Field(
        4, ge=2, description="C: layers that become one. The authors take 7 for 40 layers."
    )
    threshold: float = Field(
        0.75,
        ge=-1,
        le=1,
        description="T: similarity to the dense model above which a merge is accepted. The authors take 0.45 for a "
        "model of 13B parameters.",
    )
    interval: int = Field(1, ge=1, description="I: layers to go down after an accepted merge.")
    low: int = Field(0, ge=0, description="L: lowest layer that may take in others.")
    high: int | None = Field(
        None, ge=1, description="H: the first run begins C layers below this one; the last layer when null."
    )
    rule: Rule = Field(
        "released", description="Merge as the released code does, or by the paper's sum of differences."
    )
    sentences: int = Field(5, ge=1, description="How many of the calibration windows are compared.")

    def check(self, loaded: LoadedModel) -> None:
        """As for all weight methods; and projections can only be added where they have one shape.

        Raises:
            Refused: layers have different widths.
        """
        super().check(loaded)
        assert loaded.anatomy.decoder is not None
        shapes = [
            {name: value.shape for name, value in projections(layer).items()}
            for layer in loaded.anatomy.decoder.layers
        ]
        if any(own != shapes[0] for own in shapes):
            raise refuse(self, "layers of one width, because it adds them up", "layers of different widths")

    def collapse(
        self,
        decoder: Decoder,
        sentences: torch.Tensor,
        *,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> tuple[list[Collapsed], list[float]]:
        """Merge from the rear to the front.

        Args:
            decoder: dense; left as it is.
            sentences: ids ``[sentences, tokens]``.
            batch: sentences run at once.
            progress: called with the layers gone down so far, and all.

        Returns:
            The layers that are left, and the similarity of every merge that was tried, in order.

        Raises:
            BadParameter: no run of so many layers fits into the range.
            RunFailed: the dense model's output is not finite.
        """
        stack = [Collapsed(index, projections(layer)) for index, layer in enumerate(decoder.layers)]
        high = len(stack) - 1 if self.high is None else self.high
        place = begin = high - self.merge_layers
        if high >= len(stack) or place < self.low:
            raise BadParameter(
                f"laco: no run of {self.merge_layers} layers fits between layers {self.low} and {high} of "
                f"{len(stack)}; lower merge_layers, or widen low and high"
            )
        tried: list[float] = []
        with evaluating(decoder.module):
            dense = final_states(decoder, stack, sentences, batch)
            if not bool(dense.isfinite().all()):
                raise RunFailed("the model's output is NaN or infinite; load it in float32 or bfloat16")
            while place >= self.low:
                run = stack[place : place + self.merge_layers]
                merged = [*stack[:place], merge(run, self.rule), *stack[place + len(run) :]]
                states = final_states(decoder, merged, sentences, batch)
                tried.append(float(nn.functional.cosine_similarity(dense, states).mean()))
                accepted = tried[-1] > self.threshold
                if accepted:
                    stack = merged
                place -= self.interval if accepted else 1
                if progress is not None:
                    progress(min(begin - place, begin - self.low + 1), begin - self.low + 1)
        return stack, tried

    def transform(self, work: Work) -> Facts:
        """Collapse, give layers their new projections, remove the others."""
        decoder, sentences = work.decoder, work.windows[: self.sentences]
        device = decoder.embed.weight.device if work.device is None else torch.device(work.device)
        with moved(decoder.module, device):
            stack, tried = self.collapse(decoder, sentences, batch=work.batch, progress=work.progress)
            for layer in stack:
                for name, value in layer.projections.items():
                    owner, _, leaf = name.rpartition(".")
                    linear = decoder.layers[layer.index].module.get_submodule(owner)
                    trains = getattr(linear, leaf).requires_grad
                    setattr(linear, leaf, nn.Parameter(value, requires_grad=trains))
        left = {layer.index for layer in stack}
        gone = [Block(index) for index in range(len(decoder.layers)) if index not in left]
        remove_blocks(decoder, gone)
        return {
            "layers collapsed into others": len(gone),
            "merges tried": len(tried),
            "similarity of the last merge tried": round(tried[-1], 6),
        }
