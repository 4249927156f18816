"""What both sides read: the prompt, with a scene for vision-language models, or the pictures of an encoder.

What it was is noted in the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import data
from zoo.bench.record import RunRecord
from zoo.errors import BadInput
from zoo.runner.request import Job
from zoo.scenes import QUESTION, Scene, load_scene, scene_inputs, wanted_by

if TYPE_CHECKING:
    from zoo.models import LoadedModel

PROMPT = "Explain in a few sentences why the sky is blue during the day and red at sunset."


def text_inputs(job: Job, record: RunRecord, loaded: LoadedModel) -> dict[str, Any]:
    """What ``generate`` takes for the prompt (and the scene), on the model's device, batch 1.

    Raises:
        BadInput: the model cannot read it, or has no room for it and an answer.
    """
    from zoo.bench.scenarios.decoding import NEW_TOKENS

    request = job.request
    if job.kind == "vlm":
        prompt = request.prompt or QUESTION
        inputs: Mapping[str, Any] = scene_inputs(loaded, _scene(job, record), prompt, request.raw)
    else:
        if loaded.tokenizer is None:
            raise BadInput(f"{loaded.ref} has no tokenizer, so it cannot read a prompt")
        prompt = request.prompt or _default_prompt(job)
        inputs = _tokens(loaded.tokenizer, prompt, request.raw)
    record.inputs["prompt"] = prompt
    room = context(loaded) - (job.settings.new_tokens or NEW_TOKENS)
    length = inputs["input_ids"].shape[1]
    if length > room:
        raise BadInput(
            f"the prompt has {length} tokens, and {loaded.ref} has room for {max(0, room)} beside the answer; "
            "shorten it, or lower --max-new-tokens"
        )
    record.inputs["prompt tokens"] = length
    return on_device(loaded, inputs)


def picture_inputs(job: Job, record: RunRecord, loaded: LoadedModel) -> dict[str, Any]:
    """What an encoder takes for the pictures: ``pixel_values [B, 3, H, W]``, on its device and in its type.

    Raises:
        BadInput: the model, or a file, cannot be used for it.
    """
    if loaded.processor is None:
        raise BadInput(f"{loaded.ref} has no image processor, so it cannot read a picture")
    scene = load_scene("pictures", job.request.images)
    record.inputs["images"] = list(scene.source)
    values = loaded.processor(images=list(scene.pictures), return_tensors="pt")["pixel_values"]
    return {"pixel_values": values.to(loaded.device, loaded.dtype)}


def on_device(loaded: LoadedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``inputs`` on the model's device, floating-point ones in its type."""
    return {
        name: value.to(loaded.device, loaded.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def context(loaded: LoadedModel) -> int:
    """Positions the model has; a large number where it states none."""
    config = loaded.model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def _scene(job: Job, record: RunRecord) -> Scene:
    """The pictures or the video asked for, or what suits the methods."""
    request = job.request
    scene = load_scene(wanted_by(job.methods), request.images, request.video, request.frames)
    record.inputs["video" if scene.video else "images"] = list(scene.source)
    if scene.video:
        record.inputs["frames"] = len(scene.pictures)
    if scene.note:
        record.notes.append(scene.note)
    return scene


def _default_prompt(job: Job) -> str:
    return data.COPY_PROMPT if "decoding" in job.phases else PROMPT


def _tokens(tokenizer: Any, prompt: str, raw: bool) -> dict[str, Any]:
    """The prompt as ids and mask ``[1, T]``; in the model's chat template when it has one."""
    if getattr(tokenizer, "chat_template", None) and not raw:
        return dict(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    found = tokenizer(prompt, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}
