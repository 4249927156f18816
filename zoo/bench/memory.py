"""Bytes: of weights, of caches, of what a decode step must read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.models.anatomy import Decoder


def parameter_count(model: nn.Module) -> int:
    """Parameters, shared ones (tied embeddings) once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def cache_bytes(cache: Any) -> list[int]:
    """Bytes of keys and values in each layer of a transformers cache, as stored (not what it could hold)."""
    sizes = []
    for layer in cache.layers:
        held = [tensor for tensor in (layer.keys, layer.values) if isinstance(tensor, torch.Tensor)]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in held))
    return sizes


def bytes_per_decode_step(decoder: Decoder, cached: int = 0) -> int:
    """Bytes one greedy step at batch 1 must read: weights of layers and head, one embedding row, the cache.

    The input embedding is a table of which one row is read; when it is tied to the head, the head reads all of it.

    Args:
        decoder: the decoder, with its head.
        cached: bytes of the KV cache at that step.
    """
    body = parameter_bytes(decoder.module) - parameter_bytes(decoder.embed)
    row = decoder.embed.embedding_dim * decoder.embed.weight.element_size()
    head = 0 if decoder.head is None else parameter_bytes(decoder.head)
    return body + row + head + cached


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int:
    """Most memory allocated on a CUDA ``device`` while ``work`` runs."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


def peak_resident(*, reset: bool = False) -> int:
    """Most main memory this process has held, in bytes; 0 where the system does not tell.

    Args:
        reset: forget the peak first (Linux), so that the next call tells the peak since this one.
    """
    status = Path("/proc/self/status")
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux, or not permitted
    return 0
