"""``zoo eval``: its scores are the harness's own, also for pruned models; what cannot be is said in one line."""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zoo
from zoo import evaluation
from zoo.cli import main
from zoo.errors import BadInput, Refused, RunFailed
from zoo.models import LoadedModel

DATA = Path(__file__).parents[1] / "data" / "eval"
FACTS = DATA / "everyday_facts.yaml"
Zoo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Zoo:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what a fixture wrote
        with pytest.raises(SystemExit) as end:
            main(["eval", *words])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The harness, with a data cache of the test's own; tests that want it are left out where it is missing."""
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A saved model whose layers have different widths."""
    words = [f"{number} green bottles hanging on the wall, {number} of them" for number in range(200)]
    applied = zoo.method("flap", sparsity=0.3).apply(
        zoo.load_model("tiny-llama"), calibration=words, samples=2, length=32
    )
    return applied.save(tmp_path / "pruned")


def of_metric(found: evaluation.Evaluation, metric: str) -> evaluation.Score:
    (score,) = (score for score in found.scores if score.metric == metric)
    return score


# --- what needs no harness ----------------------------------------------------------------------------------------


def test_without_the_harness_it_says_what_to_install(command: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # an import of None fails
    code, out, err = command("tiny-llama", "--tasks", str(FACTS))
    assert (code, out) == (2, "")
    assert "pip install 'efficiency-zoo[eval]'" in err
    assert len(err.splitlines()) == 1


def test_a_place_that_cannot_be_written_is_refused_first(command: Zoo, tmp_path: Path) -> None:
    code, _, err = command("tiny-llama", "--tasks", str(FACTS), "--output", str(tmp_path))
    assert code == 2
    assert "name a file for the scores" in err


def test_unknown_names_get_the_nearest_ones_and_patterns_are_expanded() -> None:
    names = ["arc_challenge", "arc_easy", "hellaswag"]

    def match(patterns: list[str]) -> list[str]:
        return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]

    manager = SimpleNamespace(all_tasks=names, match_tasks=match)
    assert evaluation._named(manager, "arc_*") == names[:2]
    with pytest.raises(BadInput, match="no task 'helaswag'; did you mean hellaswag"):
        evaluation._named(manager, "helaswag")


def results(values: list[float], aggregate: float) -> dict[str, Any]:
    """What the harness returns for a task with one metric."""
    rows = [{"doc_id": place, "filter": "none", "acc": value} for place, value in enumerate(values)]
    found = {"alias": "t", "sample_len": len(rows), "acc,none": aggregate, "acc_stderr,none": "N/A"}
    return {
        "results": {"t": found},
        "samples": {"t": rows},
        "n-shot": {"t": 0},
        "higher_is_better": {"t": {"acc": True}},
    }


def test_the_error_of_a_difference_is_that_of_paired_answers() -> None:
    mine, theirs = [1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 1.0]
    (score,) = evaluation._scores(results(mine, 0.6), results(theirs, 0.8))
    assert score.model == evaluation.Estimate(value=0.6)
    assert score.difference is not None
    assert score.difference.value == pytest.approx(-0.2)
    steps = [a - b for a, b in zip(mine, theirs, strict=True)]
    assert score.difference.stderr == pytest.approx(statistics.stdev(steps) / 5**0.5)


def test_what_is_no_plain_mean_has_no_such_error() -> None:
    mine, theirs = [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]
    (other_aggregate,) = evaluation._scores(results(mine, 0.9), results(theirs, 1.0))
    (other_documents,) = evaluation._scores(results(mine, 2 / 3), results(theirs[:2], 1.0))
    for score in (other_aggregate, other_documents):
        assert score.difference is not None
        assert score.difference.stderr is None


# --- scores -------------------------------------------------------------------------------------------------------


def likelihoods(loaded: LoadedModel, question: str, choices: list[str]) -> list[float]:
    """Log-likelihood of each answer, one plain forward pass each."""
    found = []
    for choice in choices:
        context = loaded.tokenizer(question)["input_ids"]
        ids = torch.tensor([loaded.tokenizer(f"{question} {choice}")["input_ids"]])
        with torch.no_grad():
            steps = loaded.model(ids).logits[0, :-1].double().log_softmax(-1)
        each = steps.gather(1, ids[0, 1:, None])[len(context) - 1 :]
        found.append(float(each.sum()))
    return found


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("batch", [1, 5])
def test_accuracy_is_that_of_plain_forward_passes(batch: int) -> None:
    loaded = zoo.load_model("tiny-llama")
    rows = [json.loads(line) for line in (DATA / "everyday_facts.jsonl").read_text().splitlines()]
    right, fair = 0, 0
    for row in rows:
        scores = likelihoods(loaded, f"Question: {row['question']}\nAnswer:", row["choices"])
        right += scores.index(max(scores)) == row["answer"]
        per_letter = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        fair += per_letter.index(max(per_letter)) == row["answer"]
    found = zoo.evaluate(loaded, [str(FACTS)], batch=batch)
    assert of_metric(found, "acc").model.value == pytest.approx(right / len(rows))
    assert of_metric(found, "acc_norm").model.value == pytest.approx(fair / len(rows))
    assert {(score.task, score.n, score.shots) for score in found.scores} == {("everyday_facts", 12, 0)}


@pytest.mark.usefixtures("harness")
def test_scores_are_those_of_the_harness_alone(tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    loaded = zoo.load_model("tiny-llama")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    ours = zoo.evaluate(tmp_path / "model", [str(FACTS)], shots=2, limit=8, device="cpu")
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=[evaluation._read_task(FACTS)],
        num_fewshot=2,
        limit=8,
        batch_size=1,
        device="cpu",
        task_manager=TaskManager(include_defaults=False),
    )
    assert theirs is not None
    for score in ours.scores:
        assert score.shots == 2
        assert score.model.value == theirs["results"]["everyday_facts"][f"{score.metric},none"]
        assert score.model.stderr == theirs["results"]["everyday_facts"][f"{score.metric}_stderr,none"]


@pytest.mark.usefixtures("harness")
def test_a_pruned_model_beside_the_dense_one(command: Zoo, pruned: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "scores.json"
    words = (str(pruned), "--tasks", str(DATA), "--against", "tiny-llama", "--limit", "10")
    code, out, err = command(*words, "--dtype", "bfloat16", "--output", str(file))
    assert (code, err) == (0, "")
    header, first, *_ = (line.split("\t") for line in out.splitlines())
    assert header[0] == "task"
    assert first[:2] == ["everyday_facts", "acc ↑"]
    found = evaluation.Evaluation.model_validate_json(file.read_text())
    assert found.model.facts["pruning"]["method"] == "flap"
    assert found.against is not None
    assert found.model.facts["parameters"] < found.against.facts["parameters"]
    assert (found.dtype, found.limit, found.scores[0].n) == ("bfloat16", 10, 10)
    alone = zoo.evaluate(pruned, [str(DATA)], limit=10, dtype="bfloat16")
    assert [score.model for score in alone.scores] == [score.model for score in found.scores]
    for score in found.scores:
        assert score.against is not None
        assert score.difference is not None
        assert score.difference.value == score.model.value - score.against.value


@pytest.mark.usefixtures("harness")
def test_a_loaded_model_and_the_random_state_stay_as_they_are(command: Zoo) -> None:
    loaded = zoo.load_model("tiny-llama")
    loaded.tokenizer.pad_token = None  # the harness sets one
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state()
    found = zoo.evaluate(loaded, [str(FACTS)], against=loaded, shots=1, seed=7, limit=4)
    assert all(score.difference == evaluation.Estimate(value=0, stderr=0) for score in found.scores)
    assert loaded.tokenizer.pad_token is None
    assert all(map(torch.equal, before, loaded.model.parameters()))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    code, out, _ = command("tiny-llama", "--tasks", str(FACTS), "--limit", "2", "--json")
    assert code == 0
    assert json.loads(out)["seed"] is None


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("task: [", "cannot be read"),
        ("group: many\ntask: [a, b]", "describes no single task"),
        ("task: a\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}", "cannot be used"),
        ("task: a\ndoc_to_text: !function nowhere.there", "cannot be read"),
        (None, "there is no task file"),
    ],
)
def test_task_files_that_cannot_be_used(text: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadInput, match=reason):
        zoo.evaluate("tiny-llama", [str(file)])


@pytest.mark.usefixtures("harness")
def test_a_folder_without_tasks_and_no_task_at_all(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text("output_type: multiple_choice")
    (tmp_path / "group.yaml").write_text("group: many\ntask: [arc_easy]")
    with pytest.raises(BadInput, match="holds no task file"):
        zoo.evaluate("tiny-llama", [str(tmp_path)])
    with pytest.raises(BadInput, match="at least one task"):
        zoo.evaluate("tiny-llama", [])


@pytest.mark.usefixtures("harness")
def test_models_that_cannot_answer() -> None:
    with pytest.raises(Refused, match="write text"):
        zoo.evaluate("tiny-vit", [str(FACTS)])
    mute = LoadedModel(zoo.load_model("tiny-llama").model)
    with pytest.raises(BadInput, match="no tokenizer"):
        zoo.evaluate(mute, [str(FACTS)])
    broken = zoo.load_model("tiny-llama")
    broken.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunFailed, match="NaN"):
        zoo.evaluate(broken, [str(FACTS)], limit=2)
