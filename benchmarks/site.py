"""How long a site takes to build as the catalogue grows: synthetic catalogues made from the real cards.

Run: ``python benchmarks/site.py [--cards 1000 2000 5000 10000] [--figures 100]``. With 100 measured figures per card,
as in ``catalogue.py``. Process seconds take in those of all helping processes; with two of them and nothing else to do
about half as many pass by the clock. The last columns are the same again with nothing changed, which writes nothing.
Each size runs in a process of its own, so that the one before does not help.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from catalogue import cards, runs, spent


def synthetic(count: int, figures: int, path: Path) -> None:
    """A catalogue of ``count`` cards that all run here, with about ``figures`` figures each."""
    from taxonomy.bibliography import load_bibliography
    from taxonomy.catalog import Sources, build

    known = cards(count)
    build(Sources(known, load_bibliography(), list(runs(list(known), figures)), (), frozenset(known)), path)


def measure(count: int, figures: int) -> str:
    """Build one synthetic site twice and say how long it took."""
    from taxonomy.site import build

    with tempfile.TemporaryDirectory() as folder:
        catalog, out = Path(folder) / "catalog.sqlite", Path(folder) / "site"
        synthetic(count, figures, catalog)
        times = [(spent(), time.perf_counter())]
        done = build(catalog, out)
        times.append((spent(), time.perf_counter()))
        again = build(catalog, out)
        times.append((spent(), time.perf_counter()))
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert again.written == 0, "an unchanged site was written again"
    (first, clock), (second, clock_again) = (
        [later - earlier for earlier, later in zip(times[n], times[n + 1], strict=True)] for n in (0, 1)
    )
    return (
        f"{count:7,d} {done.pages:7,d} {size / 1e6:7.0f} {first:10.2f} {1e3 * first / count:8.2f} {clock:9.2f}"
        f" {second:12.2f} {clock_again:9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=int, nargs="+", default=[1000, 2000, 5000, 10000])
    parser.add_argument("--figures", type=int, default=100, help="figures per card")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(options.one, options.figures))
        return
    print("  cards   files      MB  process s  / 1,000   clock s  unchanged s   clock s", flush=True)
    for count in options.cards:
        command = [sys.executable, __file__, "--one", str(count), "--figures", str(options.figures)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
