"""Where the parts of an architecture are.

Engines never touch attribute names such as ``self_attn.q_proj``: they ask the ``Anatomy``, which one small file per
architecture family knows how to build. Views are made on demand from the live model and hold no copies, so after
surgery a new ``anatomy_of(model)`` tells the new widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from zoo.errors import Refused
from zoo.models.packing import Packer


@dataclass(frozen=True)
class LinearPart:
    """A linear layer, or some output rows of a fused one (``rows = (start, stop)``).

    ``owner.name`` is the attribute to replace when the layer is rebuilt.
    """

    owner: nn.Module
    name: str
    rows: tuple[int, int] | None = None

    @property
    def linear(self) -> nn.Linear:
        """The whole layer."""
        layer = getattr(self.owner, self.name)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """Weight of these rows, ``[out, in]`` (a view)."""
        weight = self.linear.weight
        return weight if self.rows is None else weight[self.rows[0] : self.rows[1]]

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias of these rows, ``[out]``."""
        bias = self.linear.bias
        return bias if bias is None or self.rows is None else bias[self.rows[0] : self.rows[1]]

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return self.linear.out_features if self.rows is None else self.rows[1] - self.rows[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply these rows to ``x [..., in]``."""
        if type(self.linear) is nn.Linear:
            return nn.functional.linear(x, self.weight, self.bias)
        # A layer that is more than its weight.
        output: torch.Tensor = self.linear(x)
        return output if self.rows is None else output[..., slice(*self.rows)]


@dataclass(frozen=True)
class Attention:
    """Multi-head attention with (possibly) grouped keys and values."""

    module: nn.Module
    query: LinearPart
    key: LinearPart
    value: LinearPart
    output: LinearPart
    head_dim: int
    scaling: float
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.query.out_features // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key-value heads (groups)."""
        return self.key.out_features // self.head_dim

    @property
    def group(self) -> int:
        """Query heads per key-value head; 1 for plain multi-head attention."""
        return self.heads // self.kv_heads if self.kv_heads else 1


@dataclass(frozen=True)
class Mlp:
    """Feed-forward block. ``gate`` is ``None`` when it is not gated."""

    module: nn.Module
    gate: LinearPart | None
    up: LinearPart
    down: LinearPart

    @property
    def width(self) -> int:
        """Intermediate channels."""
        return self.up.out_features

    @property
    def inputs(self) -> tuple[LinearPart, ...]:
        """The projections into the intermediate channels."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class DecoderLayer:
    """One pre-norm decoder layer: ``h = x + attention(input_norm(x))``, then ``h + mlp(post_norm(h))``.

    Some architectures normalise what the two blocks add, too (``attention_norm``, ``mlp_norm``). Where the residual
    stream was rotated and sliced, the shortcuts are matrices. An attention that was removed has no heads, a removed
    feed-forward block no width; their linears are empty.
    """

    module: nn.Module
    input_norm: nn.Module
    attention: Attention
    post_norm: nn.Module
    mlp: Mlp
    attention_norm: nn.Module | None = None
    mlp_norm: nn.Module | None = None
    attention_shortcut: nn.Linear | None = None
    mlp_shortcut: nn.Linear | None = None

    @property
    def by_input(self) -> dict[str, tuple[LinearPart, ...]]:
        """All linears of the layer, those that read the same activations together.

        ``attention`` (query, key, value), ``output``, ``mlp`` (gate, up) and ``down``; without a part that was removed.
        """
        attention, mlp = self.attention, self.mlp
        groups: dict[str, tuple[LinearPart, ...]] = {}
        if attention.heads:
            groups |= {
                "attention": (attention.query, attention.key, attention.value),
                "output": (attention.output,),
            }
        if mlp.width:
            groups |= {"mlp": mlp.inputs, "down": (mlp.down,)}
        return groups

    @property
    def linears(self) -> tuple[LinearPart, ...]:
        """All linears of the layer."""
        return tuple(part for parts in self.by_input.values() for part in parts)

    @property
    def places(self) -> tuple[LinearPart, ...]:
        """Where linears should be, whatever is there: parts that were removed, or modules that are no ``nn.Linear``."""
        attention, mlp = self.attention, self.mlp
        return (attention.query, attention.key, attention.value, attention.output, *mlp.inputs, mlp.down)


@dataclass(frozen=True)
class Decoder:
    """A causal decoder: ``module`` is the inner model (embeddings, layers, final norm), ``head`` the LM head."""

    module: nn.Module
    embed: nn.Embedding
    layers: tuple[DecoderLayer, ...]
    norm: nn.Module
    rotary: nn.Module | None
    head: nn.Linear | None
    config: Any
    stack: nn.ModuleList
    """The list that holds the layer modules (depth methods shorten it)."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.embed.embedding_dim

    @property
    def grid_positions(self) -> bool:
        """True when positions are places in image grids (M-RoPE), which no count along the sequence replaces."""
        return "mrope_section" in (getattr(self.config, "rope_parameters", None) or {})

    def prunable_parameters(self) -> int:
        """Weights of all decoder-layer linears and shortcuts (embeddings, norms, biases and head not counted)."""
        shortcuts = (s for layer in self.layers for s in (layer.attention_shortcut, layer.mlp_shortcut))
        return sum(part.weight.numel() for layer in self.layers for part in layer.linears) + sum(
            shortcut.weight.numel() for shortcut in shortcuts if shortcut is not None
        )


class TextEncoder(Decoder):
    """A bidirectional encoder of text, seen through the same parts: no head, no cache, norms behind the blocks."""


@dataclass(frozen=True)
class EncoderBlock:
    """One pre-norm encoder block: ``x + scale1(attention(norm1(x)))``, then ``x + scale2(mlp(norm2(x)))``.

    ``drop`` is the dropout or stochastic depth on both branches, if the block has one.

    ``pair_bias``, where attention logits depend on relative positions, makes what is added to them, ``[1, H, N, N]``:
    from the length ``N`` of the whole sequence, the mask that the block was given, and the block's other arguments, of
    which it takes out those that are not for the attention.
    """

    module: nn.Module
    norm1: nn.Module
    attention: Attention
    scale1: Callable[[torch.Tensor], torch.Tensor]
    norm2: nn.Module
    mlp: nn.Module
    scale2: Callable[[torch.Tensor], torch.Tensor]
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None
    pair_bias: Callable[[int, torch.Tensor | None, dict[str, Any]], torch.Tensor | None] | None = None


@dataclass(frozen=True)
class Encoder:
    """A vision encoder. ``prefix`` counts tokens before the patches: ``[CLS]``, distillation token, registers."""

    module: nn.Module
    blocks: tuple[EncoderBlock, ...]
    hidden_size: int
    heads: int
    patch_size: int
    image_size: int
    prefix: int
    has_cls: bool
    has_distillation_token: bool
    config: Any
    block_attention_key: str = "attention_mask"
    packed_order: Callable[[torch.Tensor], torch.Tensor] | None = None
    """For encoders that run all crops as one long sequence: from the grids ``[pictures, 3]`` (frames, rows, columns)
    to the patch that stands at each place of that sequence, ``[sum of patches]``. The blocks of such an encoder can
    be observed, but their sequence cannot be shortened."""

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """``x [B, N, D]`` as [CLS] ``[B, D]`` (``None`` without one) and patches ``[B, n, D]``, no other prefix."""
        return (x[:, 0] if self.has_cls else None), x[:, self.prefix :]


@dataclass(frozen=True)
class StateSpaceBlock:
    """One block of a state-space encoder: called with hidden states, residual stream and perhaps ``positions``.

    ``input`` and ``output`` are its projections, ``backward_scan`` the scan of the flipped sequence. Between the scans
    and ``output`` a token has ``[C]`` channels.
    """

    module: nn.Module
    input: nn.Module
    backward_scan: nn.Module
    output: nn.Module


@dataclass(frozen=True)
class StateSpaceEncoder:
    """A vision encoder that scans its tokens instead of attending. [CLS], if any, stands in their middle."""

    module: nn.Module
    blocks: tuple[StateSpaceBlock, ...]
    hidden_size: int
    patch_size: int
    image_size: int
    has_cls: bool
    config: Any

    def cls_place(self, tokens: int) -> int | None:
        """Place of [CLS] in a sequence of so many tokens."""
        return (tokens - 1) // 2 if self.has_cls else None

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """``x [B, N, D]`` as [CLS] ``[B, D]`` (``None`` without one) and patches ``[B, n, D]``."""
        place = self.cls_place(x.shape[1])
        if place is None:
            return None, x
        return x[:, place], torch.cat((x[:, :place], x[:, place + 1 :]), dim=1)


@dataclass(frozen=True)
class DenoiserBlock:
    """One transformer block of a diffusion U-Net; its tokens are the cells of an image grid."""

    module: nn.Module
    self_attention: Attention
    cross_attention: Attention | None
    mlp: nn.Module


@dataclass(frozen=True)
class Denoiser:
    """A diffusion U-Net. ``blocks`` are in the order in which they run."""

    module: nn.Module
    blocks: tuple[DenoiserBlock, ...]


@dataclass(frozen=True)
class Anatomy:
    """All parts of one model. What an architecture lacks is ``None``."""

    kind: Literal["decoder", "encoder", "vlm", "embedding", "diffusion"]
    model_type: str
    decoder: Decoder | None = None
    text_encoder: TextEncoder | None = None
    encoder: Encoder | None = None
    state_space: StateSpaceEncoder | None = None
    projector: nn.Module | None = None
    vlm: nn.Module | None = None
    """The module that receives ``input_ids`` and pixels, and calls encoder, projector and decoder."""
    image_token_id: int | None = None
    video_token_id: int | None = None
    """Placeholder of video tokens, where the architecture has one of its own."""
    packer: Packer | None = None
    """Tells which patches each visual token was made from."""
    feature_layer: int | list[int] | None = None
    """Which encoder hidden states the projector reads, numbered as in the config (-2: before the last block)."""
    drops_cls: bool = False
    """True when the VLM cuts the prefix tokens off before projecting."""
    denoiser: Denoiser | None = None

    @property
    def visual_token_ids(self) -> dict[str, int]:
        """Placeholder ids by kind, ``image`` and ``video``."""
        ids = {"image": self.image_token_id, "video": self.video_token_id}
        return {kind: number for kind, number in ids.items() if number is not None}

    @property
    def description(self) -> str:
        """For refusals: ``llama (decoder LLM)``."""
        names = {
            "decoder": "decoder LLM",
            "encoder": "vision encoder",
            "vlm": "vision-language model",
            "embedding": "text encoder",
            "diffusion": "text-to-image model",
        }
        kind = names[self.kind] if self.state_space is None else "vision state-space model"
        return f"{self.model_type} ({kind})"


Builder = Callable[[Any], Anatomy]
_builders: dict[str, Builder] = {}


def architecture(*model_types: str) -> Callable[[Builder], Builder]:
    """Register a builder for transformers ``config.model_type`` names."""

    def decorate(builder: Builder) -> Builder:
        for model_type in model_types:
            _builders[model_type] = builder
        return builder

    return decorate


def anatomy_of(model: Any) -> Anatomy:
    """The anatomy of a transformers model.

    Raises:
        Refused: the architecture is not known; the message lists those that are.
    """
    from zoo.models import (  # noqa: F401 - they register themselves
        beit_like,
        bert_like,
        diffusion,
        gemma_like,
        gpt_like,
        idefics_like,
        internvl_like,
        llama_like,
        llava_like,
        phi_like,
        qwen_vl_like,
        segvit_like,
        vim_like,
        vit_like,
    )

    model_type = model.config.model_type
    builder = _builders.get(model_type)
    if builder is None:
        known = ", ".join(sorted(_builders))
        raise Refused(f"the architecture '{model_type}' is not supported yet; supported: {known}")
    return builder(model)
