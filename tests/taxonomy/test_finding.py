"""Findings: the figure by hand, the interval's coverage, and the verdict on data made to agree, disagree or neither."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from pydantic import ValidationError

from taxonomy.card import load_cards
from taxonomy.errors import CatalogError
from taxonomy.evidence import Score, Trial
from taxonomy.finding import FEWEST, Finding, interval, judge, load_findings
from taxonomy.questions import Untestable
from taxonomy.scores import SCORED, scores_of


def trial(
    method: str, budget: float, *parts: float, tasks: tuple[str, ...] = ("a",), **changes: object
) -> Trial:
    score = Score("accuracy", tasks, parts, fmean(parts), 0.0, None, None, None, "1")
    values: dict[str, object] = {
        "key": f"{method}-{budget}",
        "origin": "own",
        "method": method,
        "model": "vlm",
        "hardware": "cores",
        "environment": "e",
        "device": "cpu",
        "dtype": "float32",
        "protocol": "1",
        "started": "2026-05-04T10:11:12Z",
        "config": "c",
        "settings": {"keep_ratio": budget},
        "scores": {"accuracy": score},
    }
    return Trial(**{**values, **changes})  # type: ignore[arg-type]


def finding(**test: object) -> Finding:
    return Finding.model_validate(
        {"slug": "x", "title": "t", "claim": "c", "source": "s", "card": "flap", "test": test}
    )


BEATS = finding(kind="beats", better=["good"], than=["bad"])
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5)


def test_beats_compares_equal_budgets_only() -> None:
    trials = [trial("good", b, 0.8) for b in BUDGETS] + [trial("bad", b, 0.4) for b in BUDGETS[:4]]
    trials += [trial("bad", 0.9, 0.99), trial("good", 0.5, 0.1, hardware="other")]
    outcome = judge(BEATS, trials)
    assert (outcome.cells, outcome.verdict) == (4, "agrees")
    assert outcome.figure == pytest.approx(2.0)
    assert (outcome.low, outcome.high) == (pytest.approx(2.0), pytest.approx(2.0))
    assert judge(finding(kind="beats", better=["bad"], than=["good"]), trials).verdict == "disagrees"


def test_too_few_cells_give_no_figure() -> None:
    trials = [trial(m, b, 0.5) for m in ("good", "bad") for b in BUDGETS[: FEWEST - 1]]
    outcome = judge(BEATS, trials)
    assert (outcome.verdict, outcome.figure) == ("not measured yet", None)
    assert judge(BEATS, []).cells == 0


def test_what_varies_about_the_threshold_stays_undecided() -> None:
    kept = [0.5, 0.7, 0.4, 0.9, 0.6]
    trials = [trial("good", b, k) for b, k in zip(BUDGETS, kept, strict=True)]
    trials += [trial("bad", b, k) for b, k in zip(BUDGETS, reversed(kept), strict=True)]
    assert judge(BEATS, trials).verdict == "undecided"


def test_bounds_of_the_budget_and_models_select() -> None:
    trials = [trial(m, b, 0.5) for m in ("good", "bad") for b in BUDGETS]
    low = finding(kind="beats", better=["good"], than=["bad"], highest=0.25)
    assert judge(low, trials).cells == 2
    assert judge(finding(kind="beats", better=["good"], than=["bad"], models=["other"]), trials).cells == 0


def test_a_baseline_that_holds_up() -> None:
    strong = [trial("random", b, 0.8) for b in BUDGETS]
    strong += [trial(m, b, k) for b in BUDGETS for m, k in (("one", 0.7), ("two", 0.8), ("three", 0.6))]
    outcome = judge(finding(kind="holds-up", baseline="random"), strong)
    assert (outcome.figure, outcome.cells, outcome.verdict) == (1.0, 15, "agrees")
    weak = [trial("random", b, 0.1) for b in BUDGETS] + strong[5:]
    assert judge(finding(kind="holds-up", baseline="random"), weak).verdict == "disagrees"


def test_winners_are_counted_per_task() -> None:
    tasks = ("read", "count")
    mixed = [trial("one", b, 0.9, 0.1, tasks=tasks) for b in BUDGETS]
    mixed += [trial("two", b, 0.2, 0.8, tasks=tasks) for b in BUDGETS]
    outcome = judge(finding(kind="no-winner"), mixed)
    assert (outcome.figure, outcome.cells, outcome.verdict) == (0.5, 10, "agrees")
    one = [trial(m, b, k) for b in BUDGETS for m, k in (("one", 0.9), ("two", 0.1))]
    assert judge(finding(kind="no-winner"), one).verdict == "disagrees"


def test_the_task_is_found_by_a_word_of_its_label() -> None:
    tasks = ("digits, 100 questions", "counting, 100 questions")
    trials = [trial("one", b, 0.2, 0.9, tasks=tasks) for b in BUDGETS]
    assert judge(finding(kind="most-fragile", task="digits"), trials).verdict == "agrees"
    assert judge(finding(kind="most-fragile", task="counting"), trials).verdict == "disagrees"
    assert judge(finding(kind="most-fragile", task="digit"), trials).verdict == "not measured yet"


def test_variance_is_split_between_budget_and_method() -> None:
    by_budget = [trial(m, b, b) for b in BUDGETS for m in ("one", "two", "three")]
    outcome = judge(finding(kind="budget-dominates"), by_budget)
    assert outcome.figure == pytest.approx(1.0)
    assert outcome.verdict == "agrees"
    by_method = [trial(m, b, k) for b in BUDGETS for m, k in (("one", 0.1), ("two", 0.5), ("three", 0.9))]
    assert judge(finding(kind="budget-dominates"), by_method).figure == pytest.approx(-1.0)


def drafter(method: str, noise: float = 0.05, **gains: float) -> Trial:
    values = tuple(gains.values())
    score = Score(
        "generation-speed", tuple(gains), values, fmean(values), noise, None, None, None, "tokens/s"
    )
    return trial(method, 0.0, 1.0, settings={}, scores={"generation-speed": score})


def test_some_tasks_pay_more_than_the_others() -> None:
    pays = finding(kind="pays-on", better=["copy", "tree"], on=["rag", "sum"])
    trials = [
        drafter("copy", rag=1.5, sum=2.0, chat=1.0, qa=1.0),
        drafter("tree", rag=0.6, sum=1.8, chat=1.2, qa=1.2),
        drafter("other", rag=0.1, sum=0.1, chat=9.0, qa=9.0),
        drafter("copy", poem=9.0),
    ]
    outcome = judge(pays, trials)
    assert sorted(pays.test.cells(trials)) == pytest.approx([0.5, 1.5, 1.5, 2.0])
    assert (outcome.cells, outcome.verdict, len(outcome.trials)) == (4, "undecided", 2)
    trials[1] = drafter("tree", rag=1.3, sum=1.8, chat=1.04, qa=0.96)
    assert judge(pays, trials).verdict == "agrees"
    elsewhere = finding(kind="pays-on", better=["copy", "tree"], on=["chat", "qa"])
    assert judge(elsewhere, trials).verdict == "disagrees"


def test_what_the_noise_explains_is_no_gain() -> None:
    pays = finding(kind="pays-on", better=["copy"], on=["rag"])
    assert pays.test.cells([drafter("copy", 0.1, rag=1.08, chat=0.94)]) == [1.0]
    assert pays.test.cells([drafter("copy", 0.01, rag=1.08, chat=0.9)]) == [pytest.approx(1.2)]


def test_one_drafter_beats_another_on_some_tasks() -> None:
    asked = finding(
        kind="beats-on", better=["table"], than=["copy"], on=["chat", "qa", "maths", "translation"]
    )
    tasks = ("chat", "qa", "maths", "translation", "rag")
    table, copy = dict.fromkeys(tasks, 1.5), dict.fromkeys(tasks, 1.2)
    trials = [drafter("table", **table), drafter("copy", **{**copy, "rag": 5.0})]
    outcome = judge(asked, trials)
    assert (outcome.cells, outcome.verdict) == (4, "agrees")
    assert outcome.figure == pytest.approx(1.25)
    reverse = finding(
        kind="beats-on", better=["copy"], than=["table"], on=["chat", "qa", "maths", "translation"]
    )
    assert judge(reverse, trials).verdict == "disagrees"
    elsewhere = [trials[0], drafter("copy", **copy)]
    elsewhere[1] = trial("copy", 0.0, 1.0, settings={}, hardware="gpu", scores=elsewhere[1].scores)
    assert judge(asked, elsewhere).verdict == "not measured yet"


def test_draws_of_a_baseline_count_as_their_mean_and_its_variants_as_something_else() -> None:
    draws = [
        trial("random", b, kept, key=f"{b}-{seed}", settings={"keep_ratio": b, "seed": seed})
        for b in BUDGETS
        for seed, kept in enumerate((0.4, 0.8))
    ]
    inside = [trial("random", b, 0.9, settings={"keep_ratio": b, "layer": 2}) for b in BUDGETS]
    rivals = [trial(m, b, k) for b in BUDGETS for m, k in (("one", 0.59), ("two", 0.61))]
    outcome = judge(finding(kind="holds-up", baseline="random"), draws + inside + rivals)
    assert (outcome.figure, outcome.cells) == (0.5, 10)
    winners = finding(kind="no-winner").test.cells(draws + inside + rivals)
    assert set(winners) == {"random layer=2"}


def loyal(method: str, budget: float, accuracy: float, loyalty: float) -> Trial:
    made = trial(method, budget, accuracy)
    same = Score("loyalty", ("a",), (loyalty,), loyalty, 0.0, None, None, None, "1")
    return replace(made, scores={**made.scores, "loyalty": same})


def test_answers_that_change_are_counted_where_the_accuracy_stands() -> None:
    flips = finding(kind="flips", nearly=0.95)
    trials = [loyal("one", b, 0.99, 0.8) for b in BUDGETS] + [loyal("two", b, 0.5, 0.3) for b in BUDGETS]
    outcome = judge(flips, trials)
    assert (outcome.figure, outcome.cells, outcome.verdict) == (pytest.approx(0.2), 5, "agrees")
    steady = [loyal("one", b, 0.99, 0.97) for b in BUDGETS]
    assert judge(flips, steady).verdict == "disagrees"


def test_the_share_of_the_prefill_that_choosing_takes() -> None:
    def timed(budget: float, selection: float) -> Trial:
        rows = [
            ("p", "prefill-time", "dense", 20.0, 0.1, "ms"),
            ("p", "prefill-time", "method", 10.0, 0.1, "ms"),
            ("p", "selection-time", "method", selection, 0.1, "ms"),
        ]
        return replace(trial("one", budget, 1.0), scores=scores_of(rows))

    cheap = judge(finding(kind="cheap-selection"), [timed(b, 0.1) for b in BUDGETS])
    assert (cheap.figure, cheap.verdict) == (pytest.approx(0.01), "agrees")
    dear = judge(finding(kind="cheap-selection"), [timed(b, 5.0) for b in BUDGETS])
    assert (dear.figure, dear.verdict) == (pytest.approx(0.5), "disagrees")


def test_what_nothing_here_can_answer_says_why() -> None:
    outcome = judge(finding(kind="untestable", reason="one size only"), [trial("one", 0.1, 0.5)])
    assert (outcome.verdict, outcome.figure, outcome.trials) == ("not testable here", None, ())
    with pytest.raises(ValidationError, match="reason"):
        finding(kind="untestable")


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    draw = random.Random(1)
    hits = 0
    for repeat in range(60):
        cells = [draw.gauss(3.0, 1.0) for _ in range(40)]
        low, high = interval(cells, fmean, seed=repeat)
        hits += low <= 3.0 <= high
    assert 51 <= hits <= 60
    assert interval(cells, fmean) == interval(cells, fmean)


def test_shipped_findings_name_cards_methods_and_qualities_that_exist() -> None:
    cards = load_cards()
    for found in load_findings():
        assert found.card in cards
        assert isinstance(found.test, Untestable) or found.test.quality in SCORED
        named = found.test.model_dump(include={"better", "than", "baseline"}).values()
        for value in named:
            assert ({value} if isinstance(value, str) else set(value)) <= cards.keys(), found.slug


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slug = 'a'", "title: Field required"),
        ("slug = ", "findings/a.toml: "),
        (
            "slug='b'\ntitle='t'\nclaim='c'\nsource='s'\ncard='x'\ntest={kind='no-winner'}",
            "not the name of the file",
        ),
        ("slug='a'\ntitle='t'\nclaim='c'\nsource='s'\ncard='x'\ntest={kind='oracle'}", "'oracle'"),
        (
            "slug='a'\ntitle='t'\nclaim='c'\nsource='s'\ncard='x'\ntest={kind='no-winner', x=1}",
            "Extra inputs",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(CatalogError, match=r"findings/a\.toml") as caught:
        load_findings(tmp_path)
    assert said in str(caught.value)
