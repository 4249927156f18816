"""Tasks: their figures against slow ones made by hand, both sides on one model, and the registry."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.bench.scoring import bootstrap, fraction, interval
from zoo.bench.session import Arm
from zoo.bench.tasks import Desk, Kept, Task, make_task, task, tasks
from zoo.data import load_texts
from zoo.errors import BadInput, BadParameter, RunFailed
from zoo.models import LoadedModel
from zoo.question_data import QUESTIONS, Question
from zoo.runner import run, stored_form


@pytest.fixture(scope="module")
def dense() -> LoadedModel:
    return zoo.load_model("tiny-llama", device="cpu")


@pytest.fixture(scope="module")
def other(dense: LoadedModel) -> LoadedModel:
    """The same architecture and tokenizer, other weights."""
    from zoo.models.tiny import tiny_model

    model, processor = tiny_model("tiny-llama", seed=1)
    return LoadedModel(model, processor)


def windows_of(loaded: LoadedModel, text: Path, length: int, count: int) -> torch.Tensor:
    ids = loaded.tokenizer("\n\n".join(load_texts(text)), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: length * count]).view(count, length)


def test_perplexity_and_agreement_are_those_of_the_definition(
    dense: LoadedModel, other: LoadedModel, text: Path
) -> None:
    options: dict[str, Any] = {"text": str(text), "length": 12, "tokens": 50}
    windows = windows_of(dense, text, 12, 4)
    with torch.no_grad():
        logs = [part.model(windows).logits[:, :-1].log_softmax(-1) for part in (dense, other)]
    losses = [-log.gather(-1, windows[:, 1:, None]).mean().item() for log in logs]
    (row,) = make_task("perplexity", **options).run(Arm(dense), Arm(other), Desk())
    assert row.dense is not None
    assert row.method is not None
    assert row.task == "tale.txt, 4 x 12 tokens"
    assert [row.dense.median, row.method.median] == pytest.approx(
        [math.exp(loss) for loss in losses], rel=1e-5
    )
    assert row.method.n == 44

    agreement, kl = make_task("agreement", **options).run(Arm(dense), Arm(other), Desk())
    same = (logs[0].argmax(-1) == logs[1].argmax(-1)).float().mean().item()
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()
    assert agreement.method is not None
    assert kl.method is not None
    assert (agreement.method.median, kl.method.median) == pytest.approx((same, divergence), rel=1e-4)


def test_both_sides_may_share_a_model(text: Path) -> None:
    """A method that hooks the model is at work on its own side only."""
    loaded = zoo.load_model("tiny-llama", device="cpu")
    method = zoo.method("prompt-lookup")
    options: dict[str, Any] = {"text": str(text), "length": 12, "tokens": 24}
    agreement, kl = make_task("agreement", **options).run(Arm(loaded), Arm(loaded, [method]), Desk())
    assert agreement.method is not None
    assert kl.method is not None
    assert (agreement.method.median, kl.method.median) == (1.0, 0.0)


def test_a_broken_model_is_told(dense: LoadedModel, text: Path) -> None:
    from zoo.models.tiny import tiny_model

    model, processor = tiny_model("tiny-llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    broken = LoadedModel(model, processor, ref="broken-one")
    options: dict[str, Any] = {"text": str(text), "length": 12, "tokens": 24}
    for name in ("perplexity", "agreement"):
        with pytest.raises(RunFailed, match="broken"):
            make_task(name, **options).run(Arm(dense), Arm(broken), Desk())
    with pytest.raises(BadInput, match="reads 4096 tokens"):
        make_task("perplexity", text=str(text), length=5000).run(Arm(dense), None, Desk())


QUESTIONNAIRE = [
    Question("Is water wet?", ("yes", "it is certainly not so"), 0),
    Question("Which is larger?", ("an ant", "a house", "a mountain range"), 2),
    Question("What falls?", ("rain", "up"), 0),
]


def test_multiple_choice_takes_the_likeliest_answer_per_character(
    dense: LoadedModel, other: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zoo.question_data

    monkeypatch.setattr(zoo.question_data, "load_questions", lambda name, limit: QUESTIONNAIRE[:limit])

    def score(loaded: LoadedModel, question: Question, option: str) -> float:
        """One sequence at a time, without padding."""
        beginning = loaded.tokenizer(f"Question: {question.text}\nAnswer:")["input_ids"]
        ids = torch.tensor([loaded.tokenizer(f"Question: {question.text}\nAnswer: {option}")["input_ids"]])
        with torch.no_grad():
            logs = loaded.model(ids).logits.log_softmax(-1)[0]
        places = range(len(beginning), ids.shape[1])
        return sum(logs[place - 1, ids[0, place]].item() for place in places) / len(option)

    picks = [
        [max(range(len(q.options)), key=lambda n: score(loaded, q, q.options[n])) for q in QUESTIONNAIRE]
        for loaded in (dense, other)
    ]
    accuracy, loyalty = make_task("multiple-choice").run(Arm(dense), Arm(other), Desk())
    right = [
        "".join("01"[pick == q.right] for pick, q in zip(own, QUESTIONNAIRE, strict=True)) for own in picks
    ]
    assert accuracy.dense is not None
    assert accuracy.method is not None
    assert loyalty.method is not None
    assert [accuracy.dense.items, accuracy.method.items] == right
    assert accuracy.method.median == right[1].count("1") / 3
    assert loyalty.method.items == "".join("01"[a == b] for a, b in zip(*picks, strict=True))


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        (
            "quartz",
            "Eric adds more resistors. The resistance\n\n A: increases\n B: decreases",
            ("Eric adds more resistors. The resistance", ("increases", "decreases")),
        ),
        (
            "social-iqa",
            "Alex found a ring. What next? A: throw it; in the sea; B: keep it; C: leave.",
            ("Alex found a ring. What next?", ("throw it; in the sea", "keep it", "leave")),
        ),
    ],
)
def test_packaged_questions_are_taken_apart(
    name: str, line: str, expected: tuple[str, tuple[str, ...]]
) -> None:
    from zoo.question_data import _read

    question = _read({"input": [{"content": line}], "ideal": "B"}, QUESTIONS[name].form)
    assert (question.text, question.options, question.right) == (*expected, 1)


def test_dense_answers_are_made_once(dense: LoadedModel, other: LoadedModel, text: Path) -> None:
    asked: list[str] = []
    short = make_task("perplexity", text=str(text), length=8, tokens=16)

    class Counting(Arm):
        def forward(self, inputs: Any) -> Any:
            asked.append("dense")
            return super().forward(inputs)

    kept = Kept()
    rows = [short.run(Counting(dense), Arm(other), Desk(kept=kept)) for _ in range(3)]
    assert len(asked) == 2  # two windows, once
    assert rows[0] == rows[1] == rows[2]
    longer = make_task("perplexity", text=str(text), length=8, tokens=24)
    longer.run(Counting(dense), None, Desk(kept=kept))
    assert len(asked) == 5


def test_outcomes_of_questions_are_stored_with_the_run(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    import zoo.question_data

    monkeypatch.setattr(zoo.question_data, "load_questions", lambda name, limit: QUESTIONNAIRE)
    record = run(
        "magnitude-sp", "tiny-llama", calibration=str(text), calibration_windows=2, store=False,
        task=make_task("multiple-choice"), parameters={"sparsity": 0.5},
    )  # fmt: skip
    row = stored_form(record)
    ((label, outcomes),) = [
        item for item in row["report"]["outcomes"].items() if item[0].startswith("accuracy")
    ]
    assert label == "accuracy: quartz, 3 questions, likelihood per character"
    assert {arm: len(answers) for arm, answers in outcomes.items()} == {"dense": 3, "method": 3}
    assert row["inputs"]["task"] == {"name": "multiple-choice", "data": "quartz", "limit": 200}


def test_the_bootstrap_gives_what_theory_says() -> None:
    right = [True] * 300 + [False] * 100
    figure = fraction(right)
    error = math.sqrt(0.75 * 0.25 / 400)
    assert (figure.median, figure.n, figure.items) == (0.75, 400, "1" * 300 + "0" * 100)
    assert figure.spread == pytest.approx(0.6745 * error, rel=0.1)
    low, high = interval([float(value) for value in right])
    assert (0.75 - low, high - 0.75) == pytest.approx((1.96 * error, 1.96 * error), rel=0.15)
    assert bootstrap([1.0, 2.0], seed=3).tolist() == bootstrap([1.0, 2.0], seed=3).tolist()


def test_the_registry_names_what_is_wrong() -> None:
    assert {"perplexity", "agreement", "multiple-choice"} <= set(tasks())
    with pytest.raises(BadInput, match="did you mean agreement"):
        make_task("agrement")
    with pytest.raises(BadParameter, match="has no option 'size'"):
        make_task("perplexity", size=3)
    with pytest.raises(ValueError, match="two tasks are called 'perplexity'"):

        @task("perplexity")
        class Another(Task):
            """Taken."""


def test_kept_values_leave_before_new_ones_come() -> None:
    import gc
    import weakref

    class Big:
        pass

    kept = Kept()
    old = weakref.ref(kept.once("model", 1, Big))

    def make() -> Big:
        gc.collect()
        assert old() is None
        return Big()

    assert old() is not None
    second = kept.once("model", 2, make)
    assert kept.once("model", 2, make) is second
