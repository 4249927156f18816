"""The taxonomy's claims, executed: every declared property of every implemented method, on small real models.

``pytest --record`` (``make record``) writes what passed to ``taxonomy/verification/contracts.jsonl``; the site shows
a tick for exactly those rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from contracts import (
    CHECKS,
    POINTLESS,
    Bench,
    FullMaps,
    acts_where_declared,
    data,
    models_of,
    training_none,
)

from taxonomy.paths import VERIFICATION
from zoo.errors import Refused
from zoo.interface import implemented, method_class

PROPERTY_CASES = [
    (slug, name, model)
    for slug in implemented()
    for name in method_class(slug).card().properties
    if name in CHECKS[method_class(slug).phase]
    for model in models_of(slug)
    if (name, model) not in POINTLESS
]
SLUG_MODELS = [(slug, model) for slug in implemented() for model in models_of(slug)]


@pytest.mark.parametrize(
    ("slug", "name", "model"), PROPERTY_CASES, ids=["/".join(case) for case in PROPERTY_CASES]
)
def test_property(slug: str, name: str, model: str, record_verified: object) -> None:
    cls = method_class(slug)
    declared = cls.card().properties[name]
    CHECKS[cls.phase][name](Bench(slug, model), declared)
    record_verified(slug, "property", name, model)


UNTRAINED = [
    case
    for case in SLUG_MODELS
    if {"none", "calibration"} & set(method_class(case[0]).card().terms("training"))
]


@pytest.mark.parametrize(("slug", "model"), UNTRAINED, ids=["/".join(case) for case in UNTRAINED])
def test_training_facet(slug: str, model: str, record_verified: object) -> None:
    training_none(Bench(slug, model))
    record_verified(slug, "facet", "training", model)


VISUAL = [(s, m) for s, m in SLUG_MODELS if method_class(s).phase == "visual-tokens"]


@pytest.mark.parametrize(("slug", "model"), VISUAL, ids=["/".join(case) for case in VISUAL])
def test_where_facet(slug: str, model: str, record_verified: object) -> None:
    acts_where_declared(Bench(slug, model))
    record_verified(slug, "facet", "where", model)


@pytest.mark.parametrize("slug", implemented())
def test_a_model_of_the_wrong_kind_is_refused_in_one_line(slug: str) -> None:
    wrong = "tiny-vit" if method_class(slug).phase != "encoder-tokens" else "tiny-llama"
    bench = Bench(slug, wrong)
    with pytest.raises(Refused) as caught:
        bench.method.check(bench.load())
    assert slug in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("slug", implemented())
def test_some_architecture_is_not_refused(slug: str) -> None:
    assert models_of(slug)


@pytest.mark.parametrize("slug", implemented())
def test_every_implemented_method_has_an_honest_card(slug: str) -> None:
    card = method_class(slug).card()
    assert card.slug == slug
    missing = {"needs_attention_maps", "lossless", "deterministic", "batchable"} - card.properties.keys()
    assert not missing, f"the card of {slug} does not say {missing}"
    for name, field in method_class(slug).model_fields.items():
        assert field.description, f"{slug}.{name} has no description"


def test_the_guard_against_full_maps_works() -> None:
    """Eager attention must be noticed, or the property above would mean nothing."""
    bench = Bench("fastv", "tiny-llava")
    loaded = bench.load()
    inputs = data(bench, loaded)
    with FullMaps(12) as watched, torch.no_grad():
        loaded.model(**inputs)
    assert not watched.found
    loaded.model.set_attn_implementation("eager")
    with FullMaps(12) as watched, torch.no_grad():
        loaded.model(**inputs)
    assert watched.found


def test_a_false_declaration_is_noticed() -> None:
    """Turning a declared property around must make its check fail."""
    for slug, name, model in (
        ("fastv", "query_aware", "tiny-llava"),
        ("divprune", "query_aware", "tiny-llava"),
        ("divprune", "keeps_positions", "tiny-llava"),
        ("fastv", "shrinks_cache", "tiny-llava"),
        ("prompt-lookup", "lossless", "tiny-llama"),
        ("flap", "shrinks_weights", "tiny-llama"),
    ):
        cls = method_class(slug)
        with pytest.raises(AssertionError):
            CHECKS[cls.phase][name](Bench(slug, model), not cls.card().properties[name])


def test_recorded_ticks_are_those_that_are_tested() -> None:
    """The committed record names exactly the cases above: no tick without a test, no test without its tick."""
    path = Path(VERIFICATION) / "contracts.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    recorded = {(row["method"], row["kind"], row["subject"], row["model"]) for row in rows if row["passed"]}
    tested = {(slug, "property", name, model) for slug, name, model in PROPERTY_CASES}
    tested |= {(slug, "facet", "training", model) for slug, model in UNTRAINED}
    tested |= {(slug, "facet", "where", model) for slug, model in VISUAL}
    assert recorded == tested, "run `make record` and commit the result"
