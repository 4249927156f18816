"""Accuracy against tokens kept: every encoder method at several budgets, on a trained ViT-S/14 and real photographs.

Run: ``python benchmarks/encoder_quality.py [--methods tome evit] [--train 2000] [--test 500] [--size 112] [--out FILE]
[--table] [--trained FOLDER]``.

The encoder (``dinov2-small-saliency``) stays as it is. A linear probe (ridge regression; strength by leave-one-out) is
fitted once on what the dense encoder says about ``--train`` CIFAR-10 photographs: [CLS] beside the mean patch. It then
judges ``--test`` other ones, seen through the dense encoder and through each method: off the shelf, no probe is fitted
anew. Tokens that stand for several count as many times in the mean patch.

Cells are appended to FILE as they finish, in the form of ``taxonomy/measurements``; those already in it with the same
settings are not run again. ``--table`` only prints what FILE holds. Methods that must be trained first, or that need
another kind of model, are passed over with their own reason. ``--trained`` measures such a method on the encoder that
``zoo train`` left in FOLDER, with a probe of its own; thresholds hold for the resolution they were trained at, so give
its ``--size`` (224 where nothing else was said).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from taxonomy.runs import Measurement, Run
from zoo.bench.environment import environment
from zoo.bench.flops import count_flops
from zoo.errors import BadInput, ZooError
from zoo.families.encoder_tokens import AppliedEncoder, EncoderTokenReducer
from zoo.image_data import labelled
from zoo.interface import implemented, method, method_class
from zoo.models import load_model
from zoo.reference.probe import Probe, batches, features

MODEL = "dinov2-small-saliency"

BUDGETS: dict[str, list[dict[str, Any]]] = {
    "tome": [{"r": r} for r in (1, 2, 3, 4, 5)],
    "pitome": [{"keep_ratio": kept} for kept in (0.975, 0.95, 0.925, 0.9, 0.85)],
    "gtp-vit": [{"propagated": count} for count in (1, 2, 3, 4, 5)],
    "evit": [{"keep_ratio": kept} for kept in (0.9, 0.8, 0.7, 0.5, 0.3)],
    "token-transforming": [{"keep_ratio": kept} for kept in (0.9, 0.8, 0.7, 0.5, 0.3)],
    "zero-tprune": [
        {"duplicates": count, "retention": [1, kept, kept, kept, 1]}
        for count, kept in ((1, 1.0), (2, 0.95), (3, 0.9), (3, 0.8), (3, 0.6))
    ],
}
"""From nearly all of the 64 patches of a picture of 112 pixels down to about a third, mean over the blocks.

Other methods: ``KEEP_RATIOS`` where they take a ``keep_ratio``, else their defaults, once.
"""
KEEP_RATIOS = (0.9, 0.7, 0.5)

TRAINED_FIRST = {"as-vit": "its thresholds come from training (zoo train as-vit), see --trained"}
"""Methods that run untrained, but mean nothing then."""

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Of trained thresholds: 1 keeps what training aimed at, more keeps fewer tokens."""


@dataclass(frozen=True)
class Subject:
    """The encoder that is measured: as it comes, or as a training left it.

    Attributes:
        name: what the runs call it.
        folder: of ``zoo train``; ``None`` for the encoder as it comes.
    """

    name: str = MODEL
    folder: Path | None = None

    @classmethod
    def trained(cls, folder: Path) -> Subject:
        """After a finished training.

        Raises:
            BadInput: nothing was finished in ``folder``.
        """
        try:
            record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"{folder} holds no finished training: {error.strerror}") from None
        name = f"{record['model']} after {record['steps']} steps of zoo train {record['method']}"
        return cls(name, folder)

    @property
    def ref(self) -> str:
        """Where it is loaded from."""
        return self.name if self.folder is None else str(self.folder / "model")

    def thresholds(self, slug: str) -> list[float] | None:
        """What the training of a method found, where this is its encoder."""
        if self.folder is None:
            return None
        config = json.loads((self.folder / "model" / "config.json").read_text(encoding="utf-8"))
        found: dict[str, list[float]] = config.get(slug.replace("-", "_"), {})
        return found.get("thresholds")


def budgets(slug: str, subject: Subject) -> list[dict[str, Any]]:
    """The parameters of each cell of a method."""
    learnt = subject.thresholds(slug)
    if learnt is not None:
        return [{"thresholds": [factor * value for value in learnt]} for factor in FACTORS]
    if slug in BUDGETS:
        return BUDGETS[slug]
    has_ratio = "keep_ratio" in method_class(slug).model_fields
    return [{"keep_ratio": kept} for kept in KEEP_RATIOS] if has_ratio else [{}]


# --- cells ----------------------------------------------------------------------------------------------------


class Bench:
    """The encoder, the probe, and the pictures that it judges."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.subject: Subject = options.subject
        self.loaded = load_model(self.subject.ref)
        self.size = options.size
        self.test = labelled("cifar10", "test", options.test)
        train = labelled("cifar10", "train", options.train)
        with console.status("features of the dense encoder") as status:

            def progress(done: int, total: int) -> None:
                status.update(f"features of the dense encoder: {done} of {total} pictures")

            seen = features(self.loaded, train, self.size, progress=progress)
            self.probe = Probe.fit(seen, torch.from_numpy(train.labels))
            judged = features(self.loaded, self.test, self.size, progress=progress)
        self.labels = torch.from_numpy(self.test.labels)
        self.dense = self.probe.accuracy(judged, self.labels)
        self.picture = next(batches(self.loaded, self.test, self.size))[:1]
        self.flops = self._flops()
        self.inputs = {
            "images": "cifar10",
            "size": self.size,
            "train": options.train,
            "test": options.test,
            "probe": f"ridge regression on [CLS] and mean patch, strength {self.probe.strength:g}",
        }
        console.print(
            f"dense: accuracy {self.dense:.1%} on {len(self.test)} pictures (chance 10%), "
            f"ridge strength {self.probe.strength:g}"
        )

    def _flops(self) -> float:
        """GFLOP of one picture, as the encoder is now."""
        encoder = self.loaded.anatomy.encoder
        assert encoder is not None
        return count_flops(lambda: encoder.module(pixel_values=self.picture)) / 1e9

    def measure(self, slug: str, parameters: dict[str, Any]) -> Run:
        """One cell.

        Raises:
            ZooError: the method cannot run on this encoder, or must be trained first.
        """
        if slug in TRAINED_FIRST and self.subject.thresholds(slug) is None:
            raise ZooError(TRAINED_FIRST[slug])
        reducer = method(slug, **parameters)
        if not isinstance(reducer, EncoderTokenReducer):
            raise ZooError("it does not act inside a vision encoder")
        started, begun = datetime.now(UTC), time.perf_counter()
        with reducer.apply(self.loaded) as applied:
            assert isinstance(applied, AppliedEncoder)
            flops = self._flops()
            judged = features(self.loaded, self.test, self.size, applied)
            report = applied.report
        accuracy = self.probe.accuracy(judged, self.labels)
        task = f"cifar10, {len(self.test)} pictures, linear probe"
        per_picture = f"per picture of {self.size} x {self.size}"
        measurements = (
            *_both("accuracy", task, "1", self.dense, accuracy, accuracy / self.dense),
            *_both("tokens", f"mean over blocks, {per_picture}", "tokens", report.total, report.kept),
            *_both("flops", per_picture, "GFLOP", self.flops, flops, self.flops / flops),
        )
        return Run(
            method=slug,
            model=self.subject.name,
            model_revision=self.loaded.revision or "",
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - begun, 1),
            environment=environment("cpu", self.loaded.model.config._attn_implementation),
            parameters=reducer.parameters(),
            measurements=measurements,
            inputs={**self.inputs, "asked": parameters},
            seed=0,
            dtype="float32",
            device="cpu",
            report=report.model_dump(mode="json"),
        )


def _both(
    quantity: str, task: str, unit: str, dense: float, own: float, gain: float | None = None
) -> Iterator[Measurement]:
    """Rows of a quantity: both arms and, as in the records of ``zoo run``, how many times better the method is."""
    yield Measurement(quantity, "dense", unit, round(dense, 5), task=task)
    yield Measurement(quantity, "method", unit, round(own, 5), task=task)
    if gain is not None:
        yield Measurement(quantity, "ratio", "times", round(gain, 5), task=task)


def sweep(options: argparse.Namespace, console: Console) -> None:
    """Run what is missing from the file."""
    subject: Subject = options.subject
    done = {
        _place(run.method, dict(run.inputs)) for run in finished(options.out) if run.model == subject.name
    }
    slugs = options.methods or [
        slug for slug in implemented() if method_class(slug).phase == "encoder-tokens"
    ]
    asked = {"images": "cifar10", "size": options.size, "train": options.train, "test": options.test}
    missing = [
        (slug, parameters)
        for slug in slugs
        for parameters in budgets(slug, subject)
        if _place(slug, {**asked, "asked": parameters}) not in done
    ]
    if not missing:
        return
    bench = Bench(options, console)
    passed_over = set()
    for slug, parameters in missing:
        if slug in passed_over:
            continue
        try:
            run = bench.measure(slug, parameters)
        except ZooError as error:
            console.print(f"{slug} is passed over: {error}", style="yellow", highlight=False)
            passed_over.add(slug)
            continue
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run.to_json()) + "\n")
        console.print(
            f"{slug} {parameters}: accuracy {value(run, 'accuracy', 'method'):.1%} with "
            f"{kept(run, 'tokens'):.1%} of the tokens, {run.seconds:.0f} s",
            highlight=False,
        )


def _place(slug: str, inputs: dict[str, Any]) -> str:
    """What tells cells apart."""
    return json.dumps(
        [slug, *(inputs.get(name) for name in ("images", "size", "train", "test", "asked"))], sort_keys=True
    )


def finished(path: Path) -> list[Run]:
    """The cells in ``path``."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        Run.from_json(json.loads(line), f"line {number} of {path}") for number, line in enumerate(lines, 1)
    ]


def value(run: Run, quantity: str, arm: str) -> float:
    """A figure of a cell."""
    return next(row.median for row in run.measurements if (row.quantity, row.arm) == (quantity, arm))


def kept(run: Run, quantity: str) -> float:
    """The method's figure as a fraction of the dense one."""
    return value(run, quantity, "method") / value(run, quantity, "dense")


def table(runs: list[Run]) -> Table:
    """All cells: methods by name, each from many tokens to few."""
    out = Table(title=f"{runs[0].model}: a linear probe on {runs[0].inputs['images']}")
    for name in ("method", "parameters", "tokens kept", "accuracy", "dense", "of dense", "FLOPs"):
        out.add_column(name, justify="left" if name in ("method", "parameters") else "right")
    last = ""
    for run in sorted(runs, key=lambda run: (run.method, -kept(run, "tokens"))):
        if last and run.method != last:
            out.add_section()
        last = run.method
        asked = ", ".join(f"{name} {setting}" for name, setting in run.inputs["asked"].items())
        out.add_row(
            run.method,
            asked,
            f"{kept(run, 'tokens'):.1%}",
            f"{value(run, 'accuracy', 'method'):.1%}",
            f"{value(run, 'accuracy', 'dense'):.1%}",
            f"{kept(run, 'accuracy'):.1%}",
            f"{kept(run, 'flops'):.1%}",
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", help="slugs (default: all encoder-token methods)")
    parser.add_argument("--train", type=int, default=2000, help="pictures that the probe is fitted on")
    parser.add_argument("--test", type=int, default=500, help="pictures that it judges")
    parser.add_argument("--size", type=int, default=112, help="pixels, a multiple of 14")
    parser.add_argument("--out", type=Path, default=Path("encoder_quality.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    parser.add_argument("--trained", type=Path, help="folder of zoo train: its encoder instead")
    options = parser.parse_args()
    options.subject = Subject.trained(options.trained) if options.trained else Subject()
    torch.set_num_threads(1)
    console = Console(width=150)
    if not options.table:
        sweep(options, console)
    runs = [run for run in finished(options.out) if run.model == options.subject.name]
    if runs:
        console.print(table(runs))


if __name__ == "__main__":
    main()
