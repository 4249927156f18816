"""Vision Mamba (Vim, arXiv 2401.09417): an image encoder of bidirectional state-space blocks, without attention.

transformers has Mamba for text and no vision model of it, so here is a small one: patches with [CLS] in the middle of
the sequence, blocks that scan it forwards and backwards, the residual stream in float32 beside them. It is an ordinary
transformers model: ``save_pretrained``, ``from_pretrained`` and ``zoo.load_model`` work.

Tokens may be missing from the sequence. A block that is told the *positions* of those that are there lets them keep
their distances: the causal convolution sees an empty place where a token is missing, and the scan hands the state on
across it (*hidden-state alignment*, arXiv 2409.18962).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from zoo.models.selective_scan import selective_scan


class VimConfig(PreTrainedConfig):
    """Sizes of a Vim; the defaults are those of Vim-S."""

    model_type = "vim"

    def __init__(
        self,
        hidden_size: int = 384,
        num_hidden_layers: int = 24,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        time_step_rank: int | None = None,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        use_cls_token: bool = True,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        """Fields beside those of every configuration.

        Args:
            hidden_size: width of the residual stream, ``D``.
            num_hidden_layers: blocks.
            state_size: numbers of state per channel, ``S``.
            conv_kernel: tokens that the causal convolution sees.
            expand: channels of the scan over ``hidden_size``.
            time_step_rank: rank of the projection to step sizes; ``None`` = ``ceil(hidden_size / 16)``.
            image_size, patch_size: in pixels, of squares.
            num_channels: colours.
            use_cls_token: a [CLS] token in the middle of the sequence is read; else the mean of all tokens.
            layer_norm_eps: of the RMS norms.
            initializer_range: standard deviation of fresh matrices.
            kwargs: of ``PreTrainedConfig``.
        """
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.state_size = state_size
        self.conv_kernel = conv_kernel
        self.expand = expand
        self.time_step_rank = math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.use_cls_token = use_cls_token
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class VimNorm(nn.RMSNorm):
    """Normalises the float32 stream in float32; what comes out has the type of the weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [B, N, D]`` -> ``[B, N, D]``."""
        normed = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return normed.to(self.weight.dtype)


class VimScan(nn.Module):
    """One direction of a block: causal convolution, selective scan, gate."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        channels, states, rank = config.expand * config.hidden_size, config.state_size, config.time_step_rank
        self.sizes = (rank, states, states)
        self.conv1d = nn.Conv1d(
            channels, channels, config.conv_kernel, groups=channels, padding=config.conv_kernel - 1
        )
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        self.A_log = nn.Parameter(torch.zeros(channels, states))
        self.D = nn.Parameter(torch.ones(channels))

    def forward(
        self,
        x: torch.Tensor,
        gate: torch.Tensor,
        positions: torch.Tensor | None = None,
        decay_gaps: bool = False,
    ) -> torch.Tensor:
        """Scan ``x [B, N, C]`` from its first to its last token; ``gate`` has the same shape, and so has the result.

        ``positions [B, N]``, ascending, are the places of the tokens when some are missing. A missing token leaves the
        state as it is, or, with ``decay_gaps``, lets it decay by the step that a token of zeros would take.
        """
        x = F.silu(self._convolve(x, positions))
        low_rank, write, read = self.x_proj(x).split(self.sizes, dim=-1)
        step = F.softplus(self.dt_proj(low_rank).float())
        elapsed = step
        if positions is not None and decay_gaps:
            missing = positions.diff(dim=1, prepend=positions[:, :1] - 1) - 1
            elapsed = step + missing.unsqueeze(-1) * F.softplus(self.dt_proj.bias.float())
        rate = -torch.exp(self.A_log.float())
        y = selective_scan(x.float(), step, elapsed, rate, write.float(), read.float())
        return (y + self.D.float() * x.float()).to(gate.dtype) * F.silu(gate)

    def _convolve(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        if positions is None:
            convolved: torch.Tensor = self.conv1d(x.transpose(1, 2))[..., : x.shape[1]]
            return convolved.transpose(1, 2)
        kernel = self.conv1d.kernel_size[0]
        # Row d is the filter's weight for the token d places back; the last one is for all that are out of its reach.
        taps = F.pad(self.conv1d.weight[:, 0].flip(-1).T, (0, 0, 0, 1))
        y = x * taps[0]
        if self.conv1d.bias is not None:
            y = y + self.conv1d.bias
        for back in range(1, min(kernel, x.shape[1])):
            distance = (positions[:, back:] - positions[:, :-back]).clamp(max=kernel)
            y = y + F.pad(x[:, :-back] * taps[distance], (0, 0, back, 0))
        return y


class VimMixer(nn.Module):
    """Both directions of a block, between a common projection in and a common one out."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        channels = config.expand * config.hidden_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=False)
        self.forward_scan = VimScan(config)
        self.backward_scan = VimScan(config)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, decay_gaps: bool = False
    ) -> torch.Tensor:
        """``x [B, N, D]`` -> ``[B, N, D]``; ``positions [B, N]`` as in :class:`VimScan`."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        ahead = self.forward_scan(x, gate, positions, decay_gaps)
        mirrored = None if positions is None else -positions.flip(1)
        back = self.backward_scan(x.flip(1), gate.flip(1), mirrored, decay_gaps)
        mixed: torch.Tensor = self.out_proj((ahead + back.flip(1)) / 2)
        return mixed


class VimBlock(nn.Module):
    """Add to the residual stream, normalise, mix."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.norm = VimNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = VimMixer(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        decay_gaps: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block adds, and the float32 stream to add it to: both ``[B, N, D]``.

        ``positions [B, N]``, ascending, are the places of the tokens in the full sequence; ``None`` = all are there.
        """
        residual = hidden_states.float() if residual is None else residual + hidden_states
        return self.mixer(self.norm(residual), positions, decay_gaps), residual


class VimPreTrainedModel(PreTrainedModel):
    """What the models below share."""

    config: VimConfig
    config_class = VimConfig
    base_model_prefix = "vim"
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["VimBlock"]
    # There is no attention, so every implementation of it is as good as another.
    _supports_sdpa = True
    _supports_flash_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Mamba's start: real diagonal states ``-1 ... -S``, step sizes spread between 0.001 and 0.1."""
        super()._init_weights(module)
        if isinstance(module, VimScan):
            states = torch.arange(1, module.A_log.shape[1] + 1, dtype=torch.float32)
            module.A_log.copy_(states.log().expand_as(module.A_log))
            module.D.fill_(1.0)
            low, high = math.log(0.001), math.log(0.1)
            step = torch.empty_like(module.dt_proj.bias, dtype=torch.float32).uniform_(low, high).exp()
            module.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        if isinstance(module, VimModel):
            module.position_embeddings.normal_(std=self.config.initializer_range)
            if module.cls_token is not None:
                module.cls_token.normal_(std=self.config.initializer_range)


class VimModel(VimPreTrainedModel):
    """The encoder. [CLS] stands at place ``(N - 1) // 2`` of the ``N`` tokens, however many there are."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config)
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_cls_token else None
        tokens = patches + int(config.use_cls_token)
        self.position_embeddings = nn.Parameter(torch.zeros(1, tokens, config.hidden_size))
        self.layers = nn.ModuleList([VimBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = VimNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The layer that makes tokens of pixels."""
        return self.patch_embeddings

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode pictures ``[B, 3, H, W]`` of the configured size.

        Returns:
            ``last_hidden_state [B, N, D]`` in the order of the sequence and ``pooler_output [B, D]``: [CLS], or the
            mean of all tokens in a model without it.

        Raises:
            ValueError: the pictures have another size.
        """
        size = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"the pictures have {tuple(pixel_values.shape[-2:])} pixels, the model takes {size} x {size}"
            )
        weight = self.patch_embeddings.weight
        hidden = self.patch_embeddings(pixel_values.to(weight.dtype)).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            middle = hidden.shape[1] // 2
            cls = self.cls_token.expand(len(hidden), -1, -1)
            hidden = torch.cat((hidden[:, :middle], cls, hidden[:, middle:]), dim=1)
        hidden, residual = hidden + self.position_embeddings, None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        last = self.norm(hidden if residual is None else residual + hidden)
        pooled = last.mean(1) if self.cls_token is None else last[:, (last.shape[1] - 1) // 2]
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled)


class VimForImageClassification(VimPreTrainedModel):
    """The encoder with a linear classifier on what it pools."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config)
        self.vim = VimModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Logits ``[B, num_labels]``, and the cross-entropy when ``labels [B]`` are given."""
        logits = self.head(self.vim(pixel_values).pooler_output)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
