"""What verifying ``n`` positions at once costs on this model and device: measured once, kept, interpolated.

A pass over a few positions is all but free where reading the weights takes longer than multiplying with them (a large
GPU), and far from free on a CPU, where it does not even grow steadily: matrix kernels like some widths better than
narrower ones. How many draft tokens are worth verifying follows from that curve.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64)
CONTEXTS = (64, 1024)
"""Tokens in the cache. Attention to the cache makes passes dearer as it grows, in proportion."""
ROUNDS = 6
"""Passes per width and context, unless that takes long."""
PATIENCE = 5.0
"""Seconds per context after which no further round begins; the first round stops there too, at the width it is at."""
FEWEST = 8
"""Widths that are measured however long it takes."""
_PROTOCOL = 1


@dataclass(frozen=True)
class VerificationCost:
    """Seconds of a forward pass by new positions and cached tokens.

    Attributes:
        widths: numbers of new positions, ascending, from 1.
        contexts: numbers of cached tokens, ascending.
        seconds: ``[contexts][widths]``.
    """

    widths: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __call__(self, width: int, context: int) -> float:
        """Seconds of a pass over ``width`` new positions behind ``context`` tokens.

        Interpolated linearly; beyond the widest and the longest measured it goes on with the last slope.
        """
        return _line(context, self.contexts, [_line(width, self.widths, row) for row in self.seconds])


def _line(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    if len(xs) > 1 and x > xs[-1]:
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        return ys[-1] + max(0.0, slope) * (x - xs[-1])
    return float(np.interp(x, xs, ys))


def steady_clock(model: Any) -> Callable[[], float]:
    """Seconds: processor time on one thread of a CPU, which other processes disturb less, else the wall clock."""
    return process_time if model.device.type == "cpu" and torch.get_num_threads() == 1 else perf_counter


def verification_cost(model: Any, *, refresh: bool = False) -> VerificationCost:
    """The curve of ``model`` where it is now: from the zoo's cache folder, else measured (some seconds) and kept.

    Args:
        model: a causal language model of transformers.
        refresh: measure anew, after a change of driver or clock rate, say.
    """
    from zoo.models.packages import home

    facts = _identity(model)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    file = home() / "verification-cost" / f"{digest[:16]}.json"
    if not refresh and (kept := _read(file)) is not None:
        return kept
    print("measuring what verification costs, once for this model and device ...", file=sys.stderr)
    cost = measure(model)
    with suppress(OSError):  # where nothing can be kept it is measured again the next time
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"of": facts, **asdict(cost)}, indent=1), encoding="utf-8")
        partial.replace(file)
    return cost


def _read(file: Path) -> VerificationCost | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        seconds = tuple(tuple(float(value) for value in row) for row in kept["seconds"])
        return VerificationCost(tuple(kept["widths"]), tuple(kept["contexts"]), seconds)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not what was written: measured anew


def _identity(model: Any) -> dict[str, Any]:
    """What the curve depends on. Names are no part of it, so that a copy of a model shares the curve."""
    from zoo.bench.environment import cpu_name

    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    cuda = model.device.type == "cuda"
    return {
        "protocol": _PROTOCOL,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "device": torch.cuda.get_device_name(model.device) if cuda else f"{model.device.type}, {cpu_name()}",
        "threads": None if cuda else torch.get_num_threads(),
        "torch": torch.__version__,
    }


@torch.no_grad()
def measure(
    model: Any,
    *,
    widths: Sequence[int] = WIDTHS,
    contexts: Sequence[int] = CONTEXTS,
    clock: Callable[[], float] | None = None,
) -> VerificationCost:
    """Time passes (with the choice of the likeliest tokens) over every width, in turns; the median of the quick half.

    Of a slow model the widest passes are left out.

    Args:
        model: a causal language model of transformers.
        widths, contexts: what to measure; contexts that the model has no positions for are left out.
        clock: seconds; ``None`` is ``steady_clock``.
    """
    clock = clock or steady_clock(model)
    text = model.config.get_text_config(decoder=True)
    room = (getattr(text, "max_position_embeddings", None) or max(contexts) + max(widths)) - max(widths)
    fitting = [context for context in contexts if context <= room] or [max(1, room // 2)]
    seconds: list[tuple[float, ...]] = []
    used: list[int] = []
    for context in fitting:
        cache = _filled_cache(model, context)
        length = cache.get_seq_length()
        if length in used:  # sliding windows are measured at one length
            continue
        used.append(length)
        _timed_pass(model, cache, length, min(widths), clock)
        rounds: list[list[float]] = []
        begun = clock()
        while not rounds or (len(rounds) < ROUNDS and clock() - begun < PATIENCE):
            times: list[float] = []
            for width in widths[: len(rounds[0]) if rounds else None]:
                if not rounds and len(times) >= FEWEST and clock() - begun > PATIENCE:
                    break
                times.append(_timed_pass(model, cache, length, width, clock))
            rounds.append(times)
        # On a busy machine the slow passes tell of the others' work.
        quick = [sorted(times)[: (len(times) + 1) // 2] for times in zip(*rounds, strict=True)]
        seconds.append(tuple(statistics.median(times) for times in quick))
    common = min(map(len, seconds))
    return VerificationCost(tuple(widths[:common]), tuple(used), tuple(row[:common] for row in seconds))


def _filled_cache(model: Any, context: int) -> Any:
    """A cache of ``context`` tokens; beyond the first few they are copies, since only their number costs time."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    read = min(context, 32)
    model(input_ids=_some_ids(model, read), past_key_values=cache, use_cache=True)
    cache.activate_past_recording()
    if not any(cache.is_sliding):
        for layer in cache.layers:
            repeats = [1, 1, -(-context // read), 1]
            layer.keys = layer.keys.repeat(repeats)[:, :, :context]
            layer.values = layer.values.repeat(repeats)[:, :, :context]
    return cache


def _some_ids(model: Any, count: int) -> torch.Tensor:
    """Ids ``[1, count]`` all over the vocabulary, so that the experts of a mixture are used as by text."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(count, device=model.device) * 7919 % vocabulary).unsqueeze(0)


def _timed_pass(model: Any, cache: Any, context: int, width: int, clock: Callable[[], float]) -> float:
    ids = _some_ids(model, width)
    positions = torch.arange(context, context + width, device=model.device).unsqueeze(0)
    start = clock()
    logits = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
    logits.float().argmax(-1).tolist()  # waits for the device, as the loop does
    cache.crop(-width)
    return clock() - start
