"""How long the reading commands and the build of the catalogue take, beside what Python alone needs.

Run: ``python benchmarks/cli.py [--repeat 7]``. Commands run in fresh processes, one after the other in turns, so that
a busy moment of the machine hits all of them alike; the table shows the median and the quickest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BUILD = (
    "import sys, time\nfrom pathlib import Path\nfrom taxonomy.catalog import Sources, build\n"
    "from zoo.interface import implemented\nbuild(Sources.load(implemented()), Path(sys.argv[1]))\n"
)

COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": (["-c", "pass"], None),
    "python -c 'import typer'": (["-c", "import typer"], None),
    "python -c 'import sqlalchemy'": (["-c", "import sqlalchemy"], None),
    "zoo --help": (["-m", "zoo", "--help"], 0.15),
    "zoo list": (["-m", "zoo", "list"], 0.35),
    "zoo find (3 conditions)": (
        ["-m", "zoo", "find", "--where", "before-llm", "--training", "none", "--no-needs-attention-maps"],
        0.35,
    ),
    "zoo search": (["-m", "zoo", "search", "attention", "heads"], 0.35),
    "zoo show flap": (["-m", "zoo", "show", "flap"], 0.35),
    "zoo papers": (["-m", "zoo", "papers", "token", "merging"], 0.35),
    "zoo taxonomy matrix": (["-m", "zoo", "taxonomy", "matrix"], 0.35),
    "build the catalogue": (["-c", BUILD, "TARGET"], 2.0),
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    measured: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeat + 1):
            for name, (arguments, _) in COMMANDS.items():
                target = str(Path(folder) / f"{turn}.sqlite")
                took = seconds([target if part == "TARGET" else part for part in arguments])
                if turn:  # the first turn fills caches
                    measured[name].append(took)
    print(f"{'':32}{'median s':>10}{'quickest s':>12}{'aim s':>8}")
    for name, (_, aim) in COMMANDS.items():
        median, best = statistics.median(measured[name]), min(measured[name])
        print(f"{name:32}{median:10.3f}{best:12.3f}{'' if aim is None else f'{aim:8.2f}'}")
    print("\nBuilding leaves out the import of the implementations, which is that of torch.")


if __name__ == "__main__":
    main()
