"""One streaming pass over calibration windows, layer by layer.

``stream`` runs a decoder one layer at a time over all calibration sequences: the outputs of a layer overwrite the
buffer of its inputs, so what lives at once is that buffer, one layer, and the activations of one small batch. Methods
say what they want to see with ``Watch``: the input of a linear layer or norm, or the input and output of a whole
layer. An observer receives one sequence at a time, padding removed, in float32, whatever the batch size and the
model's type, so recurrences over sequences do not depend on how the pass was batched.

With a ``prune`` callback the pass is sequential: each layer is pruned as soon as it is measured, and runs again to
give the next layer the inputs that the pruned model produces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from zoo.engines.stepping import evaluating, layer_arguments, moved, run_layer, to_device
from zoo.errors import BadInput, RunFailed
from zoo.models.anatomy import Decoder, DecoderLayer, LinearPart

Point = LinearPart | nn.Module | Literal["layer"]
"""What to watch: the input of a linear layer or module, or the input and the output of the whole decoder layer."""

Progress = Callable[[int, int], None]
"""Called with the number of finished steps and of all steps."""


class Observer(Protocol):
    """Something that accumulates over sequences."""

    def update(self, *activations: torch.Tensor) -> None:
        """Take in one sequence: ``[tokens, channels]`` float32 (for ``"layer"``: the input, then the output)."""


@dataclass(frozen=True)
class Watch:
    """An observer and the point of the layer it is attached to."""

    point: Point
    observer: Observer


# --- observers that several methods share -----------------------------------------------------------------------


class SquareSum:
    """Sum over the tokens of a sequence of squared activations, averaged over sequences: ``mean [channels]``.

    The statistic of Wanda and of what descends from it; ``sqrt(mean)`` is their activation norm.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.mean = torch.zeros(())

    def update(self, *activations: torch.Tensor) -> None:
        """``S <- S n/(n+1) + sum_t x_t^2 / (n+1)``."""
        (x,) = activations
        n = self.sequences
        self.mean = self.mean.to(x.device) * (n / (n + 1)) + x.square().sum(0) / (n + 1)
        self.sequences += 1


BlockMetric = Literal["angular", "cosine", "mse", "mae", "none"]


class BlockDistance:
    """How far a layer moves its tokens: ``total`` is the distance summed over all tokens, ``tokens`` their number.

    Metrics per token: ``angular`` = arccos(cos)/pi, ``cosine`` = 1 - cos, ``mse``, ``mae``; ``none`` counts a constant
    100 per sequence, so that every layer weighs the same.
    """

    def __init__(self, metric: BlockMetric) -> None:
        self.metric = metric
        self.total = 0.0
        self.tokens = 0

    def update(self, *activations: torch.Tensor) -> None:
        """Add one sequence."""
        before, after = activations
        self.tokens += before.shape[0]
        if self.metric == "none":
            self.total += 100.0
            return
        if self.metric in ("mse", "mae"):
            error = after - before
            distance = (error.square() if self.metric == "mse" else error.abs()).mean(-1)
        else:
            norms = before.norm(dim=-1) * after.norm(dim=-1)
            # A zero vector has no direction: count it as half-way. Rounding may push a cosine past 1, whose arccos
            # is NaN.
            cosine = ((before * after).sum(-1) / norms).nan_to_num(nan=0.5).clamp(-1, 1)
            distance = 1 - cosine if self.metric == "cosine" else cosine.arccos() / torch.pi
        self.total += float(distance.sum())


# --- the pass ---------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """Some sequences of the calibration set: rows of the buffer, valid tokens, and each layer's other arguments."""

    rows: slice
    valid: torch.Tensor | None
    arguments: list[dict[str, Any]]

    def tokens(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Valid tokens of each sequence of ``x [b, T, C]``, in float32."""
        for row, sequence in enumerate(x):
            yield (sequence if self.valid is None else sequence[self.valid[row].to(x.device)]).float()


def stream(
    decoder: Decoder,
    input_ids: torch.Tensor,
    observe: Callable[[DecoderLayer], Mapping[str, Watch]],
    *,
    attention_mask: torch.Tensor | None = None,
    batch: int = 8,
    device: torch.device | str | None = None,
    prune: Callable[[int, Mapping[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Observe every layer of ``decoder`` on calibration sequences.

    Args:
        decoder: the parts of a causal decoder; left as it was (unless ``prune`` changes it).
        input_ids: ``[sequences, tokens]``.
        observe: gives, for one layer, named observers and where they are attached.
        attention_mask: ``[sequences, tokens]``, 0 for padding (on either side); ``None`` when there is none.
        batch: sequences run at once. It changes speed and memory only.
        device: where layers run, one at a time; ``None`` for where the model is. Statistics stay on that device.
        prune: called with the layer's index and its filled observers once the layer is measured; it may replace the
            layer's parts. The layer then runs again, and later layers see the outputs of the pruned one.
        progress: called after each layer.

    Returns:
        For each layer, the observers by name.

    Raises:
        RunFailed: a layer produced NaN or infinite activations.
        BadInput: the ids are not ``[sequences, tokens]`` or not of this vocabulary.
    """
    _check_ids(decoder, input_ids)
    home = decoder.embed.weight.device
    target = torch.device(device) if device is not None else home
    seen: list[dict[str, Any]] = []
    with torch.no_grad(), evaluating(decoder.module):
        hidden, batches = _prepare(decoder, input_ids.to(home), attention_mask, batch)
        for index, layer in enumerate(decoder.layers):
            watches, last = observe(layer), index == len(decoder.layers) - 1
            with moved(layer.module, target):
                _run_layer(index, layer, watches, hidden, batches, target, keep=prune is None and not last)
                observers = {name: watch.observer for name, watch in watches.items()}
                if prune is not None:
                    prune(index, observers)
                    if not last:
                        _run_layer(index, layer, {}, hidden, batches, target, keep=True)
            seen.append(observers)
            if progress is not None:
                progress(index + 1, len(decoder.layers))
    return seen


def _check_ids(decoder: Decoder, input_ids: torch.Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.dtype not in (torch.int64, torch.int32):
        raise BadInput(
            "calibration ids must be integers [sequences, tokens], at least one of each; "
            f"given: {input_ids.dtype} {list(input_ids.shape)}"
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= decoder.embed.num_embeddings:
        raise BadInput(
            f"calibration ids lie between {low} and {high}, this model has {decoder.embed.num_embeddings} tokens; "
            "use its own tokenizer"
        )


def _prepare(
    decoder: Decoder, input_ids: torch.Tensor, mask: torch.Tensor | None, batch: int
) -> tuple[torch.Tensor, list[_Batch]]:
    """Embed all sequences ``[N, T, D]`` and record with what arguments each layer would be called."""
    count, length = input_ids.shape
    hidden = torch.empty(
        count, length, decoder.hidden_size, dtype=decoder.embed.weight.dtype, device=input_ids.device
    )
    if mask is not None:
        mask = mask.to(input_ids.device)
    batches: list[_Batch] = []
    unpadded: dict[int, list[dict[str, Any]]] = {}
    for start in range(0, count, batch):
        rows = slice(start, min(start + batch, count))
        ids = input_ids[rows]
        valid = None if mask is None or bool(mask[rows].all()) else mask[rows].bool()
        embedded, arguments = layer_arguments(decoder, ids, valid)
        hidden[rows] = embedded
        if valid is None:
            # Without padding the arguments depend on the shape alone: one set serves all batches.
            arguments = unpadded.setdefault(ids.shape[0], arguments)
        batches.append(_Batch(rows, valid, arguments))
    return hidden, batches


def _run_layer(
    index: int,
    layer: DecoderLayer,
    watches: Mapping[str, Watch],
    hidden: torch.Tensor,
    batches: Sequence[_Batch],
    device: torch.device,
    keep: bool,
) -> None:
    """Run one layer over all batches; with ``keep`` its outputs replace its inputs in ``hidden``."""
    whole = [watch.observer for watch in watches.values() if watch.point == "layer"]
    current = batches[0]
    with ExitStack() as undo:
        for watch in watches.values():
            if not isinstance(watch.point, str):
                module = watch.point.linear if isinstance(watch.point, LinearPart) else watch.point

                def see(
                    _: nn.Module, inputs: tuple[torch.Tensor, ...], observer: Observer = watch.observer
                ) -> None:
                    for x in current.tokens(inputs[0]):
                        observer.update(x)

                undo.callback(module.register_forward_pre_hook(see).remove)
        for current in batches:
            before = hidden[current.rows].to(device)
            after = run_layer(layer.module, before, to_device(current.arguments[index], device))
            finite = torch.isfinite(after).all(-1)
            if not bool((finite if current.valid is None else finite[current.valid.to(device)]).all()):
                raise RunFailed(
                    f"layer {index} produces NaN or infinite activations on the calibration text, so nothing was "
                    "pruned; load the model in float32 or bfloat16, and check that its weights are finite"
                )
            for observer in whole:
                for x, y in zip(current.tokens(before), current.tokens(after), strict=True):
                    observer.update(x, y)
            if keep:
                hidden[current.rows] = after.to(hidden.device)
