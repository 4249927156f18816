"""How much of the prefill that visual-token methods save in theory they save in fact, and what choosing costs.

Run: ``python benchmarks/visual_tokens.py [--quick] [--methods divprune fastv] [--keep 0.5 0.25 0.11 1]
[--repeats 5] [--part prefill selection] [--json FILE]``.

**prefill**: a LLaVA-shaped model with random weights (CLIP-L-shaped encoder, 576 visual tokens, decoder of 16 layers x
1024; options shrink it) reads one picture and a question, dense and with each method in turns (dense A B C, dense A B
C ...), in processor time on one thread. Two spans of the same runs are timed: *LLM* begins where the language model is
entered, behind encoder and projector, and holds what the methods do (except where they shorten the encoder itself);
*whole* is everything. ``gain`` is dense / reduced, ``bound`` the same ratio of FLOPs counted while they ran,
``eff`` = gain / bound, each with half its interquartile distance. Selection is the time inside the methods' own rules;
``share`` is what it makes of the time that the method saves. With ``--keep 1`` the logits must equal the dense ones bit
by bit, and ``gain`` shows the cost (1 = none). The row ``(shorter prompt)`` is the language model alone on so many
tokens less: what is missing from 1 there, no before-LLM method can reach on this machine.

All methods get the same ``keep_ratio``, whatever they make of it: ``kept`` is what was left, mean over decoder layers.
Methods without that parameter run once, with their defaults.

**selection**: the greedy rules alone, 64 of 2880 vectors of width 1024, beside plain translations of their definitions
(the full matrix, then a loop over slices of it). Picks that differ are an error.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from visual_tokens_prefill import measure_prefill
from visual_tokens_rules import SPEED, measure_rules

from zoo.bench.environment import environment
from zoo.bench.record import Figure
from zoo.errors import ZooError
from zoo.families.visual_tokens import VisualTokenReducer
from zoo.interface import implemented, method_class


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", help="slugs (default: all visual-token methods)")
    parser.add_argument(
        "--keep", nargs="+", type=float, default=[0.5, 0.25, 0.11, 1], help="values of keep_ratio"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument(
        "--part", nargs="+", choices=["prefill", "selection"], default=["prefill", "selection"]
    )
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--width", type=int, default=1024, help="decoder width, in steps of 64")
    parser.add_argument("--encoder-layers", type=int, default=24)
    parser.add_argument("--encoder-width", type=int, default=1024, help="in steps of 64")
    parser.add_argument("--quick", action="store_true", help="encoder 8 x 256, decoder 16 x 512, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.encoder_layers, arguments.encoder_width, arguments.width = 8, 256, 512
        arguments.repeats = 3
    try:
        arguments.methods = [
            slug
            for slug in dict.fromkeys(arguments.methods or implemented())
            if issubclass(method_class(slug), VisualTokenReducer)
        ]
    except ZooError as error:
        parser.error(str(error))
    if not arguments.methods or not all(0 < keep <= 1 for keep in arguments.keep):
        parser.error("--methods takes visual-token methods, --keep numbers above 0 and at most 1")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"environment": environment("cpu", "sdpa")}
    missed: list[str] = []
    if "prefill" in arguments.part:
        rows = measure_prefill(arguments)
        found["prefill"] = [
            {**as_json(row), "efficiency": row.efficiency, "share": row.share} for row in rows
        ]
        missed += [
            f"{row.method} at {row.keep_ratio or 'own'}: {miss}" for row in rows for miss in row.misses()
        ]
    if "selection" in arguments.part:
        speeds = measure_rules(arguments.repeats, tokens=2880, count=64, width=1024)
        found["selection"] = [as_json(speed) for speed in speeds]
        missed += [
            f"{speed.rule}: {speed.speed_up.median:.1f}x < {SPEED:g}x"
            for speed in speeds
            if speed.speed_up.median < SPEED
        ]
    print("\nAims missed:" if missed else "\nAll aims are met.")
    print("".join(f"  {miss}\n" for miss in missed), end="")
    if arguments.json is not None:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        text = json.dumps({"settings": settings, **found}, indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")


def as_json(record: Any) -> dict[str, Any]:
    """A dataclass of figures as JSON values."""
    return {
        name: value.model_dump() if isinstance(value, Figure) else value
        for name, value in vars(record).items()
    }


if __name__ == "__main__":
    main()
