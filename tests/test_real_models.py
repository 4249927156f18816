"""The first methods on real pretrained weights: heavy, run by hand (`make test-slow`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.data import COPY_PROMPT, load_picture

pytestmark = [pytest.mark.slow, pytest.mark.network]

PROMPT = "The capital of France is"
RELOAD = """
import json, sys, torch
how, folder, prompt = sys.argv[1:]
if how == "zoo":
    import zoo
    loaded = zoo.load_model(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
else:
    sys.modules["zoo"] = sys.modules["taxonomy"] = None  # as where our package is not installed
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(prompt, return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
print(json.dumps({"ids": ids[0].tolist(), "parameters": sum(p.numel() for p in model.parameters())}))
"""


@pytest.mark.parametrize("slug", ["flap", "cfsp"])
def test_a_pruned_language_model_is_smaller_and_reloads_in_a_new_process(slug: str, tmp_path: Path) -> None:
    loaded = zoo.load_model("smollm2-135m", device="cpu")
    dense = sum(p.numel() for p in loaded.model.parameters())
    applied = zoo.method(slug, sparsity=0.2).apply(loaded, samples=8, length=64)
    assert applied.report.removed_ratio == pytest.approx(0.2, abs=0.005)
    left = sum(p.numel() for p in applied.model.parameters())
    assert left < 0.87 * dense
    assert sum(p.numel() for p in loaded.model.parameters()) == dense
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    expected = applied.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
    folder = applied.save(tmp_path / slug)
    assert not list(folder.glob("*.bin"))
    for how in ("zoo", "transformers"):
        out = subprocess.run(
            [sys.executable, "-c", RELOAD, how, str(folder), PROMPT],
            check=True,
            capture_output=True,
            text=True,
        )
        found = json.loads(out.stdout.splitlines()[-1])
        assert found == {"ids": expected, "parameters": left}


def test_prompt_lookup_is_lossless_and_needs_fewer_passes() -> None:
    loaded = zoo.load_model("smollm2-135m", device="cpu")
    for prompt in (COPY_PROMPT, PROMPT, "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"):
        inputs = loaded.tokenizer(prompt, return_tensors="pt")
        plain = loaded.model.generate(**inputs, max_new_tokens=48, do_sample=False)
        with zoo.method("prompt-lookup").apply(loaded) as applied:
            assert torch.equal(applied.generate(**inputs, max_new_tokens=48, do_sample=False), plain)
            if prompt is COPY_PROMPT:
                assert applied.report.decoding.tokens_per_step > 2


def test_a_copy_of_the_target_is_a_perfect_draft() -> None:
    loaded = zoo.load_model("stories15m", device="cpu")
    inputs = loaded.tokenizer("Once upon a time", return_tensors="pt")
    plain = loaded.model.generate(**inputs, max_new_tokens=40, do_sample=False)
    draft = zoo.method("flap", sparsity=0.1).apply(loaded, samples=8, length=64)
    for drafter, least in ((loaded, 5.0), (draft.loaded, 1.0)):
        with zoo.method("speculative-sampling", draft_tokens=5).apply(loaded, draft=drafter) as applied:
            assert torch.equal(applied.generate(**inputs, max_new_tokens=40, do_sample=False), plain)
            assert applied.report.decoding.tokens_per_step >= least


def test_stories15m_drafts_for_tinyllama() -> None:
    target = zoo.load_model("tinyllama-1.1b", device="cpu", dtype="bf16")
    draft = zoo.load_model("stories15m", device="cpu", dtype="bf16")
    text = "Once upon a time, there was a little girl named Lily."
    assert draft.tokenizer(text).input_ids == target.tokenizer(text).input_ids
    inputs = target.tokenizer(text, return_tensors="pt")
    plain = target.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    with zoo.method("speculative-sampling").apply(target, draft=draft) as applied:
        assert torch.equal(applied.generate(**inputs, max_new_tokens=24, do_sample=False), plain)
        assert applied.report.decoding.tokens_per_step > 1.5


@pytest.mark.parametrize(("slug", "parameters"), [("tome", {"r": 13}), ("evit", {"keep_ratio": 0.7})])
def test_encoder_methods_shorten_a_real_vit(slug: str, parameters: dict[str, float]) -> None:
    loaded = zoo.load_model("dinov2-small-saliency", device="cpu")
    inputs = loaded.processor(images=load_picture("china"), return_tensors="pt")
    with torch.no_grad():
        dense = loaded.model(**inputs).last_hidden_state
        with zoo.method(slug, **parameters).apply(loaded) as applied:
            short = applied(**inputs).last_hidden_state
            assert applied.report.kept_ratio < 0.8
        assert torch.equal(loaded.model(**inputs).last_hidden_state, dense)
    assert short.shape[1] < 0.5 * dense.shape[1]
    assert torch.cosine_similarity(short[:, 0], dense[:, 0]).item() > 0.9


def test_the_reference_vlm_looks_where_it_is_asked() -> None:
    """Far above the best constant answer, and worse when the asked region's tokens are elsewhere."""
    from zoo.reference.examination import examine

    grades = examine(zoo.load_model("reference-vlm", device="cpu"), ["recognition", "position"], wanted=64)
    for grade in grades.values():
        assert grade.displaced is not None
        assert grade.accuracy > grade.chance + 0.2
        assert grade.accuracy > grade.displaced + 0.1
