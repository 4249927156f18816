"""``model.generate`` with one method of every kind, on every architecture, against decoding by hand (``replay``)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from reference import ARCHITECTURES, VIDEO, cast, clip, load, picture
from replay import Cut, Sample, decided

import zoo
from zoo.engines.tokens import View
from zoo.errors import Refused
from zoo.families.visual_tokens import CACHED
from zoo.models import LoadedModel

NEW = 4
QUESTIONS = ("\nWhat is it?", " Is it on the left of the house?", "?")
SIZES = ((70, 50), (40, 90), (48, 48))

METHODS: dict[str, dict[str, Any]] = {
    "divprune": {"keep_ratio": 0.3},  # drop before the LLM
    "visionzip": {"keep_ratio": 0.3},  # drop and merge before the LLM
    "llava-prumerge": {},
    "vscan": {"keep_ratio": 0.4, "shallow_layer": 0, "window": 3},  # merge before, drop inside
    "fastv": {"keep_ratio": 0.4, "layer": 2},  # drop inside
    "pyramiddrop": {"keep_ratio": 0.6},  # three stages inside
    "sparsevlm": {},  # three stages with recycling
    "pact": {"layer": 2, "cutoff": 0.5},  # merge inside, keys that weigh more
    "vtw": {},  # nothing visual in the deep layers
    "prunevid": {"layer": 2},  # merge before, drop inside, caches cut after the prompt
    "dycoke": {"layer": 2, "read_ratio": 0.1, "gate": 2.0},  # few keys read in each later step
    "divprune+fastv": {"divprune.keep_ratio": 0.5, "fastv.keep_ratio": 0.5, "fastv.layer": 2},
    "pact+fastv": {"pact.layer": 1, "pact.cutoff": 0.5, "fastv.layer": 3, "fastv.keep_ratio": 0.5},
}
FILMS = ("prunevid", "dycoke")
"""Methods that want frames; a model without a video input gets them as pictures."""
READING = {"dycoke": (2, 0.1)}


@cache
def model(name: str, dtype: torch.dtype) -> LoadedModel:
    """One for all methods: each leaves it as it was."""
    return load(name, dtype)


def inputs(loaded: LoadedModel, slug: str, samples: tuple[int, ...]) -> dict[str, Any]:
    """Prompts of different lengths, padded on the left."""
    clips = [clip(sample, 4) for sample in samples]
    if slug in FILMS and loaded.ref in VIDEO:
        marks, given = "<video>", {"videos": clips}
    elif slug in FILMS:
        marks, given = "<image>" * 4, {"images": [frame for frames in clips for frame in frames]}
    else:
        marks, given = "Look: <image>", {"images": [picture(sample, *SIZES[sample]) for sample in samples]}
    texts = [marks + QUESTIONS[sample] for sample in samples]
    return cast(loaded.processor(text=texts, **given, return_tensors="pt", padding=True), loaded.model.dtype)


def check(loaded: LoadedModel, slug: str, samples: tuple[int, ...]) -> None:
    """Every token that ``generate`` writes is the one that decoding by hand finds likeliest, and caches are as long.

    In half precision, where sums round differently under a mask, one of those that are as good as equal.
    """
    method = zoo.method(slug, **METHODS[slug])
    data = inputs(loaded, slug, samples)
    prompt = data["input_ids"].shape[1]
    with method.apply(loaded) as applied:
        reducer = getattr(applied, "reducer", None) or applied.layers[0].reducer
        cuts: dict[int, list[Cut]] = {}

        def note(view: View, reduction: Any) -> None:
            stage = next(stage for stage in reducer.stages if stage.layer == view.layer)
            cuts.setdefault(view.sample, []).append(decided(stage, view, reduction))

        reducer.watch = note
        output = applied.generate(
            **data, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, use_cache=True
        )
        seen, left = reducer.visual_per_layer, reducer.cached_per_layer
        bars = applied.report.bars
    ids, stored = output.sequences, seen if left is None else left
    found = []
    for row, sample in enumerate(samples):
        padding = int((data["attention_mask"][row] == 0).sum())
        with torch.no_grad():
            own = Sample(loaded, inputs(loaded, slug, (sample,)), padding)
            text = own.visual.count(False)
            logits = [own.read(cuts[row], reducer.positions)]
            assert own.lengths == [text + int(kept) for kept in stored[row]]
            found.append(own.lengths)
            for number, token in enumerate(ids[row, prompt : prompt + NEW - 1].tolist()):
                logits.append(own.step(token, number, READING.get(slug)))
        for token, scores in zip(ids[row, prompt:].tolist(), logits, strict=True):
            slack = 0.0 if loaded.model.dtype == torch.float32 else 0.03 * float(scores.max() - scores.min())
            assert float(scores[token]) >= float(scores.max()) - slack
    longest = [max(lengths) for lengths in zip(*found, strict=True)]
    assert [layer.get_seq_length() - (NEW - 1) for layer in output.past_key_values.layers] == longest
    shown = bars.get(CACHED) or bars["visual tokens"]
    assert [bar.kept for bar in shown] == pytest.approx(stored.float().mean(0).tolist())
    assert (
        longest[-1] < prompt or slug in READING
    )  # pictures are no frames: nothing is merged, few keys are read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("slug", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_equals_decoding_by_hand(name: str, slug: str, dtype: torch.dtype) -> None:
    loaded = model(name, dtype)
    try:
        zoo.method(slug, **METHODS[slug]).check(loaded)
    except Refused as reason:
        pytest.skip(str(reason))
    check(loaded, slug, (1,))
    check(loaded, slug, (0, 1, 2))
