"""How much of the time that encoder methods save in theory they save in fact.

Run: ``python benchmarks/encoder.py [--quick] [--methods tome evit] [--models deit-ti vit-s vit-b] [--repeats 9]
[--json FILE]``.

Encoders of the shapes of DeiT-Ti/16, ViT-S/16 and ViT-B/16 with random weights see pictures of 224 pixels, dense
(fused attention) and with each method in turns (dense A B C, dense A B C ...), in processor time on one thread.
``gain`` is the median over the rounds of dense / method, with half its interquartile distance; ``bound`` the ratio of
FLOPs counted while both ran, so what a method spends on products of its own is in it; ``linear`` the gain if all work
were proportional to the tokens that reach the two halves of each block. ``eff`` is the gain over the bound, for ToMe
over the linear one, which merging should reach.

Budgets that leave everything in place show the cost (1 = none).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zoo.bench.environment import environment
from zoo.bench.flops import count_flops
from zoo.bench.record import Figure
from zoo.bench.timing import Version, Work, alternate, summarise
from zoo.errors import ZooError
from zoo.families.encoder_tokens import EncoderTokenReducer
from zoo.interface import implemented, method, method_class
from zoo.models import LoadedModel

CPU = torch.device("cpu")
SHAPES = {"deit-ti": (192, 3, 8), "vit-s": (384, 6, 4), "vit-b": (768, 12, 2)}
"""Width, heads, and pictures at once, chosen so that a dense pass takes a second or less."""

BUDGETS: dict[str, list[dict[str, Any]]] = {
    "tome": [{"r": r} for r in (0, 8, 13, 16)],
    "pitome": [{"keep_ratio": kept} for kept in (1.0, 0.95, 0.925, 0.9)],
    "gtp-vit": [{"propagated": count} for count in (0, 4, 8, 12)],
    "evit": [{"keep_ratio": kept} for kept in (1.0, 0.9, 0.7, 0.5)],
    "token-transforming": [{"keep_ratio": kept} for kept in (1.0, 0.9, 0.7, 0.5)],
    "zero-tprune": [
        {"duplicates": count, "retention": [1, kept, kept, kept, 1]}
        for count, kept in ((0, 1.0), (10, 0.9), (10, 0.8), (10, 0.7))
    ],
}
"""The first leaves every token in place. Methods that are not listed: ``KEEP_RATIOS``, or their defaults, once."""
KEEP_RATIOS = (1.0, 0.9, 0.7, 0.5)

LINEAR = {"tome"}
"""Methods that are held to the linear bound."""
AIM, LINEAR_AIM, COST = 0.85, 0.95, 0.02


def build(shape: str) -> LoadedModel:
    """An encoder with lively random weights: matrices of standard deviation ``fan_in ** -0.5``."""
    from transformers import DeiTConfig, DeiTModel, ViTConfig, ViTModel

    width, heads, _ = SHAPES[shape]
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    model: Any
    if shape.startswith("deit"):
        model = DeiTModel(DeiTConfig(**sizes), add_pooling_layer=False)
    else:
        model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                adds = "position_embedding" in name or name.endswith("_token")
                spread = 1.0 if adds else parameter[0].numel() ** -0.5
                parameter.normal_(0, spread, generator=generator)
    return LoadedModel(model.eval(), ref=shape)


def pictures(count: int) -> torch.Tensor:
    """Smooth areas and some noise, ``[count, 3, 224, 224]``."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic")
    return pixels + 0.1 * torch.randn(pixels.shape, generator=generator)


@contextmanager
def forward(
    loaded: LoadedModel, pixels: torch.Tensor, reducer: EncoderTokenReducer | None = None
) -> Iterator[Work]:
    """A version for ``alternate``: one pass of the encoder."""
    with torch.no_grad():
        if reducer is None:
            yield partial(loaded.model, pixel_values=pixels)
            return
        with reducer.apply(loaded) as applied:
            yield partial(applied, pixel_values=pixels)


@contextmanager
def work_by_tokens(loaded: LoadedModel) -> Iterator[list[int]]:
    """Sums up the tokens that reach the two halves of each block, each times the weights of that half."""
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    total = [0]
    handles = []
    for block in encoder.blocks:
        for norm, half in ((block.norm1, block.attention.module), (block.norm2, block.mlp)):
            weights = sum(parameter.numel() for parameter in half.parameters())

            def add(module: Any, args: Any, weights: int = weights) -> None:
                total[0] += weights * args[0].shape[1]

            handles.append(norm.register_forward_pre_hook(add))
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Row:
    """One method at one budget on one encoder. Times in milliseconds per pass of ``pictures`` pictures."""

    model: str
    method: str
    budget: dict[str, Any]
    pictures: int = 0
    kept: float | None = None
    skipped: str | None = None
    bound: float | None = None
    linear: float | None = None
    gain: Figure | None = None
    dense_ms: Figure | None = None
    own_ms: Figure | None = None

    @property
    def efficiency(self) -> float | None:
        """Realised over possible gain."""
        bound = self.linear if self.method in LINEAR else self.bound
        return None if self.gain is None or not bound else self.gain.median / bound

    def misses(self) -> str:
        """The aim that is missed, in words."""
        if self.gain is None or self.efficiency is None:
            return ""
        if self.kept == 1:
            cost = abs(self.gain.median - 1) > COST
            return f"costs {1 / self.gain.median - 1:+.1%}" if cost else ""
        aim = LINEAR_AIM if self.method in LINEAR else AIM
        return f"efficiency below {aim}" if self.efficiency < aim else ""


def budgets(slug: str, quick: bool) -> list[dict[str, Any]]:
    """The parameters of each row of a method."""
    if slug in BUDGETS:
        found = BUDGETS[slug]
    elif "keep_ratio" in method_class(slug).model_fields:
        found = [{"keep_ratio": kept} for kept in KEEP_RATIOS]
    else:
        found = [{}]
    return [found[0], found[-1]] if quick and len(found) > 2 else found


class Bench:
    """All methods on one encoder."""

    def __init__(self, shape: str, repeats: int) -> None:
        self.shape, self.repeats = shape, repeats
        self.loaded = build(shape)
        self.pixels = pictures(SHAPES[shape][2])
        self.flops, self.tokens = self._look(None)

    def _look(self, reducer: EncoderTokenReducer | None) -> tuple[int, int]:
        """FLOPs of one pass (which also warms up), and its work if that went by tokens alone."""
        with forward(self.loaded, self.pixels, reducer) as work, work_by_tokens(self.loaded) as tokens:
            return count_flops(work), tokens[0]

    def measure(self, slug: str, quick: bool) -> list[Row]:
        """One row per budget, all timed in turns with the dense encoder."""
        rows: list[Row] = []
        versions: dict[str, Version] = {"dense": partial(forward, self.loaded, self.pixels)}
        timed: dict[str, Row] = {}
        for number, budget in enumerate(budgets(slug, quick)):
            row = Row(self.shape, slug, budget, len(self.pixels))
            rows.append(row)
            try:
                reducer = method(slug, **budget)
                if not isinstance(reducer, EncoderTokenReducer):
                    raise ZooError("it does not act inside a vision encoder")
                flops, tokens = self._look(reducer)
            except ZooError as error:
                row.skipped = str(error)
                continue
            row.bound, row.linear, row.kept = self.flops / flops, self.tokens / tokens, tokens / self.tokens
            versions[str(number)] = partial(forward, self.loaded, self.pixels, reducer)
            timed[str(number)] = row
        samples = alternate(versions, CPU, repeats=self.repeats) if timed else {}
        for name, row in timed.items():
            pairs = zip(samples["dense"].seconds, samples[name].seconds, strict=True)
            row.gain = summarise([dense / own for dense, own in pairs])
            row.dense_ms, row.own_ms = samples["dense"].figure(1000), samples[name].figure(1000)
        return rows


HEAD = (
    f"{'model':9}{'method':27}{'budget':38}{'tokens':>8}{'ms':>8}{'gain':>14}{'bound':>7}{'linear':>8}{'eff':>6}"
    "  misses"
)


def print_row(row: Row) -> None:
    """One line."""
    budget = ", ".join(f"{name}={value}" for name, value in row.budget.items())
    if row.gain is None or row.own_ms is None or row.efficiency is None:
        print(f"{row.model:9}{row.method:27}{budget:38}  skipped: {row.skipped}", flush=True)
        return
    gain = f"{row.gain.median:.3f} ±{row.gain.spread or 0:.3f}"
    print(
        f"{row.model:9}{row.method:27}{budget:38}{row.kept:8.1%}{row.own_ms.median:8.0f}{gain:>14}{row.bound:7.2f}"
        f"{row.linear:8.2f}{row.efficiency:6.2f}  {row.misses()}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", help="slugs (default: all encoder-token methods)")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="three rounds, two budgets per method")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    slugs = options.methods or [
        slug for slug in implemented() if method_class(slug).phase == "encoder-tokens"
    ]
    print(HEAD)
    rows: list[Row] = []
    for shape in options.models:
        bench = Bench(shape, 3 if options.quick else options.repeats)
        for slug in slugs:
            fresh = bench.measure(slug, options.quick)
            for row in fresh:
                print_row(row)
            rows += fresh
    if options.json:
        figures = [{**asdict(row), "efficiency": row.efficiency} for row in rows]
        body = {"environment": environment("cpu", "sdpa"), "rows": figures}
        options.json.write_text(json.dumps(body, indent=2, default=Figure.model_dump), encoding="utf-8")


if __name__ == "__main__":
    main()
