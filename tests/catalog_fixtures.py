"""A catalogue built from the real sources, without importing any implementation. Shared by several folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from taxonomy.card import Card
from taxonomy.catalog import Measurement as Figure
from taxonomy.catalog import Run, Sources, build, results
from zoo.interface import implemented

CARD = {
    "slug": "alpha",
    "name": "Alpha",
    "title": "A method for tests",
    "summary": "It drops tokens that nobody looks at, and it does so without any training at all.",
    "year": 2024,
    "facets": {
        "family": ["visual-token-pruning"],
        "target": ["visual-tokens"],
        "where": ["before-llm"],
        "signal": ["diversity"],
        "operation": ["drop"],
        "when": ["prefill"],
        "training": ["none"],
    },
    "fidelity": {"basis": "paper-text"},
}


def card(**changes: object) -> Card:
    return Card.model_validate({**CARD, **changes})


def small(*cards: Card, **more: object) -> Sources:
    return Sources(cards={one.slug: one for one in cards or (card(),)}, **more)


def make_run(**changes: object) -> Run:
    values: dict[str, object] = {
        "method": "flap",
        "model": "tiny-llama",
        "started": "2026-05-04T10:11:12Z",
        "seconds": 2.5,
        "environment": {"hardware": "2 x86-64 cores", "torch": "2.13.0"},
        "parameters": {"sparsity": 0.3},
        "measurements": (
            Figure("prefill", "dense", "s", 0.4, 0.01, 5),
            Figure("prefill", "method", "s", 0.2, 0.01, 5),
            Figure("prefill", "ratio", "1", 2.0),
        ),
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
    }
    return Run(**{**values, **changes})


def timed_on(task: str, gain: float, *, same: float = 1.0, noise: float = 0.05, **changes: object) -> Run:
    """A run of a drafter on one task, as ``benchmarks/decoding.py`` makes them."""
    figures = (
        Figure("decode-speed", "dense", "tokens/s", 10.0, None, 2, task),
        Figure("decode-speed", "method", "tokens/s", 10.0 * gain, None, 2, task),
        Figure("decode-speed", "ratio", "times", gain, None, 2, task),
        Figure("decode-speed-bound", "ratio", "times", gain + 0.1, None, 2, task),
        Figure("generation-speed", "ratio", "times", gain, None, 2, task),
        Figure("tokens-per-step", "method", "1", 2 * gain - 1, None, 2, task),
        Figure("noise", "dense", "1", noise, None, 2, task),
        Figure("identical-outputs", "method", "1", same, None, 2, task),
    )
    values = {
        "model": "small",
        "parameters": {},
        "inputs": {"task": task},
        "measurements": figures,
        **changes,
    }
    return make_run(**{"key": f"{values.get('method')}-{task}", **values})


def proof_of(method: str, same: int, outputs: int, **changes: object) -> Run:
    """A run that compares the outputs of a drafter one by one with plain decoding, and times nothing."""
    figures = (
        Figure("prompts", "method", "prompts", outputs, None, outputs, "lossless"),
        Figure("identical-outputs", "method", "outputs", same, None, outputs, "lossless"),
        Figure("tokens-per-step", "method", "1", 1.5, None, outputs, "lossless"),
    )
    values = {
        "model": "small",
        "parameters": {},
        "measurements": figures,
        "key": f"{method}-proof",
        **changes,
    }
    return make_run(method=method, **values)


def mine(**filters: object) -> list[str]:
    """Keys of the user's own runs, newest first."""
    return [result.key for result in results(reference=False, **filters)]


def real_sources() -> Sources:
    loaded = Sources.load(implemented())
    flap = [row for row in loaded.verification if row["method"] != "flap"]
    flap += [
        {
            "method": "flap",
            "kind": "property",
            "subject": "deterministic",
            "model": "tiny-llama",
            "passed": True,
        },
        {"method": "flap", "kind": "golden", "subject": "case-1", "passed": True},
    ]
    reference = make_run(key="reference-1", model="smollm2-135m")
    # Not the measurements that are committed: they come and go, and what these tests expect must not.
    return Sources(loaded.cards, loaded.papers, [reference], flap, loaded.implemented)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue of the real cards and papers."""
    path = tmp_path_factory.mktemp("catalog") / "catalog.sqlite"
    assert build(real_sources(), path)
    return path


@pytest.fixture
def as_catalog(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands read ``built``, and the user's runs are in an own, empty place."""
    monkeypatch.setattr("taxonomy.paths.catalog_file", lambda: built)
    monkeypatch.setenv("ZOO_CATALOG", str(tmp_path / "own" / "runs.sqlite"))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert os.environ["ZOO_CATALOG"]
    return built
