"""How catalogue and site grow: builds, queries and pages at 200, 1,000 and 10,000 methods, up to a million figures.

Run: ``python benchmarks/catalogue.py [--methods 200 1000 10000] [--figures 100] [--repeat 15]``. Synthetic catalogues
are made from the real cards under new names, with 100 figures per method: runs of 20 figures on 50 models. The first
table is what grows with the catalogue: process seconds, helping processes included, and for the site's first build also
seconds by the clock; each column should be linear. The second is the time of every reading command's query (median of
``--repeat``, warm, in milliseconds; opening the file included for those that open it themselves), beside its aim. Each
size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODELS = 50
FIGURES_PER_RUN = 20
LIST, QUERY, SITE = 10.0, 50.0, 10.0
"""Aims: a filtered list and any other query in milliseconds; the site of 10,000 methods in seconds."""


def cards(count: int) -> dict[str, Any]:
    """The real cards under new names, each referring to those of its own copy."""
    from taxonomy.card import load_cards

    real = load_cards()
    made = {}
    for number, card in enumerate(islice(cycle(real.values()), count)):
        copy = number // len(real)
        if copy:
            renamed = {"slug": f"{card.slug}-{copy}", "name": f"{card.name} {copy}"}
            card = card.model_copy(
                update={**renamed, "related": tuple(f"{slug}-{copy}" for slug in card.related)}
            )
        made[card.slug] = card
    return {
        slug: card.model_copy(update={"related": tuple(other for other in card.related if other in made)})
        for slug, card in made.items()
    }


def runs(slugs: list[str], figures: int) -> Iterator[Any]:
    """Runs of ``FIGURES_PER_RUN`` figures until every method has about ``figures``, models in turn."""
    from taxonomy.catalog import Measurement, Run

    plain = ("prefill-time", "decode-speed", "weight-bytes", "kv-bytes", "flops")
    for number in range(len(slugs) * figures // FIGURES_PER_RUN):
        gain, kept = 1 + (number * 37 % 97) / 97, 1 - (number * 53 % 89) / 300
        measured = [
            Measurement(quantity, arm, "1", value, 0.01, 5, "task")
            for quantity in plain
            for arm, value in (("dense", gain), ("method", 1.0), ("ratio", gain))
        ]
        measured += [
            Measurement("perplexity", arm, "1", value, None, 1, "news")
            for arm, value in (("dense", kept), ("method", 1.0), ("ratio", kept))
        ]
        measured += [
            Measurement("agreement", "method", "1", kept, None, 1, "news"),
            Measurement("prefill-time-bound", "ratio", "1", gain + 0.1, None, 1, "task"),
        ]
        moment = datetime(2020, 1, 1, tzinfo=timezone.utc) + timedelta(minutes=number)
        yield Run(
            method=slugs[number % len(slugs)],
            model=f"model-{(number + number // len(slugs)) % MODELS}",
            started=moment.isoformat(),
            seconds=1.0,
            environment={"hardware": f"machine {number % 3}"},
            parameters={"sparsity": (number // len(slugs)) % 10 / 10},
            model_facts={"architecture": "llama"},
            measurements=tuple(measured),
            key=f"{number:032x}",
        )  # fmt: skip


def queries_of(db: Any, catalog: Path) -> dict[str, tuple[Callable[[], Any], float]]:
    """What each reading command asks, with its aim in milliseconds."""
    from taxonomy import evidence, queries
    from taxonomy.runs import results

    conditions: dict[str, Any] = {"where": [["before-llm"]], "training": [["none"]]}
    return {
        "find, 3 conditions": (
            lambda: queries.find(db, include=conditions, properties={"needs_attention_maps": False}),
            LIST,
        ),
        "list --family": (lambda: queries.list_methods(db, family="kv-cache"), LIST),
        "list": (lambda: queries.list_methods(db), QUERY),
        "search": (lambda: queries.search(db, "attention heads"), QUERY),
        "show": (lambda: queries.show(db, "flap"), QUERY),
        "compare": (lambda: queries.compare(db, ["flap", "cfsp", "fastv"]), QUERY),
        "papers": (lambda: queries.papers(db, "token merging"), QUERY),
        "taxonomy tree": (lambda: queries.tree(db), QUERY),
        "taxonomy matrix": (lambda: queries.matrix(db), QUERY),
        "taxonomy gaps": (lambda: queries.gaps(db), QUERY),
        "taxonomy terms": (lambda: queries.terms(db), QUERY),
        "results": (lambda: results(), QUERY),
        "results METHOD": (lambda: results("flap"), QUERY),
        "results --model": (lambda: results(model="model-7"), QUERY),
        "results --quantity": (lambda: results(quantity="perplexity"), QUERY),
        "pareto --model --family": (lambda: evidence.pareto(db, model="model-7", family="kv-cache"), QUERY),
        "pareto --family": (lambda: evidence.pareto(db, family="kv-cache"), QUERY),
        "recommend, measured": (lambda: evidence.recommend(db, "model-7", "prefill", 0.02), QUERY),
        "recommend, like": (lambda: evidence.recommend(db, "meta-llama/x", "prefill", 0.02), QUERY),
    }


def measure(methods: int, figures: int, repeat: int) -> dict[str, Any]:
    """Build one synthetic catalogue and site, and time what is asked of them."""
    from taxonomy import paths, queries
    from taxonomy.bibliography import load_bibliography
    from taxonomy.catalog import Sources, build
    from taxonomy.site import build as build_site

    with tempfile.TemporaryDirectory() as folder:
        catalog, out = Path(folder) / "catalog.sqlite", Path(folder) / "site"
        os.environ["ZOO_CATALOG"] = str(Path(folder) / "own.sqlite")
        paths.catalog_file = lambda: catalog
        known = cards(methods)
        sources = Sources(known, load_bibliography(), list(runs(list(known), figures)), (), frozenset(known))
        times = [spent()]
        build(sources, catalog)
        times.append(spent())
        written = build(sources, catalog)
        times.append(spent())
        assert not written, "an unchanged catalogue was written again"
        asked = {}
        with queries.open_catalog(catalog) as db:
            for name, (ask, aim) in queries_of(db, catalog).items():
                ask()
                asked[name] = (statistics.median(seconds(ask) for _ in range(repeat)) * 1e3, aim)
        times.append(spent())
        begun = time.perf_counter()
        done = build_site(catalog, out)
        passed = time.perf_counter() - begun
        times.append(spent())
        again = build_site(catalog, out)
        times.append(spent())
        assert again.written == 0, "an unchanged site was written again"
        return {
            "methods": methods,
            "figures": methods * figures,
            "MB": catalog.stat().st_size / 1e6,
            "build s": times[1] - times[0],
            "unchanged s": times[2] - times[1],
            "files": done.pages,
            "site s": times[4] - times[3],
            "by the clock": passed,
            "site unchanged s": times[5] - times[4],
            "queries": asked,
        }


def spent() -> float:
    """Process seconds so far, of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def seconds(ask: Callable[[], Any]) -> float:
    start = time.process_time()
    ask()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", type=int, nargs="+", default=[200, 1000, 10000])
    parser.add_argument("--figures", type=int, default=100, help="figures per method")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.figures, options.repeat)))
        return
    rows = []
    for count in options.methods:
        command = [sys.executable, __file__, "--one", str(count), "--figures", str(options.figures)]
        command += ["--repeat", str(options.repeat)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"{count} methods done", file=sys.stderr)
    grown = [name for name in rows[0] if name != "queries"]
    print("".join(f"{name:>18}" for name in grown))
    for row in rows:
        print("".join(f"{row[name]:18,.0f}" if row[name] >= 100 else f"{row[name]:18.2f}" for name in grown))
    print(f"\n{'query, ms':28}" + "".join(f"{row['methods']:>12,}" for row in rows) + f"{'aim':>8}")
    for name, (_, aim) in rows[0]["queries"].items():
        texts = "".join(f"{row['queries'][name][0]:12.1f}" for row in rows)
        print(f"{name:28}{texts}{aim:8.0f}{'' if rows[-1]['queries'][name][0] < aim else '  above'}")
    print(
        f"\nAim for the site of 10,000 methods: {SITE:.0f} s by the clock, on a machine with nothing else to do."
    )


if __name__ == "__main__":
    main()
