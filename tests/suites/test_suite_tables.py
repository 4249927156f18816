"""Suite files: the two that come with the zoo, ones of one's own, and what is wrong with some."""

from __future__ import annotations

from pathlib import Path
from string import Formatter

import pytest

from zoo.errors import BadInput
from zoo.suites.answers import RULES
from zoo.suites.tables import load_suite, suite_names


@pytest.mark.parametrize("name", suite_names())
def test_the_suites_that_come_with_the_zoo(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.notes, "what is reconstructed is said"
    for dataset in suite.datasets:
        assert dataset.hub, "public data"
        assert {dataset.rule, dataset.otherwise, *dataset.rule_for.values()} <= RULES.keys()
        for text in (dataset.prompt, dataset.open_prompt or ""):
            assert all(name is None or name.isidentifier() for _, name, _, _ in Formatter().parse(text))
        assert not dataset.modulo.keys() - {column for group in dataset.groups for column in group}


def test_uniprunebench_has_its_abilities_and_leaves_out_what_is_judged() -> None:
    suite = load_suite("uniprunebench")
    assert len({dataset.ability for dataset in suite.datasets}) == 6
    assert [dataset.name for dataset in suite.judged] == ["mia-bench"]
    chosen = [dataset.name for dataset in suite.chosen(None)]
    assert len(chosen) == 9
    assert "mmbench-cn" not in chosen
    assert [dataset.name for dataset in suite.chosen(["pope", "mmbench-cn", "pope"])] == [
        "pope",
        "mmbench-cn",
    ]
    with pytest.raises(
        BadInput, match="mia-bench cannot be scored here: its answers are judged by a language model"
    ):
        suite.chosen(["mia-bench"])
    with pytest.raises(BadInput, match="no dataset 'pop'; did you mean pope"):
        suite.chosen(["pop"])


def test_effivlm_bench_has_fifteen_datasets_of_which_three_are_judged() -> None:
    suite = load_suite("effivlm-bench")
    assert len(suite.datasets) == 15
    assert [one.name for one in suite.judged] == ["llava-wilder", "mmvet", "imagedc"]


def test_unknown_suites_get_the_nearest_names() -> None:
    with pytest.raises(BadInput, match="'uniprunbench'; did you mean uniprunebench"):
        load_suite("uniprunbench")
    with pytest.raises(BadInput, match="cannot be read: no such file"):
        load_suite("none.toml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('path = "colours.jsonl"', ""), "colours needs either hub or path"),
        (('rule = "anls"', 'rule = "guess"'), "datasets.2.rule"),
        (('name = "shapes"', 'name = "colours"'), "same name"),
        (('groups = [["number"]]', 'measures = "f1"'), "datasets.0.measures"),
        (('rule = "contains"', 'rule = "contains"\nmeasure = "f1"'), "rare: f1 is measured"),
        (('rule = "contains"', 'rule_for = { question = "vqa" }'), "rare: rule_for"),
        (("budgets = [0.5]", "budgets = ["), "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(
    suite_file: Path, change: tuple[str, str], said: str
) -> None:
    text = suite_file.read_text(encoding="utf-8")
    assert change[0] in text
    suite_file.write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(BadInput, match=said):
        load_suite(str(suite_file))
