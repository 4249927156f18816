"""Examining a vision-language model on canvases of pictures that the reference VLM has never seen.

Every question is put alone, as a user would put it, and answered greedily; an answer is right when it is the expected
one, word for word. Beside each accuracy stands what the best constant answer would reach, and what is left when the
image tokens around the asked place have changed places with tokens from elsewhere: a model that looks gets worse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, Field

from zoo.bench.retention import loyalty
from zoo.bench.scoring import interval
from zoo.errors import Refused
from zoo.reference.canvases import SIDE, Canvas, paint
from zoo.reference.questions import ABILITIES, Question, questions

if TYPE_CHECKING:
    from zoo.interface import Method, Stack
    from zoo.models import LoadedModel

NEW_TOKENS = 8
"""Longer than any answer: six digits, the space before them and the end."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exercise:
    """One question and the canvas that it is about."""

    canvas: Canvas
    question: Question


class Grade(BaseModel):
    """How one ability did."""

    questions: int
    right: int
    accuracy: float
    low: float = Field(description="Lower end of the 95% bootstrap interval over questions.")
    high: float = Field(description="Upper end.")
    chance: float = Field(
        description="Accuracy of the answer that is right most often, given to all questions."
    )
    displaced: float | None = Field(
        None,
        description="Accuracy when half of the image tokens, those around the asked place, are elsewhere.",
    )
    method: float | None = Field(None, description="Accuracy with a method at work.")
    loyalty: float | None = Field(
        None, description="Fraction of answers that the method leaves as they are, right or wrong."
    )


def exercises(ability: str, wanted: int, seed: int = 0) -> list[Exercise]:
    """Questions on one ability, each about a canvas of its own, painted with held-out pictures.

    The same seed gives the same exercises, and a smaller number the beginning of a larger one.

    Raises:
        ValueError: there is no such ability.
    """
    if ability not in ABILITIES:
        raise ValueError(f"there is no ability called '{ability}'; there are {', '.join(ABILITIES)}")
    found = list[Exercise]()
    strip = True if ability == "digits" else None
    for number in count(seed * 1_000_003):
        canvas = paint("test", number, strip)
        random = np.random.default_rng((number, ABILITIES.index(ability)))
        asked = [question for question in questions(canvas, random) if question.ability == ability]
        found += [Exercise(canvas, question) for question in asked[:1]]
        if len(found) >= wanted:
            return found[:wanted]
    raise AssertionError("there is always another canvas")


def answers(
    loaded: LoadedModel,
    asked: Sequence[Exercise],
    *,
    generate: Callable[..., torch.Tensor] | None = None,
    batch: int = 16,
    progress: Progress | None = None,
    displace: int | None = None,
) -> list[str]:
    """What a model answers, without the space around it.

    Args:
        loaded: a vision-language model with a processor.
        asked: the exercises.
        generate: as ``model.generate``; that of an applied method, say. ``None`` for the model's own.
        batch: questions at once.
        progress: called with what is done.
        displace: seed of the permutation that takes image tokens away from the asked place; ``None`` = none is moved.

    Raises:
        Refused: not a vision-language model with one projector; or, to displace tokens, not one token per patch.
    """
    if loaded.anatomy.kind != "vlm" or loaded.processor is None:
        raise Refused(
            f"canvases are shown to vision-language models; this model has the architecture "
            f"{loaded.anatomy.description}"
        )
    ask = generate or loaded.model.generate
    given = list[str]()
    for first in range(0, len(asked), batch):
        if progress is not None:
            progress("answering questions about canvases", first, len(asked))
        part = asked[first : first + batch]
        inputs = _inputs(loaded, part)
        with torch.no_grad(), _displaced(loaded, part, displace):
            ids = ask(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        given += [text.strip() for text in loaded.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return given


def _inputs(loaded: LoadedModel, asked: Sequence[Exercise]) -> dict[str, Any]:
    """Model inputs of several questions, padded on the left."""
    from PIL import Image

    processor = loaded.processor
    prompts = []
    for exercise in asked:
        content = [{"type": "image"}, {"type": "text", "text": exercise.question.text}]
        if getattr(processor, "chat_template", None):
            turn = [{"role": "user", "content": content}]
            prompts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
        else:
            prompts.append(f"{processor.image_token}{exercise.question.text}")
    pictures = [[Image.fromarray(exercise.canvas.pixels)] for exercise in asked]
    inputs = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    pixels = inputs["pixel_values"].to(loaded.dtype)
    return {name: value.to(loaded.device) for name, value in {**inputs, "pixel_values": pixels}.items()}


@contextmanager
def _displaced(loaded: LoadedModel, asked: Sequence[Exercise], seed: int | None) -> Iterator[None]:
    """Let the projector put out the image tokens of these exercises in the order of ``displacement``."""
    if seed is None:
        yield
        return
    projector = loaded.anatomy.projector
    assert projector is not None, "a vision-language model has a projector"

    def move(module: Any, args: Any, tokens: torch.Tensor) -> torch.Tensor:
        side = round(tokens.shape[-2] ** 0.5)
        if tokens.ndim != 3 or len(tokens) != len(asked) or side * side != tokens.shape[1]:
            raise Refused("tokens can be displaced where each picture gives one square of them")
        orders = [
            displacement(exercise.question, side, (seed, place)) for place, exercise in enumerate(asked)
        ]
        order = torch.from_numpy(np.stack(orders)).to(tokens.device)
        return tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))

    hook = projector.register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def displacement(question: Question, side: int, seed: int | tuple[int, ...]) -> np.ndarray[Any, Any]:
    """An order of ``side * side`` tokens in which the half around the asked place and the other half change places.

    Args:
        question: without a region, a random half changes places with the other one.
        side: tokens on a side of the picture; the number of tokens must be even.
        seed: of the order within each half.

    Returns:
        Which token stands at each place, ``[side * side]``: a permutation that leaves no token in its half.
    """
    random = np.random.default_rng(seed)
    middles = (np.arange(side) + 0.5) * SIDE / side
    distance = np.full((side, side), np.inf) if question.regions else random.random((side, side))
    for box in question.regions:
        across = np.maximum(np.maximum(box.left - middles, middles - box.right), 0)
        down = np.maximum(np.maximum(box.top - middles, middles - box.bottom), 0)
        distance = np.minimum(distance, np.hypot(down[:, None], across[None, :]))
    ranked = np.lexsort((random.random(side * side), distance.ravel()))
    near, far = ranked[: side * side // 2], ranked[side * side // 2 :]
    order = np.empty(side * side, dtype=np.int64)
    order[near], order[far] = random.permutation(far), random.permutation(near)
    return order


def accuracy(asked: Sequence[Exercise], given: Sequence[str]) -> float:
    """Fraction of answers that are the expected ones, word for word."""
    return fmean(exercise.question.answer == answer for exercise, answer in zip(asked, given, strict=True))


def grade(asked: Sequence[Exercise], given: Sequence[str], **others: float) -> Grade:
    """Compare answers with what was expected; ``others`` are further fields."""
    expected = [exercise.question.answer for exercise in asked]
    right = [a == b for a, b in zip(expected, given, strict=True)]
    low, high = interval([float(value) for value in right])
    return Grade(
        questions=len(asked),
        right=sum(right),
        accuracy=accuracy(asked, given),
        low=low,
        high=high,
        chance=max(Counter(expected).values()) / len(expected),
        **others,
    )


def examine(
    loaded: LoadedModel,
    abilities: Sequence[str] = ABILITIES,
    *,
    method: Method | Stack | None = None,
    wanted: int = 200,
    seed: int = 0,
    batch: int = 16,
    displaced: bool = True,
    progress: Progress | None = None,
) -> dict[str, Grade]:
    """Grades by ability.

    Args:
        loaded: a vision-language model.
        abilities: some of ``ABILITIES``.
        method: asked the same, at work on the model.
        wanted: questions on each.
        seed: of canvases and displacement.
        batch: questions at once.
        displaced: ask the unmodified model again with displaced tokens.
        progress: called with what is done.

    Raises:
        Refused: as ``answers``, or the method does not suit the model.
    """
    grades = {}
    for ability in abilities:
        asked = exercises(ability, wanted, seed)
        tell = None if progress is None else _about(progress, ability)
        given = answers(loaded, asked, batch=batch, progress=tell)
        others: dict[str, float] = {}
        if displaced:
            away = answers(loaded, asked, batch=batch, progress=tell, displace=seed)
            others["displaced"] = accuracy(asked, away)
        if method is not None:
            with method.apply(loaded) as applied:
                pruned = answers(applied.loaded, asked, generate=applied.generate, batch=batch, progress=tell)
            others |= {"method": accuracy(asked, pruned), "loyalty": loyalty(pruned, given)}
        grades[ability] = grade(asked, given, **others)
    return grades


def _about(progress: Progress, ability: str) -> Progress:
    return lambda what, done, total: progress(f"{ability}: {what}", done, total)
