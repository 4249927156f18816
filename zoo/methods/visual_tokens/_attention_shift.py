"""Where the attention that text pays to visual tokens shifts, over the depth of a decoder.

The offline half of AdaptInfer (arXiv 2508.06084, section 3.3): the visual tokens that receive most are followed through
the layers, and each of their cumulative curves is broken in two. Layers where many curves break divide the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from zoo.engines.probes import Seen, tap_attention
from zoo.errors import BadInput
from zoo.models import LoadedModel


def shift_layers(
    loaded: LoadedModel, samples: Iterable[Mapping[str, Any]], number: int, share: float
) -> tuple[int, ...]:
    """The ``number`` layers behind which attention shifts most often, ascending.

    Args:
        loaded: a vision-language model, without hooks of other methods.
        samples: inputs of one sample each, as the processor makes them.
        number: of layers.
        share: of its visual tokens, those that receive most over all layers, whose curves count.

    Raises:
        BadInput: no sample, a padded or text-only one, or too few different shifts.
    """
    found = []
    for inputs in samples:
        received = received_per_layer(loaded, inputs)
        most = received.sum(0).topk(max(1, round(share * received.shape[1]))).indices
        found.append(change_points(received[:, most].T.cumsum(1)))
    if not found:
        raise BadInput("adaptinfer: the search needs at least one sample")
    assert loaded.anatomy.decoder is not None
    return peaks(torch.cat(found), number, len(loaded.anatomy.decoder.layers))


@torch.no_grad()
def received_per_layer(loaded: LoadedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Attention of the text after the image to each visual token, mean over heads and rows, ``[layers, N]`` float32."""
    anatomy = loaded.anatomy
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    numbers = torch.tensor(list(anatomy.visual_token_ids.values()), device=ids.device)
    visual = torch.isin(ids[0], numbers).nonzero().squeeze(-1)
    if len(ids) != 1 or (mask is not None and not bool(mask.all())) or not len(visual):
        raise BadInput("adaptinfer: the search takes one sample with a picture at a time, without padding")
    rows = torch.arange(min(int(visual[-1]) + 1, ids.shape[1] - 1), ids.shape[1], device=ids.device)
    found: list[torch.Tensor] = []

    def note(seen: Seen) -> None:
        found.append(seen.received(0, rows)[:, visual].mean(0) / len(rows))

    assert anatomy.decoder is not None
    assert anatomy.vlm is not None
    undo: list[Callable[[], None]] = []
    try:
        for layer in anatomy.decoder.layers:
            undo.append(tap_attention(layer.attention.module, note))
        anatomy.vlm(**{**inputs, "use_cache": False})
    finally:
        for detach in undo:
            detach()
    return torch.stack(found)


def change_points(curves: torch.Tensor) -> torch.Tensor:
    """Last layer in front of the one break that leaves the least squared deviation from the means of both sides.

    Args:
        curves: ``[n, layers]``.

    Returns:
        ``[n]``, from 0 to ``layers - 2``.
    """
    curves, length = curves.double(), curves.shape[1]
    size = torch.arange(1, length, device=curves.device)
    sums = curves.cumsum(1)
    left, whole = sums[:, :-1], sums[:, -1:]
    # The summed squares are the same for every break: only what the means explain differs.
    return (left.square() / size + (whole - left).square() / (length - size)).argmax(1)


def peaks(points: torch.Tensor, number: int, depth: int) -> tuple[int, ...]:
    """The ``number`` most frequent of ``points [n]``, ascending, at least an eighth of ``depth`` apart.

    Raises:
        BadInput: there are not so many.
    """
    frequency = points.bincount(minlength=depth)
    chosen: list[int] = []
    for layer in frequency.argsort(descending=True, stable=True).tolist():
        if frequency[layer] and all(abs(layer - other) >= max(1, depth // 8) for other in chosen):
            chosen.append(layer)
    if len(chosen) < number:
        raise BadInput(
            f"adaptinfer: attention shifts at layers {sorted(chosen)} only, and {number} are needed: give more samples"
        )
    return tuple(sorted(chosen[:number]))
