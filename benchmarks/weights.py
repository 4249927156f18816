"""What weight pruning costs in quality and brings in speed: every method, several sparsities, one real small LLM.

Run: ``python benchmarks/weights.py [--methods flap wanda-sp] [--sparsity 0.1 0.2 0.3 0.5] [--out FILE] [--table]``.

Every cell is what ``zoo run METHOD --set sparsity=S`` does: prune with calibration text, then perplexity and agreement
with the dense model on held-out text, and prefill and decode timed in turns with the dense model (processor time, one
thread, medians). Pruning itself is timed too, with its peak memory above the model's own (Linux). Cells are appended
to FILE as they finish, one JSON line each in the form of ``taxonomy/measurements``; those already in it with the same
settings are not run again, so Ctrl-C loses at most one cell. ``--table`` only prints what FILE holds.

Below the table stand the orders that must hold (calibrated beats magnitude, FLAP and CFSP beat Wanda-sp from 20% on),
and whether they do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from result_rows import append, finished
from rich.console import Console
from rich.table import Table

from taxonomy.runs import Run
from zoo.bench.memory import peak_resident
from zoo.bench.settings import Settings
from zoo.errors import ZooError
from zoo.interface import implemented, method_class
from zoo.models import LoadedModel
from zoo.runner import run, stored_form

MODEL = "smollm2-135m"
SPARSITIES = (0.1, 0.2, 0.3, 0.5)
SETTINGS = Settings(repeats=3, seconds=5, new_tokens=4, windows=8, window=256, prompt=128)

FIXED: dict[str, list[dict[str, Any]]] = {
    "laco": [{"threshold": threshold} for threshold in (0.9, 0.75, 0.6)],
    "armor": [{"iterations": 20}],
    "layer-lottery": [{"weights": "given", "criterion": "snip", "sparsity": s} for s in SPARSITIES],
}
"""Methods whose budget is not a free fraction: the cells that are run instead."""

SMALLER: dict[str, dict[str, Any]] = {
    "sleb": {"windows": 2},
    "blockpruner": {"windows": 1},
    "tyr-the-pruner": {
        "levels": 5,
        "rounds": 1,
        "generations": 4,
        "offspring": 6,
        "tokens": (256, 512, 1024),
        "survivors": (2, 1),
    },
    "tracenas": {"windows": 4, "population": 8, "elites": 3, "iterations": 3},
}
"""Searches made for GPUs, scaled to minutes on two cores. The parameters stand in every record."""

ORDERS = (
    [(better, "magnitude-sp", 0.1) for better in ("flap", "cfsp", "wanda-sp")]
    + [(better, "wanda-sp", 0.2) for better in ("flap", "cfsp")]
    + [("sparsegpt", "wanda", 0.5), ("owl", "wanda", 0.5)]
)
"""(lower perplexity, higher perplexity, from this sparsity on)."""


def cells(methods: list[str], sparsities: list[float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All (method, parameters) of the sweep, small sparsities first."""
    for sparsity in sparsities:
        for slug in methods:
            if slug not in FIXED:
                yield slug, {**SMALLER.get(slug, {}), "sparsity": sparsity}
    for slug in methods:
        for parameters in FIXED.get(slug, []):
            yield slug, parameters


def measure(slug: str, parameters: dict[str, Any], loaded: LoadedModel, windows: int) -> dict[str, Any]:
    """One cell: a run in the catalogue's form, with what pruning took added."""
    marks: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("pruning"):
            marks.setdefault("before", peak_resident(reset=True))
        elif "before" in marks:
            marks.setdefault("peak", peak_resident())

    record = run(
        slug,
        loaded,
        parameters=parameters,
        calibration_windows=windows,
        store=False,
        settings=SETTINGS,
        progress=progress,
    )
    row = stored_form(record)
    seconds = float(record.reports[0].facts["pruning seconds"])
    row["measurements"].append(_figure("pruning-time", "s", seconds))
    if marks.get("before"):
        above = (marks["peak"] - marks["before"]) / 1e6
        row["measurements"].append(_figure("pruning-memory", "MB", above))
    report = record.reports[0]
    row["measurements"].append(_figure("removed", "1", 1 - report.kept / report.total))
    return row


def _figure(quantity: str, unit: str, value: float) -> dict[str, Any]:
    return {
        "task": "pruning",
        "quantity": quantity,
        "arm": "method",
        "unit": unit,
        "median": round(value, 4),
        "spread": None,
        "n": 1,
    }


def value(row: dict[str, Any], quantity: str, arm: str = "method") -> float | None:
    """A figure of a row, or ``None``."""
    for measured in row["measurements"]:
        if measured["quantity"] == quantity and measured["arm"] == arm:
            return float(measured["median"])
    return None


def sparsity(row: dict[str, Any]) -> float:
    """The budget that was asked for; what was really removed where the method has no such parameter."""
    asked = row["parameters"].get("sparsity")
    return float(asked) if asked is not None else round(value(row, "removed") or 0.0, 2)


def table(rows: list[dict[str, Any]]) -> Table:
    """All finished cells, by sparsity and perplexity."""
    out = Table(title=f"Weight pruning of {rows[0]['model']} ({rows[0]['environment']['hardware']})")
    columns = (
        "sparsity",
        "method",
        "removed",
        "perplexity",
        "agreement",
        "KL",
        "prefill",
        "of",
        "decode",
        "of",
    )
    for name in (*columns, "predicted", "pruning s", "peak MB"):
        out.add_column(name, justify="left" if name == "method" else "right")
    last: float | None = None
    for row in sorted(rows, key=lambda row: (sparsity(row), value(row, "perplexity") or float("inf"))):
        if last is not None and sparsity(row) != last:
            out.add_section()
        last = sparsity(row)
        kept = 1 - (value(row, "removed") or 0.0)
        keeps_shapes = (value(row, "parameters", "ratio") or 1.0) <= 1.0
        predicted = None if keeps_shapes else 1 / kept
        figures = [
            (value(row, "removed"), ".1%"),
            (value(row, "perplexity"), ".1f"),
            (value(row, "agreement"), ".3f"),
            (value(row, "kl"), ".3f"),
            *(
                (value(row, name, "ratio"), ".2f")
                for name in ("prefill-time", "prefill-time-bound", "decode-speed", "decode-speed-bound")
            ),
            (predicted, ".2f"),
            (value(row, "pruning-time"), ".0f"),
            (value(row, "pruning-memory"), ".0f"),
        ]
        shown = ["-" if number is None else format(number, form) for number, form in figures]
        out.add_row(f"{sparsity(row):.0%}", row["method"], *shown)
    return out


def orders(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line per expected order that can be checked."""
    found = {(row["method"], sparsity(row)): value(row, "perplexity") for row in rows}
    for better, worse, start in ORDERS:
        for budget in sorted({budget for _, budget in found}):
            low, high = found.get((better, budget)), found.get((worse, budget))
            if budget >= start and low is not None and high is not None:
                sign = "ok" if low < high else "NOT SO"
                yield f"{sign:6} {budget:.0%}: {better} {low:.1f} < {worse} {high:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="default: every weight method")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of 128 tokens")
    parser.add_argument("--out", type=Path, default=Path("weights.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    options = parser.parse_args()
    console = Console(width=150)
    slugs = options.methods or [slug for slug in implemented() if method_class(slug).phase == "weights"]
    if not options.table:
        sweep(console, slugs, options)
    rows = [row for row in finished(options.out) if row["status"] == "done"]
    if rows:
        console.print(table(rows))
        for line in orders(rows):
            console.print(line, highlight=False)


def sweep(console: Console, slugs: list[str], options: argparse.Namespace) -> None:
    """Run what is missing from the file."""
    from zoo.models import load_model

    done = {
        (row["method"], json.dumps(row["inputs"]["asked"], sort_keys=True)) for row in finished(options.out)
    }
    loaded = load_model(options.model)
    for slug, parameters in cells(slugs, options.sparsity):
        asked = {**parameters, "windows": options.windows}
        if (slug, json.dumps(asked, sort_keys=True)) in done:
            continue
        start = time.perf_counter()
        try:
            row = measure(slug, parameters, loaded, options.windows)
        except ZooError as error:
            console.print(f"{slug} {parameters}: {error}", style="red")
            continue
        row["inputs"]["asked"] = asked
        Run.from_json(row)  # what is kept must be fit for the catalogue
        append(options.out, [row])
        figure = value(row, "perplexity")
        took = time.perf_counter() - start
        console.print(f"{slug} {parameters}: perplexity {figure:.1f}, {took:.0f} s", highlight=False)


if __name__ == "__main__":
    main()
