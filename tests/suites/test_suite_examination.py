"""A whole suite on a tiny vision-language model: both sides, what is stored, and what stops it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from taxonomy.card import load_cards
from taxonomy.evidence import trials
from taxonomy.exchange import document, import_runs, stored_runs
from taxonomy.runs import results
from zoo.bench.session import Arm
from zoo.bench.tasks import Desk, make_task
from zoo.cli import main
from zoo.errors import BadInput, BadParameter, DownloadFailed, Refused
from zoo.interface import Stack
from zoo.models import LoadedModel
from zoo.runner import run
from zoo.suites import asking, examination
from zoo.suites.examination import Found, Trial, examine, record_summaries, summaries, trials_of
from zoo.suites.rows import Question, read_questions
from zoo.suites.tables import load_suite

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return zoo.load_model("tiny-llava", device="cpu")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["eval", *words])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def say(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, texts: Iterator[str]) -> None:
    """Let the model write these answers, one after the other."""

    def generate(**inputs: Any) -> torch.Tensor:
        ids = inputs["input_ids"]
        given = [loaded.tokenizer(next(texts), add_special_tokens=False)["input_ids"] for _ in ids]
        longest = max(map(len, given))
        end = torch.tensor([row + [loaded.tokenizer.eos_token_id] * (longest - len(row)) for row in given])
        return torch.cat((ids, end), dim=1)

    monkeypatch.setattr(loaded.model, "generate", generate)


def run_suite(loaded: LoadedModel, file: Path, *trials: Trial, **options: Any) -> list[Found]:
    return list(examine(loaded, load_suite(str(file)), trials, place=str(file), **options))


COLOURS = ["Yes", "No", "Yes", "No", "Yes", "No"]


def test_scores_of_both_sides(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, suite_file: Path) -> None:
    dense = [*COLOURS[:5], "Yes"]
    pruned = ["No", *COLOURS[1:5], "Yes"]
    says = [*dense, *pruned, "A", "B", "A", "A", "stop", "no", "stap", "no"]
    say(monkeypatch, loaded, iter(says))
    found = run_suite(loaded, suite_file, Trial(zoo.method("divprune", keep_ratio=0.5), 0.5))
    colours, shapes, signs = (one.result for one in found)
    assert colours is not None
    assert shapes is not None
    assert signs is not None
    # Of the plain kind all four are right, of the odd one half, and no pair.
    assert colours.dense == pytest.approx((1 + 0.25) / 2)
    assert colours.method == pytest.approx(((0.75 + 0.5) / 2 + 0.25) / 2)
    assert colours.loyalty == pytest.approx(5 / 6)
    assert (shapes.dense, shapes.method, shapes.loyalty) == (1.0, 0.5, 0.5)
    assert (signs.dense, signs.method, signs.loyalty) == (0.5, 0.375, 0.5)
    accuracy = next(row for row in found[0].comparisons if row.quantity == "accuracy")
    assert accuracy.dense is not None
    assert accuracy.method is not None
    assert (accuracy.dense.items, accuracy.method.items) == ("111110", "011110")
    assert [row.quantity for row in found[2].comparisons] == ["benchmark-score", "loyalty"]

    ((_, summary),) = summaries(found)
    assert summary.abilities["recognition"].datasets == ["colours", "shapes"]
    assert summary.dense == pytest.approx((0.625 + 1 + 0.5) / 3)
    assert summary.lowest == "shapes"


def test_a_method_that_keeps_everything_answers_as_the_model_does(
    loaded: LoadedModel, suite_file: Path
) -> None:
    found = run_suite(loaded, suite_file, Trial(zoo.method("divprune", keep_ratio=1.0), 1.0), batch=4)
    assert [one.result.loyalty for one in found if one.result] == [1.0, 1.0, 1.0]
    assert [one.kept for one in found] == [(1.0, 1.0)] * 3


def test_batches_are_answered_as_single_questions(loaded: LoadedModel, suite_file: Path) -> None:
    asked = read_questions(load_suite(str(suite_file)).dataset("shapes"))
    one, two = (asking.answers(Arm(loaded), asked, batch, lambda *_: None) for batch in (1, 2))
    assert one == two
    assert all(one), "it writes something"


def test_a_mark_in_the_text_asks_for_no_picture(loaded: LoadedModel, suite_file: Path) -> None:
    (first, _) = read_questions(load_suite(str(suite_file)).dataset("shapes"))
    marked = Question(first.dataset, {**first.row, "question": "Which <image>colour is it?"})
    plain, other = (asking.inputs_of(loaded, [one])["input_ids"] for one in (first, marked))
    assert torch.equal(plain, other)


def test_results_are_stored_as_they_come_and_the_suites_figures_at_the_end(
    loaded: LoadedModel, suite_file: Path
) -> None:
    suite = load_suite(str(suite_file))
    trials = trials_of("divprune", budgets=[0.5, 1.0])
    found = []
    for one in examine(loaded, suite, trials, place=str(suite_file)):
        found.append(one)
        assert len(results()) >= len(found)
    own = results("divprune", reference=False)
    assert len(own) == 6
    keys = record_summaries(suite, found)
    assert len(keys) == 2
    summary = next(run for run in results("divprune", reference=False) if run.key == keys[1])
    figures = {(row.quantity, row.task): row.median for row in summary.measurements if row.arm == "method"}
    assert figures["loyalty", "mini, 3 of 4 datasets"] == 1.0
    assert ("benchmark-score", "mini: recognition, mean of colours, shapes") in figures


def test_what_was_asked_is_part_of_the_run(loaded: LoadedModel, suite_file: Path) -> None:
    (one, *_) = run_suite(loaded, suite_file, Trial(zoo.method("divprune")), store=False, limit=2)
    assert one.record is not None
    task = one.record.inputs["task"]
    assert (task["name"], task["dataset"], task["limit"]) == ("benchmark", "colours", 2)
    assert task["protocol"]["rule"] == "yes-no"
    assert task["protocol"]["groups"] == [["number"]]
    assert results(reference=False) == []


def test_speed_is_measured_on_both_sides(loaded: LoadedModel, suite_file: Path) -> None:
    task = make_task("benchmark", suite=str(suite_file), dataset="signs", timed=1)
    rows = {row.quantity: row for row in task.run(Arm(loaded), Arm(loaded, [zoo.method("divprune")]), Desk())}
    prefill = rows["prefill-time"]
    assert prefill.dense is not None
    assert prefill.method is not None
    assert prefill.gain == pytest.approx(prefill.dense.median / prefill.method.median)
    decode = rows["decode-speed"]
    assert decode.task == "signs, 16 tokens each"


def test_trials() -> None:
    assert trials_of(None) == [Trial()]
    assert [one.budget for one in trials_of("divprune", usual=(0.3, 0.1))] == [0.3, 0.1]
    assert [one.budget for one in trials_of("divprune", {"keep_ratio": 0.2}, usual=(0.3, 0.1))] == [None]
    assert [one.budget for one in trials_of("vtw", usual=(0.3, 0.1))] == [None]
    with pytest.raises(BadInput, match="name it with --method"):
        trials_of(None, budgets=[0.5])
    with pytest.raises(BadInput, match="vtw has no keep_ratio"):
        trials_of("vtw", budgets=[0.5])
    with pytest.raises(BadInput, match="either budgets or"):
        trials_of("divprune", {"keep_tokens": 3}, budgets=[0.5])
    with pytest.raises(BadParameter):
        trials_of("divprune", budgets=[1.5])


def test_other_models_are_refused_before_they_are_loaded(
    monkeypatch: pytest.MonkeyPatch, suite_file: Path
) -> None:
    monkeypatch.setattr("zoo.models.loading.load_model", None)
    suite = load_suite(str(suite_file))
    with pytest.raises(Refused, match="tiny-llama is none"):
        next(examine("tiny-llama", suite, [Trial()]))
    with pytest.raises(Refused, match="vision-language model"):
        next(examine("tiny-llama", suite, trials_of("divprune")))


def test_a_language_model_that_is_loaded_is_refused(suite_file: Path) -> None:
    with pytest.raises(Refused, match="suites are put to vision-language models"):
        run_suite(zoo.load_model("tiny-llama"), suite_file, Trial())


def failing(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """Let the ``at``-th question that is put to a model fail so."""
    put, left = asking.inputs_of, [at]

    def inputs_of(*args: Any) -> dict[str, Any]:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return put(*args)

    monkeypatch.setattr(asking, "inputs_of", inputs_of)


def test_a_later_dataset_that_fails_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, suite_file: Path
) -> None:
    (suite_file.parent / "shapes" / "part-0.jsonl").write_text("{", encoding="utf-8")
    found = run_suite(loaded, suite_file, Trial())
    assert [one.error is None for one in found] == [True, False, True]
    assert "shapes" in (found[1].error or "")
    ((_, summary),) = summaries(found)
    assert summary.datasets == ["colours", "signs"]


def test_a_hub_that_is_out_of_reach_stops_it_at_once(
    monkeypatch: pytest.MonkeyPatch, suite_file: Path
) -> None:
    def gone(*_: object) -> None:
        raise DownloadFailed("colours could not be fetched: no route")

    monkeypatch.setattr("zoo.suites.rows.read_questions", gone)
    monkeypatch.setattr("zoo.models.loading.load_model", None)
    with pytest.raises(BadInput, match="no route; is there a network"):
        next(examine("tiny-llava", load_suite(str(suite_file)), [Trial()], place=str(suite_file)))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(command: Command, suite_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "results.jsonl"
    code, out, err = command(
        "tiny-llava", "--suite", str(suite_file), "--method", "divprune", "--output", str(output)
    )  # fmt: skip
    assert code == 0
    assert "A small suite: tiny-llava, divprune at 0.5" in out, "the suite's own budget"
    assert "left out: essays, whose answers are judged by a teacher" in out
    assert "reconstructed: everything is made up" in out
    assert "signs: only two of them" in out
    assert "visual tokens: 50.0% asked for, 50.0% left on average over the layers" in out
    assert [line.split(",")[0] for line in err.splitlines()] == ["ok colours", "ok shapes", "ok signs"]
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["dataset"] for row in rows] == ["colours", "shapes", "signs"]
    assert len(results("divprune", reference=False)) == 4, "three datasets and the suite"


def test_the_command_in_json_with_some_datasets_of_the_model_alone(
    command: Command, suite_file: Path
) -> None:
    code, out, _ = command(
        "tiny-llava", "--suite", str(suite_file), "--tasks", "signs,rare", "--limit", "1", "--json"
    )  # fmt: skip
    assert code == 0
    body = json.loads(out)
    assert [row["dataset"] for row in body["results"]] == ["signs", "rare"]
    assert body["summaries"][0]["method"] is None
    assert body["left_out"] == {"essays": "a teacher"}


def test_results_of_the_model_alone_are_stored_shown_and_passed_on(
    command: Command, suite_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, _ = command("tiny-llava", "--suite", str(suite_file), "--tasks", "signs,shapes", "--json")
    assert code == 0
    own = results("dense", reference=False)
    assert len(own) == 3, "two datasets and the suite"
    assert {(run.model, run.status) for run in own} == {("tiny-llava", "done")}
    assert {row.arm for run in own for row in run.measurements} == {"dense"}
    assert any(row.task.startswith("mini, 2 of ") for run in own for row in run.measurements)

    assert trials(model="tiny-llava") == [], "there is nothing that a method gained or lost"
    file = tmp_path / "runs.json"
    file.write_text(document(stored_runs(reference=False)), encoding="utf-8")
    monkeypatch.setenv("ZOO_CATALOG", str(tmp_path / "other.sqlite"))
    assert import_runs(file).added == 3
    again = results("dense", reference=False)
    assert [(run.key, run.measurements) for run in again] == [(run.key, run.measurements) for run in own]
    assert import_runs(file).added == 0


def test_interrupted_it_keeps_what_is_done(
    monkeypatch: pytest.MonkeyPatch, command: Command, suite_file: Path
) -> None:
    failing(monkeypatch, 13, KeyboardInterrupt())  # 2 x 6 questions on colours, one on shapes
    code, out, err = command("tiny-llava", "--suite", str(suite_file), "--method", "divprune")
    assert code == 130
    assert "colours" in out
    assert "shapes" not in out
    assert "interrupted: 1 result is complete and stored; go on with --tasks shapes,signs" in err
    stored = {run.status: run for run in results("divprune", reference=False)}
    assert set(stored) == {"done", "interrupted"}
    assert any(row.task == "colours, 6 questions" for row in stored["done"].measurements)


def test_without_a_method_a_run_is_asked_a_task(loaded: LoadedModel, suite_file: Path) -> None:
    task = make_task("benchmark", suite=str(suite_file), dataset="signs")
    record = run(Stack([]), loaded, task=task, store=False)
    assert (record.method, record.parameters, record.reports, record.command) == ("dense", {}, [], "")
    assert [row.method for row in record.comparisons] == [None]
    with pytest.raises(BadInput, match="give a task"):
        run(Stack([]), loaded, store=False)
    assert "dense" not in {card.slug for card in load_cards().values()}, "the name stands for no method"


def test_a_failed_dataset_is_said_with_what_to_do(command: Command, suite_file: Path) -> None:
    (suite_file.parent / "shapes" / "part-0.jsonl").write_text("{", encoding="utf-8")
    code, out, err = command("tiny-llava", "--suite", str(suite_file))
    assert code == 1
    assert "signs" in out
    assert "!! shapes, the model alone: shapes: " in err
    assert "ask them again with --tasks shapes" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tiny-llava", "--suite", "uniprunbench"), "did you mean uniprunebench"),
        (("tiny-llava", "--suite", "uniprunebench", "--tasks", "mia-bench"), "judged by a language model"),
        (("tiny-llama", "--suite", "MINI"), "tiny-llama is none"),
        (("tiny-llava", "--suite", "MINI", "--method", "divprun"), "did you mean divprune"),
        (("tiny-llava", "--suite", "MINI", "--budget", "0.5"), "name it with --method"),
        (("tiny-llava", "--suite", "MINI", "--against", "tiny-llava"), "a suite takes --method"),
        (("tiny-llama", "--tasks", "x", "--method", "divprune"), "go with --suite"),
    ],
)
def test_bad_input_is_one_line(command: Command, suite_file: Path, words: tuple[str, ...], said: str) -> None:
    code, out, err = command(*(str(suite_file) if word == "MINI" else word for word in words))
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_nothing_is_asked_of_a_suite_that_only_a_judge_can_score(
    loaded: LoadedModel, suite_file: Path
) -> None:
    suite = load_suite(str(suite_file))
    only = suite.model_copy(update={"datasets": tuple(suite.judged)})
    with pytest.raises(BadInput, match="can be scored by a rule"):
        next(examination.examine(loaded, only, [Trial()]))
