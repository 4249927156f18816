"""How long a site takes to build as the catalogue grows: synthetic catalogues made from the real cards.

Run: ``python benchmarks/site.py [--cards 125 1000 10000]``. Times are wall-clock and process seconds of loading the
catalogue, rendering everything, and publishing twice (first build, then unchanged). Each size runs in a process of
its own, so that the one before does not help.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def synthetic(count: int, path: Path) -> None:
    """A catalogue of ``count`` cards: the real ones under new names, each referring to those of its own copy."""
    from taxonomy.catalog import Sources, build

    real = Sources.load()
    cards = {}
    for number, card in enumerate(islice(cycle(real.cards.values()), count)):
        copy = number // len(real.cards)
        if copy:
            card = card.model_copy(
                update={
                    "slug": f"{card.slug}-{copy}",
                    "name": f"{card.name} {copy}",
                    "related": tuple(f"{slug}-{copy}" for slug in card.related),
                }
            )
        cards[card.slug] = card
    kept = {
        slug: card.model_copy(update={"related": tuple(other for other in card.related if other in cards)})
        for slug, card in cards.items()
    }
    build(Sources(kept, real.papers), path)


def measure(count: int) -> str:
    """Build one synthetic site and say how long each part took."""
    from taxonomy.site import publish, render
    from taxonomy.site.loading import load

    with tempfile.TemporaryDirectory() as folder:
        catalog, out = Path(folder) / "catalog.sqlite", Path(folder) / "site"
        synthetic(count, catalog)
        start, cpu = time.perf_counter(), time.process_time()
        library = load(catalog)
        loaded = time.perf_counter()
        done = publish(render(library, catalog.read_bytes()), out)
        built, spent = time.perf_counter(), time.process_time() - cpu
        again = publish(render(load(catalog), catalog.read_bytes()), out)
        unchanged = time.perf_counter()
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert again.written == 0
    return (
        f"{count:6d} {done.pages:7d} {size / 1e6:8.1f} {loaded - start:8.2f} {built - start:8.2f} {spent:8.2f}"
        f" {1e3 * (built - start) / count:9.2f} {unchanged - built:10.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=int, nargs="+", default=[125, 1000, 4000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure(options.one))
        return
    print(" cards   files       MB   load s  build s    cpu s  ms / card  unchanged s")
    for count in options.cards:
        subprocess.run([sys.executable, __file__, "--one", str(count)], check=True)


if __name__ == "__main__":
    main()
