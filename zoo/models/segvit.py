"""SegViT (arXiv 2210.05844) on a plain encoder: semantic segmentation by attention to masks.

transformers has no segmenter on a plain ViT, so here is a small one. Patches run through the blocks of an encoder
without its [CLS] token; a head asks with one query per class which tokens belong to it, and the logits of that
attention are the masks. Heads of the same form stand at several depths: the last one gives the result, the others are
for training, and for tokens that leave early (``dtop``). It is an ordinary transformers model: ``save_pretrained``,
``from_pretrained`` and ``zoo.load_model`` work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from zoo.errors import BadInput, Refused
from zoo.models.anatomy import EncoderBlock
from zoo.models.vit_like import encoder_parts

BACKBONES = ("vit", "deit", "dinov2", "dinov2_with_registers")


class SegViTConfig(PreTrainedConfig):
    """Sizes of a SegViT."""

    model_type = "segvit"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        exits: Sequence[int] = (5, 7, 11),
        head_size: int = 384,
        head_layers: int = 3,
        head_heads: int = 6,
        **kwargs: Any,
    ) -> None:
        """Fields beside those of every configuration.

        Args:
            backbone: configuration of the encoder, as a dictionary with its ``model_type``; ``None`` = ViT-B/16.
            exits: blocks behind which heads stand, counted from 0; the last one is the last block.
            head_size: width of the heads.
            head_layers: decoder layers of each head.
            head_heads: attention heads of those.
            kwargs: of ``PreTrainedConfig``, such as ``id2label``.
        """
        self.backbone = backbone or {"model_type": "vit"}
        self.exits = list(exits)
        self.head_size = head_size
        self.head_layers = head_layers
        self.head_heads = head_heads
        super().__init__(**kwargs)


@dataclass
class SegViTOutput(ModelOutput):
    """What a SegViT puts out.

    Attributes:
        logits: score of each class at each pixel, ``[B, K, H, W]``: probability of the class in the picture, times
            that of the pixel in its mask.
        last_hidden_state: normalised tokens behind the last block, ``[B, N, D]``.
    """

    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


@dataclass(frozen=True)
class MaskPrediction:
    """What a head says about tokens.

    Attributes:
        classes: logits of "in the picture" and "not in it" for each class, ``[B, K, 2]``.
        masks: mask logits ``[B, K, N]``.
    """

    classes: torch.Tensor
    masks: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """Probability of the class times that of the mask, ``[B, K, N]``."""
        return self.classes.softmax(-1)[..., :1] * self.masks.sigmoid()


class QueryAttention(nn.Module):
    """Multi-head attention of class queries, which also gives the mean of its raw logits."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(size, size) for _ in range(4))

    def forward(
        self, queries: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``queries [B, K, C]``, ``tokens [B, N, C]``, ``valid [B, N]`` (``False`` = padding).

        Returns:
            The attended values ``[B, K, C]`` and ``q k / sqrt(d)``, averaged over heads, ``[B, K, N]``.
        """
        query, key, value = self.query(queries), self.key(tokens), self.value(tokens)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        mask = None if valid is None else valid[:, None, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # The mean over heads of per-head products is one product over all channels.
        logits = query @ key.transpose(1, 2) / (self.heads * math.sqrt(q.shape[-1]))
        return self.output(attended.transpose(1, 2).flatten(2)), logits


class HeadLayer(nn.Module):
    """Decoder layer with norms behind its parts: queries among themselves, queries to tokens, feed-forward."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.among, self.across = QueryAttention(size, heads), QueryAttention(size, heads)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(size) for _ in range(3))

    def forward(
        self, queries: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries ``[B, K, C]`` and the mask logits ``[B, K, N]``."""
        queries = self.norm1(queries + self.among(queries, queries)[0])
        attended, masks = self.across(queries, tokens, valid)
        queries = self.norm2(queries + attended)
        return self.norm3(queries + self.down(F.relu(self.up(queries)))), masks


class MaskHead(nn.Module):
    """One query per class; the masks are the attention logits of the last layer."""

    def __init__(self, dim: int, size: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(dim, size), nn.LayerNorm(size)
        self.queries = nn.Embedding(classes, size)
        self.layers = nn.ModuleList([HeadLayer(size, heads) for _ in range(layers)])
        self.classify = nn.Linear(size, 2)

    def forward(self, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> MaskPrediction:
        """``tokens [B, N, D]``; ``valid [B, N]`` is ``False`` where there is only padding."""
        tokens = self.norm(self.project(tokens))
        classes = torch.arange(self.queries.num_embeddings, device=tokens.device)
        queries = self.queries(classes.expand(len(tokens), -1))
        for layer in self.layers:
            queries, masks = layer(queries, tokens, valid)
        return MaskPrediction(self.classify(queries), masks)


class SegViT(PreTrainedModel):
    """A plain encoder with a mask head at each exit."""

    config: SegViTConfig
    config_class = SegViTConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(config)
        kind = config.backbone["model_type"]
        if kind not in BACKBONES:
            raise Refused(f"SegViT stands on one of {', '.join(BACKBONES)}, not on {kind}")
        own = CONFIG_MAPPING[kind].from_dict(config.backbone)
        own._attn_implementation = config._attn_implementation
        self.backbone = AutoModel.from_config(
            own, **({} if kind.startswith("dinov2") else {"add_pooling_layer": False})
        )
        depth = len(self.blocks)
        if config.exits != sorted(set(config.exits)) or config.exits[-1] != depth - 1:
            raise BadInput(
                f"the exits of a SegViT ascend and end with its last block, {depth - 1}: {config.exits}"
            )
        sizes = (own.hidden_size, config.head_size, config.head_layers, config.head_heads, config.num_labels)
        self.heads = nn.ModuleList([MaskHead(*sizes) for _ in config.exits])
        self.post_init()

    @property
    def blocks(self) -> tuple[EncoderBlock, ...]:
        """Blocks of the encoder."""
        return encoder_parts(self.backbone).blocks

    def get_input_embeddings(self) -> nn.Module:
        """Those of the encoder."""
        embeddings: nn.Module = self.backbone.get_input_embeddings()
        return embeddings

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = encoder_parts(self.backbone).patch_size
        return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> SegViTOutput:
        """Segment pictures ``[B, 3, H, W]``.

        Raises:
            BadInput: a method has shortened the sequence and not brought it back to full length.
        """
        prefix = encoder_parts(self.backbone).prefix
        tokens = self.backbone.embeddings(pixel_values)[:, prefix:]
        for block in self.blocks:
            tokens = block.module(tokens)
        tokens = self.backbone.layernorm(tokens)
        scores = self.heads[-1](tokens).scores
        rows, columns = self.grid(pixel_values)
        if scores.shape[-1] != rows * columns:
            raise BadInput(
                f"a segmenter needs all {rows * columns} patches at its end, not {scores.shape[-1]}; set restore=true"
            )
        maps = scores.unflatten(-1, (rows, columns))
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        return SegViTOutput(logits=enlarged(maps, size), last_hidden_state=tokens)


def enlarged(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``maps [B, K, h, w]``, bilinear, to ``size`` pixels."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
