"""Questions with pictures to a vision-language model: what it answers, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from zoo.bench.record import Comparison, Figure, compare
from zoo.bench.session import Arm, Progress, greedy
from zoo.bench.timing import Samples, Version, alternate
from zoo.errors import BadInput, Refused
from zoo.models import LoadedModel
from zoo.runner import on_device
from zoo.suites.rows import Question

STEPS = 16
"""Decoding steps that are timed."""
REPEATS = 3
"""Timed rounds per question."""


def check_model(loaded: LoadedModel) -> None:
    """Raise ``Refused`` unless the model sees pictures and writes."""
    if loaded.anatomy.kind != "vlm" or loaded.processor is None:
        raise Refused(
            f"suites are put to vision-language models; this model has the architecture {loaded.anatomy.description}"
        )


def answers(arm: Arm, questions: Sequence[Question], batch: int, progress: Progress) -> list[str]:
    """What one side answers, greedily.

    Args:
        arm: the model, with its methods at work meanwhile.
        questions: of one dataset.
        batch: questions at once.
        progress: called with what is done.

    Raises:
        Refused: no vision-language model with a processor.
        BadInput: the processor refuses a picture.
    """
    check_model(arm.loaded)
    given: list[str] = []
    with torch.no_grad(), arm.ready() as applied:
        for first in range(0, len(questions), batch):
            part = questions[first : first + batch]
            progress(f"{part[0].dataset.name}: answering", first, len(questions))
            inputs = inputs_of(applied.loaded, part)
            options = greedy(applied.loaded.tokenizer, part[0].dataset.new_tokens)
            new = applied.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            given += applied.loaded.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in given]


def inputs_of(loaded: LoadedModel, questions: Sequence[Question]) -> dict[str, Any]:
    """Model inputs of questions, padded on the left, on the model's device: pictures first, then the text.

    The model's chat template is used where it has one.
    """
    processor = loaded.processor
    mark = getattr(processor, "image_token", "<image>")
    shown = [question.pictures() for question in questions]
    prompts = []
    for question, pictures in zip(questions, shown, strict=True):
        text = question.text.replace(mark, "")  # a mark in the text would ask for one more picture
        if getattr(processor, "chat_template", None):
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
            turn = [{"role": "user", "content": content}]
            prompts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
        else:
            prompts.append(f"{mark * len(pictures)}\n{text}\n")
    images = {"images": [pictures for pictures in shown if pictures]} if any(shown) else {}
    try:
        inputs = processor(text=prompts, padding=True, return_tensors="pt", **images)
    except ValueError as error:  # a picture that is far too thin for its patches, say
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"the processor of {loaded.ref} refuses a question of {questions[0].dataset.name}: {reason}"
        ) from None
    return on_device(loaded, inputs)


# --- speed ------------------------------------------------------------------------------------------------------------


def speeds(
    dense: Arm, method: Arm, questions: Sequence[Question], task: str, progress: Progress
) -> list[Comparison]:
    """Prefill and decoding of both sides, alternating, on each of a few questions.

    EffiVLM-Bench's speed-ups: wall time there, the steady clock of ``zoo.bench.timing`` here. Times of the questions
    are added up, so that long prompts count for what they cost. Decoding is what ``STEPS`` more tokens take after the
    first.

    Returns:
        ``prefill-time`` (mean per question) and, unless noise hides it, ``decode-speed``.
    """
    arms = {"dense": dense, "method": method}
    prefill, decode = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0)
    for number, question in enumerate(questions):
        progress(f"{question.dataset.name}: timing", number, len(questions))
        inputs = inputs_of(dense.loaded, [question])
        versions: dict[str, Version] = {}
        for name, arm in arms.items():
            versions[f"{name} prefill"] = arm.version({**inputs, "use_cache": True, "logits_to_keep": 1})
            versions[f"{name} one"] = partial(_generating, arm, inputs, 1)
            versions[f"{name} more"] = partial(_generating, arm, inputs, 1 + STEPS)
        samples = alternate(versions, dense.loaded.device, repeats=REPEATS)
        for name in arms:
            prefill[name] += _median(samples, f"{name} prefill")
            decode[name] += _median(samples, f"{name} more") - _median(samples, f"{name} one")
    count = len(questions)
    rows = [
        compare(
            "prefill-time",
            *(Figure(median=1000 * prefill[name] / count, n=count) for name in arms),
            task=f"{task}, mean of {count}",
        )
    ]
    if min(decode.values()) > 0:
        rates = (Figure(median=STEPS * count / decode[name], n=count) for name in arms)
        rows.append(compare("decode-speed", *rates, task=f"{task}, {STEPS} tokens each"))
    return rows


def _median(samples: Mapping[str, Samples], name: str) -> float:
    return samples[name].figure().median


@contextmanager
def _generating(arm: Arm, inputs: Mapping[str, Any], tokens: int) -> Iterator[Callable[[], Any]]:
    with torch.no_grad(), arm.ready() as applied:
        options = {**greedy(applied.loaded.tokenizer, tokens), "min_new_tokens": tokens}
        yield lambda: applied.generate(**inputs, **options)
