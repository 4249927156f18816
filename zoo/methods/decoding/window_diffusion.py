"""Window-Diffusion: of a masked diffusion language model, compute only what is about to be decoded.

"Window-Diffusion: Accelerating Diffusion Language Model Inference with Windowed Token Pruning and Caching"
(2601.20332). Denoising is cut into phases. The first step of a phase runs the whole sequence and keeps its keys and
values; the others run the next few masks and what was just decoded, which attend to a window of the kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from transformers import DynamicCache

from zoo.errors import BadInput, Refused
from zoo.interface import Applied, Method, Phase, refuse, register
from zoo.report import Report

if TYPE_CHECKING:
    from zoo.models import LoadedModel


class PositionCache(DynamicCache):
    """Keys and values by position, rotated already. What is run replaces its entries; attention reads some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.written: torch.Tensor | None = None
        self.read: torch.Tensor | None = None
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[1, heads, written, head_dim]``; returns what is to be read, or all of it."""
        if self.written is None or self.read is None:
            self._states[layer_idx] = key_states, value_states
            return key_states, value_states
        keys, values = self._states[layer_idx]
        keys[:, :, self.written] = key_states
        values[:, :, self.written] = value_states
        return keys[:, :, self.read], values[:, :, self.read]


@dataclass(frozen=True)
class DenoisingStep:
    """One step of one sample.

    Attributes:
        active: positions that ran, bool ``[N]``.
        window: positions whose keys and values were read, bool ``[N]``.
        tokens: the sequence after the step ``[N]``.
    """

    active: torch.Tensor
    window: torch.Tensor
    tokens: torch.Tensor


def first_masks(masked: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` of the ``masked [N]`` positions, bool ``[N]``."""
    return masked & (masked.cumsum(0) <= count)


def candidates(logits: torch.Tensor, mask_id: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens for all positions, and the model's confidence in them.

    A temperature adds Gumbel noise, in float64. The mask itself is never a token.

    Args:
        logits: ``[n, V]``.

    Returns:
        ``[n]`` int64 and ``[n]`` float32.
    """
    scores = logits.to(torch.float64 if temperature > 0 else torch.float32, copy=True)
    if temperature > 0:
        noise = torch.rand_like(scores).clamp(min=torch.finfo(torch.float64).tiny)
        scores -= temperature * (-noise.log()).log()
    scores[:, mask_id] = float("-inf")
    tokens = scores.argmax(-1)
    return tokens, logits.float().softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def denoise(
    model: Any,
    method: WindowDiffusion,
    prompt: torch.Tensor,
    length: int,
    mask_id: int,
    temperature: float = 0.0,
) -> Iterator[DenoisingStep]:
    """Decode ``length`` masks behind ``prompt [P]``, step by step.

    Every step decodes its share of the masks, those the model is surest of among the positions that ran. Where fewer
    masks ran than that, the rest is left to later steps.
    """
    x = torch.cat((prompt, prompt.new_full((length,), mask_id)))
    steps = min(method.steps or length, length)
    shares = [length // steps + (step < length % steps) for step in range(steps)]
    places = torch.arange(len(x), device=x.device)
    everything = torch.ones(len(x), dtype=torch.bool, device=x.device)
    cache = PositionCache()
    nothing = torch.zeros_like(everything)
    active = window = everything
    fresh = nothing
    step = owed = 0
    while bool((x == mask_id).any()):
        refresh = step % method.refresh_cycle == 0
        if refresh:
            active = window = everything
        cache.written, cache.read = (None, None) if refresh else (places[active], places[window])
        run = places[active]
        logits = model(
            input_ids=x[run].unsqueeze(0),
            position_ids=run.unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            is_causal=False,
        ).logits[0]
        tokens, confidence = candidates(logits, mask_id, temperature)
        masked = x[run] == mask_id
        owed += shares[step] if step < steps else 1
        count = min(owed, int(masked.sum()))
        owed -= count
        chosen = confidence.masked_fill(~masked, float("-inf")).topk(count).indices
        x[run[chosen]] = tokens[chosen]
        yield DenoisingStep(active, window, x.clone())

        now = nothing.clone()
        now[run[chosen]] = True
        masked = x == mask_id
        if refresh:
            window, fresh = ~masked | first_masks(masked, method.window_tokens), nothing
        else:
            fresh = fresh | now
        # What was just decoded runs once more, as its entries are still those of a mask; after the other steps of the
        # phase it stays active to its end.
        active = now | fresh | first_masks(masked, method.active_tokens)
        step += 1


class AppliedDiffusion(Applied):
    """Windowed denoising at work."""

    method: WindowDiffusion

    def __init__(self, method: WindowDiffusion, loaded: LoadedModel, mask_id: int) -> None:
        super().__init__(method, loaded)
        self.mask_id = mask_id
        self._report: Report | None = None

    def generate(self, **inputs: Any) -> torch.Tensor:
        """Fill ``max_new_tokens`` masks behind each prompt, one sample after the other.

        Args:
            inputs: ``input_ids [B, P]``, ``attention_mask`` (padding on the left), ``max_new_tokens``, ``do_sample``,
                ``temperature``, ``pad_token_id``.

        Returns:
            Ids ``[B, P + max_new_tokens]``.

        Raises:
            BadInput: a length is missing.
            Refused: other settings of generation.
        """
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
        length = inputs.pop("max_new_tokens", None)
        temperature = inputs.pop("temperature", 1.0) if inputs.pop("do_sample", False) else 0.0
        inputs.pop("pad_token_id", None)
        if inputs:
            raise Refused(f"{self.method.name} fills masks in parallel; leave out {', '.join(inputs)}")
        if not length:
            raise BadInput(f"{self.method.name} needs to know how many tokens to fill: give max_new_tokens")
        rows, steps, computed, total = [], 0, 0, 0
        for index, row in enumerate(ids):
            prompt = row if mask is None else row[mask[index].bool()]
            for done in denoise(self.model, self.method, prompt, length, self.mask_id, temperature):
                steps += 1
                computed += int(done.active.sum())
                total += len(done.tokens)
            rows.append(torch.cat((row, done.tokens[len(prompt) :])))
        self._report = Report(
            method=self.method.name,
            parameters=self.method.parameters(),
            unit="positions computed",
            kept=computed,
            total=total,
            facts={"denoising steps": steps, "tokens generated": length * len(rows)},
        )
        return torch.stack(rows)

    @property
    def report(self) -> Report:
        """Counters of the latest ``generate``; ``total`` is what denoising without a window computes."""
        if self._report is None:
            raise BadInput(f"{self.method.name} has nothing to report yet: call generate first")
        return self._report


@register("window-diffusion")
class WindowDiffusion(Method):
    """Denoises with a window and a cache that is refreshed from time to time."""

    phase: ClassVar[Phase] = "decoding"

    window_tokens: int = Field(64, ge=1, description="Masks whose keys and values are read (W).")
    active_tokens: int = Field(16, ge=1, description="Next masks that run in every step (A).")
    refresh_cycle: int = Field(
        32,
        ge=1,
        description="Steps of a phase, the first of which runs everything (R); 1 is plain denoising.",
    )
    steps: int | None = Field(None, ge=1, description="Denoising steps; default one per token.")
    mask_id: int | None = Field(None, ge=0, description="Id of the mask; default the config's mask_token_id.")

    def check(self, loaded: LoadedModel) -> None:
        """Refuse all but bidirectional decoders that know a mask."""
        anatomy = loaded.anatomy
        if anatomy.decoder is None or anatomy.decoder.head is None or anatomy.kind != "decoder":
            raise refuse(self, "a masked diffusion language model", anatomy.description)
        config = loaded.model.config
        if getattr(config, "is_causal", True):
            raise refuse(self, "a decoder whose config says is_causal = false", "causal attention")
        mask = self.mask_id if self.mask_id is not None else getattr(config, "mask_token_id", None)
        if mask is None or mask >= config.vocab_size:
            raise refuse(self, "a mask token (mask_id, or mask_token_id of the config)", str(mask).lower())

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedDiffusion:
        """Wrap generation. The model itself is not touched."""
        self.check(loaded)
        return AppliedDiffusion(
            self, loaded, loaded.model.config.mask_token_id if self.mask_id is None else self.mask_id
        )
