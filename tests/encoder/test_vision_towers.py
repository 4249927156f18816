"""Encoder-token methods on the vision tower of a vision-language model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from encoders import footprint, lengths
from PIL import Image
from torch.testing import assert_close

import zoo
from zoo.errors import Refused
from zoo.families.visual_tokens import AppliedTokens
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 4}),
    ("pitome", {"keep_ratio": 0.8}),
    ("evit", {"layers": (1, 2), "keep_ratio": 0.6}),
    ("evit", {"layers": (0, 3), "keep_ratio": 0.6, "fuse": False}),
    ("zero-tprune", {"layers": (0, 2), "retention": (0.9, 0.7), "iterations": (9, 1), "duplicates": 3}),
]
MIXERS: list[tuple[str, dict[str, Any]]] = [
    ("gtp-vit", {}),
    ("token-transforming", {"layers": (1,)}),
]


def load(name: str) -> LoadedModel:
    model, processor = tiny_model(name)
    model.generation_config.eos_token_id = None
    return LoadedModel(model, processor)


def prompt(loaded: LoadedModel, *questions: str, size: tuple[int, int] = (48, 48)) -> dict[str, Any]:
    pictures = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))
        for seed in range(len(questions))
    ]
    texts = [f"<image>\n{question}" for question in questions]
    return dict(loaded.processor(images=pictures, text=texts, return_tensors="pt", padding=True))


@pytest.mark.parametrize(("slug", "options"), METHODS)
def test_the_language_model_reads_the_tokens_that_are_left(slug: str, options: dict[str, Any]) -> None:
    """The same as building the short sequence by hand out of the restored features."""
    loaded = load("tiny-llava")
    inputs, model = prompt(loaded, "What is it?"), loaded.model
    with zoo.method(slug, restore=True, **options).apply(loaded) as applied, torch.no_grad():
        full = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        sources = applied.sources[0, 1:, 1:]
    first = torch.stack([row.nonzero().min() for row in sources]).sort().values
    ids = inputs["input_ids"][0]
    visual = (ids == model.config.image_token_id).nonzero().squeeze(-1)
    keep = torch.ones(len(ids), dtype=torch.bool)
    keep[visual] = False
    keep[visual[first]] = True
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[visual] = full
    with torch.no_grad():
        expected = model.lm_head(
            model.model.language_model(
                inputs_embeds=embeds[keep].unsqueeze(0), position_ids=keep.nonzero().T
            ).last_hidden_state
        )
        with zoo.method(slug, **options).apply(loaded) as applied:
            found = applied(**inputs).logits
    assert len(first) < 36
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert applied.report.kept == len(first)
    assert applied.report.total == 36


@pytest.mark.parametrize(("slug", "options"), METHODS)
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next", "tiny-llava-onevision"])
def test_padded_batches_generate_like_single_prompts(slug: str, options: dict[str, Any], name: str) -> None:
    loaded = load(name)
    questions = ("What is it?", "How many are there, and where?")
    inputs = prompt(loaded, *questions)
    with zoo.method(slug, **options).apply(loaded) as applied:
        together = applied.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        assert applied.report.kept_ratio < 1
        for sample, row in enumerate(inputs["attention_mask"].bool()):
            one = {
                "input_ids": inputs["input_ids"][sample][row][None],
                "attention_mask": row[row].long()[None],
            }
            crops = len(inputs["pixel_values"]) // 2
            one["pixel_values"] = inputs["pixel_values"][sample * crops : (sample + 1) * crops]
            if "image_sizes" in inputs:
                one["image_sizes"] = inputs["image_sizes"][sample : sample + 1]
            alone = applied.generate(**one, max_new_tokens=4, do_sample=False)[0, -4:]
            assert alone.tolist() == together[sample].tolist()


def test_encoder_projector_and_language_model_run_short() -> None:
    loaded = load("tiny-llava")
    rows: list[int] = []
    projector = loaded.anatomy.projector
    assert projector is not None
    inputs = prompt(loaded, "What is it?")
    with zoo.method("tome", r=4).apply(loaded) as applied, lengths(loaded) as seen, torch.no_grad():
        linear = next(part for part in projector.modules() if isinstance(part, torch.nn.Linear))
        hook = linear.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
        applied(**inputs)
        hook.remove()
    # The projector reads what block 2 puts out: the block behind it is not reduced.
    assert seen["attention"] == [37, 33, 29, 37]
    assert rows == [24]
    assert applied.report.facts["r per block"] == "4, 4, 4, 4"
    bars = applied.report.bars
    assert [bar.kept for bar in bars["visual tokens"]] == [24] * len(bars["visual tokens"])
    assert [bar.kept for bar in bars["encoder tokens per crop"]] == [37, 33, 29, 37]


def test_newline_tokens_stay() -> None:
    loaded = load("tiny-llava-next")
    inputs = prompt(loaded, "What is it?", size=(48, 96))
    with zoo.method("tome", r=4).apply(loaded) as applied, torch.no_grad():
        assert isinstance(applied, AppliedTokens)
        newlines: list[int] = []

        def watch(view: Any, reduction: Any) -> None:
            (image,) = view.images
            newlines.extend(image.tokens[image.crop < 0].tolist())
            assert set(newlines) <= set(reduction.anchor[0].tolist())

        applied.reducer.watch = watch
        applied(**inputs)
    assert newlines
    assert applied.report.kept_ratio < 1


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-internvl"])
@pytest.mark.parametrize(("slug", "options"), [*METHODS, *MIXERS])
def test_restore_keeps_the_number_of_features(slug: str, options: dict[str, Any], name: str) -> None:
    loaded = load(name)
    inputs = prompt(loaded, "What is it?", "Where?")
    with zoo.method(slug, restore=True, **options).apply(loaded) as applied, torch.no_grad():
        out = applied(**inputs).logits
        ids = applied.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] == ids.shape[1] - 3
    assert bool(out.isfinite().all())
    assert applied.report.kept_ratio < 1


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next"])
def test_leaving_restores_the_model(name: str) -> None:
    loaded = load(name)
    inputs = prompt(loaded, "What is it?")
    with torch.no_grad():
        dense = loaded.model(**inputs).logits
        before = footprint(loaded.model)
        with zoo.method("tome", r=4).apply(loaded) as applied:
            assert applied(**inputs).logits.shape != dense.shape
        assert footprint(loaded.model) == before
        with zoo.method("tome", r=0).apply(loaded) as applied:
            assert torch.equal(applied(**inputs).logits, dense)
        assert torch.equal(loaded.model(**inputs).logits, dense)


@pytest.mark.parametrize(("slug", "options"), [*METHODS[:1], *METHODS[-1:]])
def test_a_projector_that_folds_patches_needs_them_all(slug: str, options: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="folds together: set restore=true"):
        zoo.method(slug, **options).apply(load("tiny-internvl"))


@pytest.mark.parametrize(("slug", "options"), MIXERS)
def test_shared_patches_have_no_place_in_the_prompt(slug: str, options: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"several tokens.*set restore=true"):
        zoo.method(slug, **options).apply(load("tiny-llava"))


def test_an_encoder_that_reads_all_pictures_as_one_sequence_is_refused() -> None:
    with pytest.raises(Refused, match="one sequence per picture"):
        zoo.method("tome", r=4, restore=True).apply(load("tiny-qwen2.5-vl"))
