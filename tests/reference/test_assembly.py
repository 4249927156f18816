from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo
from zoo.engines.lora import Adapters
from zoo.errors import BadInput
from zoo.models import LoadedModel
from zoo.models.names import KNOWN, KnownModel
from zoo.reference import assembly, keeping
from zoo.reference.canvases import paint
from zoo.scenes import Scene, scene_inputs

pytest.importorskip("peft")
Parts = Callable[[], tuple[LoadedModel, LoadedModel]]


@pytest.fixture
def known(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A short name for a tiny assembled model, with a home of its own."""
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(assembly, "parts", parts)
    model, _ = assembly.assemble(*parts(), seed=4)
    decoder = assembly.language_parts(model)
    adapters = Adapters(model, decoder, [assembly.RANK] * len(decoder.layers))
    assembly.save_trained(assembly.trained_tensors(model, adapters.parameters), tmp_path / "it.safetensors")
    known = KnownModel(
        "mini",
        "Tiny.",
        "vlm",
        licence="MIT",
        parts=("encoder", "language"),
        trained=tmp_path / "it.safetensors",
    )
    monkeypatch.setitem(KNOWN, "mini", known)
    return known


def test_without_its_weights_it_says_how_to_make_them(known: KnownModel) -> None:
    assert known.trained is not None
    known.trained.unlink()
    assert not known.cached
    with pytest.raises(BadInput, match=r"zoo reference train -o DIR, and put it\.safetensors"):
        zoo.load_model("mini", device="cpu")


def test_a_short_name_loads_the_assembled_model(known: KnownModel, parts: Parts) -> None:
    loaded = zoo.load_model("mini", device="cpu")
    assert known.folder is not None
    assert known.folder.is_dir()
    assert known.cached
    assert loaded.facts["assembled"] == "encoder + language"
    assert loaded.revision == f"sha256:{known.folder.name}"
    assert loaded.anatomy.kind == "vlm"
    assert loaded.anatomy.feature_layer == -2
    fresh, processor = assembly.assemble(*parts())
    assert known.trained is not None
    assembly.load_trained(fresh, known.trained)
    scene = Scene((Image.fromarray(paint("train", 0).pixels),), False, ("canvas",))
    inputs = scene_inputs(loaded, scene, "How many pictures?")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs).logits, fresh(**inputs).logits)
    assert int((inputs["input_ids"] == loaded.anatomy.image_token_id).sum()) == 64
    assert processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}]).endswith(
        "<image>"
    )
    with zoo.method("divprune", keep_ratio=0.25).apply(loaded) as applied:
        applied.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert applied.report.kept == 16


def test_it_is_put_together_once(known: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = keeping.assembled(known)
    monkeypatch.setattr(assembly, "assemble", None)
    assert keeping.assembled(known) == first


def test_a_trained_part_that_does_not_fit_leaves_nothing(known: KnownModel) -> None:
    assert known.trained is not None
    known.trained.write_bytes(b"not safetensors")
    with pytest.raises(BadInput, match="does not hold the trained part"):
        keeping.assembled(known)
    assert known.folder is not None
    assert [path.name for path in known.folder.parent.iterdir()] == [".lock"]


def test_assembling_leaves_the_parts_and_the_random_state_alone(parts: Parts) -> None:
    encoder, language = parts()
    before = {name: value.clone() for name, value in language.model.state_dict().items()}
    state = torch.get_rng_state()
    model, _ = assembly.assemble(encoder, language)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in language.model.state_dict().items())


def test_the_projector_reads_what_six_blocks_put_out(parts: Parts) -> None:
    encoder, language = parts()
    model, processor = assembly.assemble(encoder, language)
    pixels = processor.image_processor(Image.fromarray(paint("train", 0).pixels), return_tensors="pt")[
        "pixel_values"
    ]
    with torch.no_grad():
        own = encoder.model(pixels, output_hidden_states=True).hidden_states[assembly.FEATURE_LAYER][:, 1:]
        expected = model.model.multi_modal_projector(own)
        actual = model.model.get_image_features(
            pixels, vision_feature_layer=-2, vision_feature_select_strategy="default"
        )
    torch.testing.assert_close(torch.stack(list(actual.pooler_output)), expected)
