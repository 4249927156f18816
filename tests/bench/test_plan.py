"""Plans: what they expand to, what they refuse, and that equal cells are known to be equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench_plans import Making

from taxonomy.earlier import Earlier
from zoo.bench.plan import SIDE_BY_SIDE, Cell, Plan, load_plan
from zoo.bench.sweep import duration, estimate
from zoo.errors import BadInput

Planning = Callable[..., Plan]
PLANS = sorted((Path(__file__).parents[2] / "plans").glob("*.toml"))


def labels(plan: Plan) -> list[str]:
    return [f"{cell.method} {cell.budget} {cell.model} {cell.task.name} {cell.seed}" for cell in plan.cells()]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_that_is_shipped_can_be_expanded(path: Path) -> None:
    plan = load_plan(path)
    assert plan.name == path.stem
    cells = plan.cells()
    assert len({cell.hash for cell in cells}) == len(cells) > 1


def test_everything_is_combined_with_everything(plan: Planning) -> None:
    found = plan(
        models='["tiny-llama", "tiny-qwen2"]', seeds="[0, 1]", tasks='["perplexity", "side-by-side"]'
    )
    # a method with a budget: 2 models x 2 budgets x 2 seeds x 2 tasks; one without: 2 x 2 x 2
    assert len(found.cells()) == 16 + 8
    assert len(set(labels(found))) == 24


def test_a_budget_goes_to_the_parameter_that_takes_it(plan: Planning) -> None:
    found = plan(
        methods='["magnitude-sp", "divprune", { name = "flap", budgets = [0.4] }, { name = "laco", '
        'budget = "threshold", budgets = [0.9] }, { name = "divprune", set = { keep_ratio = 0.3 } }, "tome"]',
        budgets="[0.25]",
    )
    assert [cell.parameters for cell in found.cells()] == [
        {"sparsity": 0.25},
        {"keep_ratio": 0.25},
        {"sparsity": 0.4},
        {"threshold": 0.9},
        {"keep_ratio": 0.3},
        {},
    ]


def test_exclude_needs_all_it_names_and_include_adds(plan: Planning) -> None:
    found = plan(
        exclude='[{ method = "magnitude-sp", budget = 0.5 }]',
        include='[{ method = "flap", model = "tiny-qwen2", budget = 0.1, task = "side-by-side", seed = 3 }]',
    )
    assert labels(found) == [
        "magnitude-sp 0.2 tiny-llama perplexity 0",
        "prompt-lookup None tiny-llama perplexity 0",
        "flap 0.1 tiny-qwen2 side-by-side 3",
    ]


def test_cells_are_equal_when_they_ask_the_same(plan: Planning) -> None:
    def cell(**changes: str) -> Cell:
        return plan(**{"methods": '["flap"]', "budgets": "[0.3]", **changes}).cells()[0]

    same = cell()
    assert same.hash == cell(methods='[{ name = "flap", set = { metric = "WIFV", sparsity = 0.3 } }]').hash
    assert same.hash == cell(name='"another-name"').hash
    settings = same.settings.model_copy(update={"timeout": 5.0})
    assert same.hash == same.model_copy(update={"settings": settings}).hash
    for change in (
        {"budgets": "[0.31]"},
        {"seeds": "[1]"},
        {"models": '["tiny-qwen2"]'},
        {"tasks": '["agreement"]'},
    ):
        assert cell(**change).hash != same.hash
    assert same.hash != cell(settings='{ dtype = "bfloat16" }').hash


def test_cells_that_share_a_pruned_model_share_a_group(plan: Planning) -> None:
    cells = plan(methods='["magnitude-sp"]', tasks='["perplexity", "agreement"]').cells()
    assert [cell.budget for cell in cells] == [0.2, 0.2, 0.5, 0.5]
    assert cells[0].group == cells[1].group != cells[2].group


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": '["flapp"]'}, "methods.0: there is no method called 'flapp'; did you mean flap"),
        ({"methods": '["flap", { name = "flap", set = { sparcity = 1 } }]'}, "methods.1: flap has no parameter"),
        ({"methods": '["flap", { name = "flap", sett = {} }]'}, "methods.1.sett: Extra inputs"),
        ({"methods": '[{ name = "vtw", budgets = [0.5] }]'}, "vtw has no sparsity or keep_ratio"),
        ({"tasks": '["perplexty"]'}, "tasks.0: there is no task called 'perplexty'; did you mean perplexity"),
        ({"tasks": '[{ name = "perplexity", length = 1 }]'}, "length: Input should be greater than or equal to 2"),
        ({"tasks": '[{ name = "side-by-side", length = 1 }]'}, "takes no options"),
        ({"exclude": "[{}]"}, "exclude.0: an empty exclude"),
        ({"settings": "{ repeats = 0 }"}, "settings.repeats: Input should be greater"),
        ({"modles": "[]"}, "modles: Extra inputs"),
        ({"name": '"Some Name"'}, "name: String should match"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(write_plan: Making, changes: dict[str, str], said: str) -> None:
    path = write_plan(**changes)
    with pytest.raises(BadInput) as refused:
        load_plan(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert said in str(refused.value)


def test_what_only_the_whole_shows_is_refused_when_it_is_expanded(plan: Planning) -> None:
    with pytest.raises(BadInput, match="sparsity"):
        plan(methods='["flap"]', budgets="[1.5]").cells()
    with pytest.raises(BadInput, match="no cell"):
        plan(exclude='[{ model = "tiny-llama" }]').cells()
    with pytest.raises(BadInput, match="no budget"):
        plan(
            include='[{ method = "vtw", model = "tiny-llava", budget = 0.1, task = "side-by-side" }]'
        ).cells()


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        load_plan(tmp_path / "none.toml")
    (tmp_path / "half.toml").write_text("name = ", encoding="utf-8")
    with pytest.raises(BadInput, match="is not TOML"):
        load_plan(tmp_path / "half.toml")


def earlier(cell: str | None, method: str, task: str | None, seconds: float) -> Earlier:
    key = f"{cell} {method} {task} {seconds}"
    return Earlier(key, cell, method, "tiny-llama", task, "a machine", "done", seconds, own=True)


def test_the_estimate_rests_on_the_most_alike_runs(plan: Planning) -> None:
    same, method_only, neither = plan(methods='["magnitude-sp", "flap", "wanda-sp"]', budgets="[0.2]").cells()
    past = [
        earlier(same.hash, "magnitude-sp", "perplexity", 2.0),
        earlier("another cell", "magnitude-sp", "perplexity", 50.0),
        *(earlier(None, "flap", "perplexity", seconds) for seconds in (10.0, 20.0, 90.0)),
        earlier(None, "flap", None, 7000.0),
    ]
    assert estimate([same], past).seconds == 2.0
    assert estimate([method_only], past).seconds == 20.0
    assert estimate([neither], past).seconds == 20.0  # of all on this model and task: 2, 50, 10, 20, 90
    every = estimate([same, method_only, neither], past)
    assert (every.seconds, every.known, every.unknown) == (42.0, 3, 0)
    assert "about 42 s for 3 cells (medians of 5 earlier runs of like cells on a machine)" in every.said()
    assert "about 21 s by 2 workers" in every.said(2)
    other = plan(models='["tiny-qwen2"]', methods='["magnitude-sp"]', budgets="[0.2]").cells()
    assert estimate(other, past).said() == "time: unknown, nothing like it has run here yet"
    side = plan(methods='["flap"]', budgets="[0.2]", tasks=f'["{SIDE_BY_SIDE}"]').cells()
    assert estimate(side, past).seconds == 7000.0


def test_durations_are_short() -> None:
    assert [duration(seconds) for seconds in (3, 600, 7200)] == ["3 s", "10 min", "2.0 h"]
