"""EntropyPrune: Matrix Entropy Guided Visual Token Pruning for Multimodal Large Language Models (arXiv 2602.17196).

In front of an early decoder layer K, each visual token is scored by the spectral entropy of its own query matrix
(heads x head dimension) of layer K-1; high-entropy tokens stay. The dual Gram matrix (heads x heads) has the same
spectrum as the covariance and is far smaller.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.errors import BadInput
from zoo.families.visual_tokens import KeepsShare, VisualTokenReducer, keep
from zoo.interface import refuse, register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy

_FLOOR = 1e-10
"""Smallest eigenvalue, so that its logarithm exists."""
_CHUNK = 1024
"""Tokens whose Gram matrices are decomposed at once."""


@register("entropyprune")
class EntropyPrune(KeepsShare, VisualTokenReducer):
    """Keeps the visual tokens whose query vectors, one per head, have the largest matrix entropy."""

    positions: ClassVar[Positions] = "keep"

    keep_ratio: float = Field(
        0.2882,
        gt=0,
        le=1,
        description="Fraction of the visual tokens that stays from `layer` on. The default is the paper's 192 of 576 "
        "on average over 32 layers; for Qwen2.5-VL it prints 1 - keep_ratio.",
    )
    average_tokens: float | None = Field(
        None,
        gt=0,
        description="Mean number of visual tokens over all decoder layers (the paper's budget); replaces keep_ratio "
        "and keep_tokens.",
    )
    layer: int = Field(
        2,
        ge=1,
        description="First decoder layer that runs short (the paper's K), counted from 0: where the entropy of the "
        "visual states drops. 2 for LLaVA-1.5/1.6-7B, 1 for Qwen2.5-VL-7B.",
    )
    states: Literal["query", "key", "value"] = Field(
        "query",
        description="Which states of layer - 1 are scored; keys and values are repeated to all heads.",
    )
    trace_normalise: bool = Field(
        False,
        description="Divide each Gram matrix by its trace, as matrix entropy is defined; the authors' code does not.",
    )

    def check(self, loaded: LoadedModel) -> None:
        """Refuse what the family refuses, and a single head."""
        super().check(loaded)
        decoder = loaded.anatomy.decoder
        if decoder is not None and decoder.layers[0].attention.heads < 2:
            raise refuse(self, "at least two attention heads, whose vectors it compares", "one head")

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage in front of layer K, which looks at the queries of layer K-1."""
        if self.keeps_all and self.average_tokens is None:
            return []
        assert anatomy.decoder is not None
        depth = len(anatomy.decoder.layers)
        return [Stage(self.layer, partial(self.select, depth=depth), observes=(self.layer - 1,))]

    def select(self, view: View, depth: int) -> Keep:
        """The kept tokens of one sample, in sequence order; ``depth`` is the number of decoder layers."""
        source = self.layer - 1
        states = {"query": view.queries, "key": view.keys, "value": view.values}[self.states](source)
        states = states.repeat_interleave(view.queries(source).shape[0] // states.shape[0], dim=0)
        entropy = token_entropy(states[:, view.index], self.trace_normalise)
        return keep(self.order(entropy, self.budget(len(view.tokens), depth)))

    def order(self, entropy: torch.Tensor, count: int) -> torch.Tensor:
        """Indices of the ``count`` kept tokens by descending ``entropy [N]``."""
        return entropy.topk(count).indices

    def budget(self, tokens: int, depth: int) -> int:
        """Visual tokens of ``tokens`` that stay from ``layer`` on, in a decoder of ``depth`` layers.

        Raises:
            BadInput: the average cannot be met.
        """
        if self.average_tokens is None:
            return self.count(tokens)
        if self.average_tokens > tokens:
            raise BadInput(
                f"average_tokens={self.average_tokens:g}, but this input has only {tokens} visual tokens"
            )
        kept = count_for_average(self.average_tokens, tokens, self.layer, depth)
        if kept < 1:
            raise BadInput(
                f"average_tokens={self.average_tokens:g} cannot be met: {tokens} tokens in {self.layer} of {depth} "
                "layers are more already; raise it or lower layer"
            )
        return kept


def count_for_average(average: float, tokens: int, layer: int, depth: int) -> int:
    """Tokens from ``layer`` on that make the mean over ``depth`` layers equal ``average``, rounded towards zero.

    ``int((depth * average - layer * tokens) / (depth - layer))``: layers before ``layer`` see all ``tokens``.
    """
    return int((depth * average - layer * tokens) / (depth - layer))


def token_entropy(states: torch.Tensor, trace_normalise: bool = False) -> torch.Tensor:
    """Spectral entropy of each token's matrix of head vectors, ``[N]`` float64.

    ``E = -sum_k lambda_k ln lambda_k / ln H`` with the eigenvalues of ``R R^T / H``, ``R [H, d]`` centred over heads.
    Without normalisation of the trace it depends on scale and may be negative.

    Args:
        states: ``[H, N, d]``.
        trace_normalise: divide by the trace before taking the entropy.
    """
    heads = states.shape[0]
    found = []
    for chunk in states.split(_CHUNK, dim=1):
        matrix = chunk.double().transpose(0, 1)
        matrix = matrix - matrix.mean(1, keepdim=True)
        gram = matrix @ matrix.mT / heads
        if trace_normalise:
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=_FLOOR)
            gram = gram / trace[:, None, None]
        spectrum = torch.linalg.eigvalsh(gram).clamp(min=_FLOOR)
        found.append(-(spectrum * spectrum.log()).sum(-1) / math.log(heads))
    return torch.cat(found)
