from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo.bench.session import Arm
from zoo.bench.tasks import Desk, make_task
from zoo.errors import Refused
from zoo.models import LoadedModel
from zoo.reference.canvases import Box
from zoo.reference.examination import _inputs, answers, displacement, examine, exercises, grade
from zoo.reference.questions import ABILITIES, Question


@pytest.fixture
def loaded(assembled: tuple[Any, Any]) -> LoadedModel:
    return LoadedModel(*assembled)


def oracle(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, asked: list[Any], wrong: int = 0) -> None:
    """Let ``generate`` give the expected answers, the first ``wrong`` ones excepted."""
    texts = [exercise.question.answer for exercise in asked]
    texts[:wrong] = ["nothing"] * wrong
    left = iter(texts)

    def generate(**inputs: Any) -> torch.Tensor:
        ids = inputs["input_ids"]
        given = [loaded.tokenizer(f" {next(left)}", add_special_tokens=False)["input_ids"] for _ in ids]
        longest = max(map(len, given))
        end = torch.tensor([row + [loaded.tokenizer.eos_token_id] * (longest - len(row)) for row in given])
        return torch.cat((ids, end), dim=1)

    monkeypatch.setattr(loaded.model, "generate", generate)


@pytest.mark.parametrize("ability", ABILITIES)
def test_exercises_are_reproducible_and_one_per_canvas(ability: str) -> None:
    few, many = exercises(ability, 3), exercises(ability, 6)
    assert [one.question for one in many[:3]] == [one.question for one in few]
    assert {one.question.ability for one in many} == {ability}
    assert len({one.canvas.pixels.tobytes() for one in many}) == 6
    assert exercises(ability, 3, seed=1)[0].question != few[0].question or ability in ("digits",)
    with pytest.raises(ValueError, match="no ability called"):
        exercises("juggling", 1)


def test_right_answers_are_counted(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    asked = exercises("digits", 7)
    oracle(monkeypatch, loaded, asked, wrong=2)
    graded = grade(asked, answers(loaded, asked, batch=3))
    assert (graded.right, graded.questions) == (5, 7)
    assert graded.accuracy == pytest.approx(5 / 7)
    assert 0 < graded.low < graded.accuracy < graded.high <= 1
    assert graded.chance == pytest.approx(1 / 7), "the best constant answer"


def test_batches_are_answered_as_single_questions(loaded: LoadedModel) -> None:
    asked = [*exercises("compare", 3), *exercises("recognition", 3)]
    assert answers(loaded, asked, batch=6) == answers(loaded, asked, batch=1)


def test_displacement_moves_every_token_into_the_other_half() -> None:
    question = Question("recognition", "What is at the top left?", "cat", (Box(0, 0, 42, 42),))
    order = displacement(question, 8, 0)
    assert sorted(order) == list(range(64))
    shown = {place for place in range(64) if place // 8 < 3 and place % 8 < 3}
    assert shown.isdisjoint(order[list(shown)]), "what was there is elsewhere"
    stays = displacement(Question("counting", "How many pictures?", "two"), 8, 0)
    assert sorted(stays) == list(range(64))
    assert not np.array_equal(order, displacement(question, 8, 1))


def test_displaced_tokens_change_what_the_decoder_sees_and_nothing_afterwards(loaded: LoadedModel) -> None:
    asked = exercises("recognition", 2)
    model, seen = loaded.model.model, list[torch.Tensor]()
    patches = _inputs(loaded, asked)["input_ids"] == loaded.model.config.image_token_id

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] == patches.shape[1]:
            seen.append(kwargs["inputs_embeds"][patches].view(2, 64, -1))

    hook = model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    plain = answers(loaded, asked)
    answers(loaded, asked, displace=3)
    hook.remove()
    before, after = seen
    for row, exercise in enumerate(asked):
        order = displacement(exercise.question, 8, (3, row))
        assert torch.equal(before[row][order], after[row])
    assert not model.multi_modal_projector._forward_hooks
    assert answers(loaded, asked) == plain


def test_other_models_are_refused() -> None:
    with pytest.raises(Refused, match="llama"):
        answers(zoo.load_model("tiny-llama"), exercises("digits", 1))


def test_a_method_is_set_beside_the_unmodified_model(loaded: LoadedModel) -> None:
    method = zoo.method("divprune", keep_ratio=1.0)
    graded = examine(loaded, ["existence"], method=method, wanted=3, displaced=False)["existence"]
    assert (graded.method, graded.loyalty, graded.displaced) == (graded.accuracy, 1.0, None)


@pytest.mark.parametrize("ability", ABILITIES)
def test_tasks_ask_both_sides(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, ability: str) -> None:
    task = make_task(ability, limit=4, batch=2)
    asked = exercises(ability, 4)
    oracle(monkeypatch, loaded, asked)
    (accuracy,) = task.run(Arm(loaded), None, desk := Desk())
    assert accuracy.dense is not None
    assert (accuracy.dense.items, accuracy.method) == ("1111", None)
    oracle(monkeypatch, loaded, asked, wrong=1)
    method = zoo.method("divprune", keep_ratio=0.5)
    accuracy, loyalty = task.run(Arm(loaded), Arm(loaded, [method]), desk)
    assert accuracy.method is not None
    assert loyalty.method is not None
    assert (accuracy.method.items, loyalty.method.items) == ("0111", "0111")
    assert ability in accuracy.task
