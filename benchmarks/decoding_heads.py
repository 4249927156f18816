"""What drafters of ``benchmarks/decoding.py`` need besides the target: a smaller model, text, trained heads.

Heads are trained as ``zoo train`` does, for some minutes, and kept in the zoo's cache folder. They learn from what the
model itself answers to prompts that are not measured (the self-distillation of Medusa, 2401.10774, section 2.3.2): a
drafter has to guess the model's words, whatever a reference text says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from decoding_tasks import lessons

import zoo
from zoo.dialogues import Dialogue
from zoo.engines.language_modelling import prompt_ids
from zoo.engines.self_responses import respond
from zoo.methods.decoding._eagle_head import EagleHead
from zoo.methods.decoding._medusa_heads import MedusaHeads
from zoo.models import LoadedModel
from zoo.models.packages import home
from zoo.training import MODEL, RECORD, TrainingRecord

Say = Callable[[str], None]
ANSWERS, ANSWER_TOKENS, LENGTH = 48, 128, 256
TRAININGS: dict[str, dict[str, Any]] = {
    "medusa": {
        "parameters": {"train_heads": 3, "own_output": False},
        "recipe": {"learning_rate": 2e-3, "steps": 60, "batch": 4, "accumulate": 1},
    },
    "eagle": {"recipe": {"learning_rate": 1e-3, "clip": 1.0, "clip_by": "norm", "steps": 60, "batch": 4}},
}
"""Heads that share the model's output layer, since reading one of their own takes as long as a third of the model; and
steps for minutes on one CPU thread instead of the papers' day on a GPU, hence the higher rates."""


DRAFT_SPARSITY = 0.5
"""Share of the target's layers that the draft model lacks. It is not retrained, so it drafts badly: no registry
carries a small model with the target's vocabulary."""


def draft_model(loaded: LoadedModel) -> LoadedModel:
    """The target without half of its layers (ShortGPT)."""
    pruner = zoo.method("shortgpt", sparsity=DRAFT_SPARSITY)
    return pruner.apply(loaded, samples=8, length=128).loaded


def resources(slug: str, loaded: LoadedModel, draft: LoadedModel | None, say: Say = print) -> dict[str, Any]:
    """What ``apply`` of a method takes besides the model."""
    if slug == "speculative-sampling":
        return {"draft": draft}
    if slug == "medusa":
        return {"heads": MedusaHeads.open(heads(slug, loaded, say), loaded)}
    if slug == "eagle":
        return {"heads": EagleHead.open(heads(slug, loaded, say), loaded)}
    return {}


def described(resources: Mapping[str, Any]) -> dict[str, Any]:
    """The same in words that a record can keep."""
    words: dict[str, Any] = {}
    if "draft" in resources:
        words["draft model"] = f"the target without {DRAFT_SPARSITY:.0%} of its layers (shortgpt)"
    if "heads" in resources:
        words["heads"] = {**resources["heads"].sizes, "training": TRAININGS[resources["heads"].method]}
    return words


def folder(slug: str, loaded: LoadedModel) -> Path:
    """Where the heads of a method for a model are kept."""
    return (
        home()
        / "draft-heads"
        / f"{slug}-{Path(loaded.ref).name}-{(loaded.revision or 'local').rpartition(':')[2][:8]}"
    )


def heads(slug: str, loaded: LoadedModel, say: Say = print) -> Path:
    """The heads, trained when they are not there yet; a training that was cut off goes on."""
    place = folder(slug, loaded)
    if not (place / MODEL).exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        say(f"training {slug} heads into {place}")
        begun = time.perf_counter()
        zoo.train(
            slug,
            loaded,
            answers(loaded, place.with_name(f"answers-{place.name.partition('-')[2]}.jsonl"), say),
            output=place,
            length=LENGTH,
            resume=place.exists(),
            on_step=lambda step: say(
                f"{slug} step {step.step} of {step.steps}: loss {step.loss:.3f}, {time.perf_counter() - begun:.0f} s"
            ),
            **TRAININGS[slug],
        )
    record = TrainingRecord.model_validate_json((place / RECORD).read_text(encoding="utf-8"))
    figures = ", ".join(
        f"{name} {record.before[name]:.3f} -> {value:.3f}" for name, value in record.after.items()
    )
    say(f"{slug} heads: {record.steps} steps, {record.seconds:.0f} s, {record.terms} tokens; {figures}")
    return place


def answers(loaded: LoadedModel, file: Path, say: Say) -> list[Dialogue]:
    """What the model answers to ``lessons``, kept in ``file``."""
    asked = lessons(ANSWERS)
    found = respond(
        loaded,
        [prompt_ids(loaded.tokenizer, prompt) for prompt in asked],
        file,
        new_tokens=ANSWER_TOKENS,
        temperature=0.5,
        top_p=0.95,
        seed=0,
        progress=lambda done, total: say(f"answers to learn from: {done} of {total}"),
    )
    said = (loaded.tokenizer.decode(item.ids[item.start :], skip_special_tokens=True) for item in found)
    return [Dialogue(prompt, answer) for prompt, answer in zip(asked, said, strict=True)]
