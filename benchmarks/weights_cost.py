"""What FLAP and CFSP cost: time against plain forward passes over the same tokens, memory above the model's own.

Run: ``python benchmarks/weights_cost.py [--model NAME] [--windows 128] [--length 128] [--rounds 3]``.

Time is processor time of one thread, medians of rounds in which forward passes and prunings take turns; two passes plus
20% is the limit. Memory is every byte that tensors hold while the model is pruned in place, counted at the peak, less
the model's own; the limit is the weights of two layers, the hidden states of the calibration windows, which wait for
the next layer, and what one layer holds while it runs on one batch.
"""

from __future__ import annotations

import argparse
import gc
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zoo
from zoo.engines.surgery import share_parameters
from zoo.families.weights import batch_of
from zoo.models import LoadedModel

METHODS = ("flap", "cfsp")
SPARSITY = 0.2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, those of ``tensors`` among them; ``peak`` is the most there were."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.live = self.peak = 0
        for tensor in tensors:
            self._add(tensor)
        self.start = self.peak = self.live

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.seen:
            self.seen[id(storage)] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, id(storage))

    def _drop(self, key: int) -> None:
        self.live -= self.seen.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._add(leaf)
        return result

    @property
    def above(self) -> int:
        """Bytes at the peak beyond those at the start."""
        return self.peak - self.start


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of ``work``."""
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.no_grad()
def forward(loaded: LoadedModel, windows: torch.Tensor) -> None:
    """One plain pass over all windows, in the batches that pruning uses."""
    for rows in windows.split(batch_of(windows)):
        loaded.model(input_ids=rows, use_cache=False)


def time_ratios(loaded: LoadedModel, windows: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median time of pruning over that of a forward pass, by method."""
    plain: list[float] = []
    spent: dict[str, list[float]] = {slug: [] for slug in METHODS}
    for _ in range(rounds):
        plain.append(seconds(lambda: forward(loaded, windows)))
        for slug, times in spent.items():
            times.append(
                seconds(partial(zoo.method(slug, sparsity=SPARSITY).apply, loaded, calibration=windows))
            )
    return {slug: median(times) / median(plain) for slug, times in spent.items()}


def peak_above(loaded: LoadedModel, work: Callable[[LoadedModel], Any]) -> int:
    """Bytes that ``work`` needs above those of the model it is given, which it may change."""
    own = LoadedModel(share_parameters(loaded.model), loaded.processor)
    for parameter in own.model.parameters():
        parameter.data = parameter.data.clone()
    gc.collect()
    with LiveBytes((*own.model.parameters(), *own.model.buffers())) as live:
        work(own)
    return live.above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = zoo.load_model(options.model, device="cpu", dtype="float32")
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    windows = torch.randint(
        5, decoder.embed.num_embeddings, (options.windows, options.length), generator=torch.manual_seed(0)
    )
    layer = max(sum(part.weight.numel() for part in layer.linears) for layer in decoder.layers) * 4
    waiting = windows.numel() * decoder.hidden_size * 4
    rows = windows[: batch_of(windows)]
    with torch.no_grad():
        running = peak_above(loaded, lambda own: own.model.model(input_ids=rows, use_cache=False))
    limit = 2 * layer + waiting + running
    print(f"{options.model}, {options.windows} x {options.length} tokens, sparsity {SPARSITY}")
    print(
        f"two layers' weights {2 * layer / 1e6:.1f} MB, hidden states of all windows {waiting / 1e6:.1f} MB, "
        f"one batch running {running / 1e6:.1f} MB"
    )
    for slug in METHODS:
        prune = partial(zoo.method(slug, sparsity=SPARSITY).apply, calibration=windows, inplace=True)
        above = peak_above(loaded, prune)
        print(f"{slug:5} memory above the model {above / 1e6:7.1f} MB = {above / limit:.2f} of the limit")
    for slug, ratio in time_ratios(loaded, windows, options.rounds).items():
        print(f"{slug:5} time {ratio:.2f} forward passes (limit 2.4)")


if __name__ == "__main__":
    main()
