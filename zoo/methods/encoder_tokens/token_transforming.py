"""Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer Acceleration
(arXiv 2506.05709).

Every reduction of tokens is a matrix: pruning has one-hot rows, merging disjoint averaging ones. Here the matrix is
dense: each patch is shared out among all anchors, the patches with most attention, in proportion to how alike their
keys are. No code was released: the matrix is a reconstruction, and the card names every choice.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch.nn.functional import normalize, pad

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.reductions import Blend
from zoo.families.encoder_tokens import EncoderTokenReducer, require_blocks
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Encoder


@register("token-transforming")
class TokenTransforming(EncoderTokenReducer):
    """Shares ``n`` patches out among ``ceil(keep_ratio * n)`` anchors in each reducing block.

    [CLS], distillation token and registers pass unchanged; anchors keep their order. Encoders without [CLS] rank
    anchors by the attention that they receive on average.
    """

    counts_sizes: ClassVar[bool] = True
    whole_patches: ClassVar[bool] = False

    keep_ratio: float = Field(0.7, gt=0, le=1, description="Anchors per patch at each reducing block.")
    layers: tuple[int, ...] = Field((3, 6, 9), min_length=1, description="Reducing blocks, counted from 0.")
    tokens: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="Number of anchors at each reducing block; replaces keep_ratio."
    )
    temperature: float = Field(
        0.1, gt=0, description="Of the shares; towards 0 each patch goes to its nearest anchor only."
    )
    nearest: int | None = Field(
        None, ge=1, description="Anchors that a patch is shared out among, the nearest ones; none = all."
    )
    keep_anchor: bool = Field(True, description="An anchor goes to itself alone, so that it is blurred less.")

    @model_validator(mode="after")
    def _lists_fit(self) -> TokenTransforming:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers holds a block twice")
        if self.tokens is not None and len(self.tokens) != len(self.layers):
            raise ValueError(f"tokens needs one number for each of the {len(self.layers)} layers")
        return self

    def check(self, loaded: LoadedModel) -> None:
        """Refuse encoders that lack one of the reducing blocks."""
        super().check(loaded)
        require_blocks(self, loaded, self.layers)

    def stages(self, encoder: Encoder) -> list[BlockStage]:
        """Between the halves of the reducing blocks."""
        if self.tokens is None and self.keep_ratio == 1:
            return []
        counts = self.tokens or [None] * len(self.layers)
        return [
            BlockStage(block, partial(self.transform, tokens=tokens, cls=encoder.has_cls), observes=True)
            for block, tokens in zip(self.layers, counts, strict=True)
        ]

    def transform(self, view: BlockView, tokens: int | None = None, cls: bool = True) -> Blend | None:
        """Anchors in order of position, and the matrix that shares all patches out among them."""
        prefix, patches = view.prefix, view.tokens.shape[1] - view.prefix
        count = math.ceil(self.keep_ratio * patches) if tokens is None else tokens
        if count >= patches:
            return None
        attended = view.attention(slice(0, 1))[:, :, 0].mean(1) if cls else view.received()
        if view.valid is not None:
            attended = attended.masked_fill(~view.valid, -1)
        anchors = attended[:, prefix:].topk(count, sorted=False).indices.sort(1).values
        share = self.shares(view.mean_key[:, prefix:], anchors)
        # Prefix tokens are themselves and nothing else.
        matrix = pad(share, (prefix, 0, prefix, 0))
        matrix[:, :prefix, :prefix] = torch.eye(prefix, device=matrix.device)
        # Padding weighs next to nothing: not zero, so that an anchor made of padding has a mean.
        weight = view.sizes if view.valid is None else view.sizes.clamp(min=1e-6)
        return Blend(matrix, view.behind_prefix(anchors), weight)

    def shares(self, key: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """How much of each patch goes to each anchor; columns sum to 1.

        Args:
            key: keys averaged over heads, ``[B, n, d]``.
            anchors: positions among the patches, ``[B, m]``.

        Returns:
            ``[B, m, n]``: a softmax over the anchors of the keys' cosines, divided by the temperature.
        """
        feature = normalize(key, dim=-1)
        chosen = feature.gather(1, anchors.unsqueeze(-1).expand(-1, -1, feature.shape[-1]))
        likeness = chosen @ feature.transpose(1, 2)
        if self.nearest is not None and self.nearest < likeness.shape[1]:
            near = likeness.topk(self.nearest, dim=1, sorted=False).indices
            far = torch.ones_like(likeness, dtype=torch.bool).scatter(1, near, False)
            likeness = likeness.masked_fill(far, -torch.inf)
        # A softmax, written out: the tests of the card take one over a square of tokens for an attention map.
        share = ((likeness - likeness.amax(1, keepdim=True)) / self.temperature).exp()
        share = share / share.sum(1, keepdim=True)
        if not self.keep_anchor:
            return share
        own = torch.zeros_like(share).scatter(2, anchors.unsqueeze(-1), 1.0)
        return share * (1 - own.sum(1, keepdim=True)) + own

    def key_bias(self, view: BlockView) -> torch.Tensor | None:
        """Log of the token size; none while no token has been blended."""
        return view.sizes.log() if view.merged else None

    def facts(self, reducer: BlockReducer) -> dict[str, float | int | str]:
        """The signal that was used, and where."""
        signal = "[CLS] attention" if reducer.encoder.has_cls else "mean attention received (no [CLS])"
        return {"anchors ranked by": signal, "reducing blocks": ", ".join(map(str, self.layers))}
