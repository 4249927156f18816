from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.engines.lora import Adapters
from zoo.engines.training import TrainingInterrupted
from zoo.errors import BadInput
from zoo.models import LoadedModel
from zoo.reference import assembly, training
from zoo.reference.canvases import NAMES, paint
from zoo.reference.lessons import Canvases, _asked, _labels, features, pack, predict

pytest.importorskip("peft")
FEW = training.Recipes(
    words=training.WORDS.model_copy(update={"steps": 3, "batch": 2, "warmup": 0}),
    answers=training.ANSWERS.model_copy(update={"steps": 4, "batch": 2, "checkpoint_every": 1}),
    settling=training.SETTLING.model_copy(update={"steps": 2, "batch": 2}),
)


@torch.no_grad()
def test_packed_questions_are_answered_as_if_each_stood_alone(assembled: tuple[Any, Any]) -> None:
    model, processor = assembled
    tokenizer, image = processor.tokenizer, model.config.image_token_id
    canvases = [paint("train", number) for number in (0, 1)]
    seen, rows = features(model, processor, canvases), [_asked(canvas) for canvas in canvases]
    together = predict(model, pack(seen, rows, tokenizer, image))
    alone = [
        predict(model, pack(seen[[number]], [[question]], tokenizer, image))
        for number, row in enumerate(rows)
        for question in row
    ]
    assert sum(map(len, rows)) > 8
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_training_and_generation_see_the_same_prompt(assembled: tuple[Any, Any]) -> None:
    """The logits of the first answer token are those of the model's own forward pass on the processor's input."""
    from PIL import Image

    model, processor = assembled
    canvas = paint("train", 0)
    question = _asked(canvas)[0]
    seen = features(model, processor, [canvas])
    tokenizer = processor.tokenizer
    packed = pack(seen, [[question]], tokenizer, model.config.image_token_id)
    written = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    )
    assert written == f"<|im_start|><image>{question.text}"
    own = processor(
        text=written.replace("<|im_start|>", tokenizer.bos_token),
        images=Image.fromarray(canvas.pixels),
        return_tensors="pt",
        add_special_tokens=False,
    )
    prompt = own["input_ids"].shape[1]
    assert torch.equal(own["input_ids"][0], packed.ids[0, :prompt])
    # The lesson's encoder computes in bfloat16.
    expected = model(**own).logits[0, -1]
    actual = predict(model, packed)[0]
    assert torch.corrcoef(torch.stack((expected, actual)))[0, 1] > 0.999


def test_words_are_those_of_the_pictures_that_cover_a_patch() -> None:
    canvas = paint("train", 1, False)
    labels = _labels([canvas], 8, torch.device("cpu"))
    what = labels.words["what"].view(8, 8)
    for picture in canvas.pictures:
        x, y = (int(middle) * 8 // 112 for middle in picture.box.centre)
        assert NAMES[what[y, x]] == picture.name
        assert labels.words["column"].view(8, 8)[y, x] == picture.box.centre[0] * 3 // 112
        assert labels.words["row"].view(8, 8)[y, x] == picture.box.centre[1] * 3 // 112
    strip = paint("train", 2, True)
    assert strip.strip is not None
    row = (strip.strip.top + strip.strip.bottom) // 2 * 8 // 112
    read = _labels([strip], 8, torch.device("cpu")).words["what"].view(8, 8)[row].tolist()
    digits = [str(word - len(NAMES)) for word in read if len(NAMES) <= word < len(NAMES) + 10]
    assert set(digits) <= set(strip.digits)
    assert digits


def test_examples_are_numbered_on() -> None:
    assert (Canvases(5, 10)[2].pixels == paint("train", 12).pixels).all()
    assert len(Canvases(5, 10)) == 5


def test_what_is_saved_gives_the_trained_model(
    parts: Callable[[], tuple[LoadedModel, LoadedModel]], tmp_path: Path
) -> None:
    model, processor = assembly.assemble(*parts())
    decoder = assembly.language_parts(model)
    adapters = Adapters(model, decoder, [assembly.RANK] * len(decoder.layers))
    with torch.no_grad():
        for parameter in adapters.parameters.values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
        seen = features(model, processor, [paint("train", 0)])
        batch = pack(seen, [_asked(paint("train", 0))], processor.tokenizer, model.config.image_token_id)
        expected = predict(model, batch)
    file = tmp_path / "weights" / "trained.safetensors"
    assembly.save_trained(assembly.trained_tensors(model, adapters.parameters), file)
    fresh, _ = assembly.assemble(*parts(), seed=1)
    before = {name: value.clone() for name, value in fresh.state_dict().items() if "vision" in name}
    assembly.load_trained(fresh, file)
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        torch.testing.assert_close(predict(fresh, batch), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(BadInput, match="does not hold the trained part"):
        assembly.load_trained(fresh, tmp_path / "nothing.safetensors")


def test_a_stopped_training_goes_on_with_the_same_bits_or_settles(
    parts: Callable[[], tuple[LoadedModel, LoadedModel]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "parts", parts)
    whole = training.train(tmp_path / "whole", recipes=FEW, device="cpu")
    assert {name: stretch.steps for name, stretch in whole.stretches.items()} == {
        "words": 3,
        "answers": 4,
        "settling": 2,
    }
    assert json.loads((tmp_path / "whole" / training.RECORD).read_text())["seed"] == 0
    stop_after = 2

    def stop(stretch: str, step: Any) -> None:
        if (stretch, step.step) == ("answers", stop_after):
            raise KeyboardInterrupt

    for name in ("resumed", "finished"):
        with pytest.raises(TrainingInterrupted):
            training.train(tmp_path / name, recipes=FEW, device="cpu", on_step=stop)
    with pytest.raises(BadInput, match="unfinished"):
        training.train(tmp_path / "resumed", recipes=FEW, device="cpu")
    training.train(tmp_path / "resumed", recipes=FEW, device="cpu", resume=True)
    files = [(tmp_path / name / training.TRAINED).read_bytes() for name in ("whole", "resumed")]
    assert files[0] == files[1]
    settled = training.train(tmp_path / "finished", recipes=FEW, device="cpu", resume=True, finish=True)
    assert settled.stretches["answers"].steps == stop_after
    assert settled.stretches["settling"].steps == 2
    with pytest.raises(BadInput, match="finished"):
        training.train(tmp_path / "finished", recipes=FEW, device="cpu", resume=True)
    with pytest.raises(BadInput, match="no training of answers"):
        training.train(tmp_path / "new", recipes=FEW, device="cpu", resume=True, finish=True)
