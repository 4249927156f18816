"""How the yes/no statements of a card are executed, family by family.

A check gets a *bench*: one method on one small real architecture. It raises when the statement is false. A statement
without a check here is not executed, and the site shows it as declared, not as verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.engines.datastore import Datastore
from zoo.errors import Refused
from zoo.families.visual_tokens import CACHED
from zoo.interface import Method, method_class
from zoo.methods.decoding._eagle_head import EagleHead
from zoo.methods.decoding._medusa_heads import MedusaHeads
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

MODELS = {
    "weights": (
        "tiny-llama",
        "tiny-llama-mha",
        "tiny-qwen2",
        "tiny-qwen3",
        "tiny-mistral",
        "tiny-gemma3",
        "tiny-phi3",
    ),
    "decoding": ("tiny-llama", "tiny-llama-mha", "tiny-qwen3"),
    "visual-tokens": ("tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl", "tiny-internvl"),
    "encoder-tokens": (
        "tiny-vit",
        "tiny-deit",
        "tiny-clip",
        "tiny-dinov2",
        "tiny-dinov2-registers",
        "tiny-beit",
        "tiny-vim",
    ),
    "diffusion": ("tiny-diffusion",),
    "cache": ("tiny-bert", "tiny-gpt2"),
}
"""Architectures each family is run on."""

SETTINGS: dict[str, dict[str, Any]] = {
    # Defaults made for twelve or more layers, scaled to the four of the tiny models.
    "evit": {"layers": [1, 2]},
    "as-vit": {"layers": [1, 2, 3], "thresholds": [0.02, 0.022, 0.025]},
    "dtop": {"threshold": 0.2, "protect": 1},
    "vision-ssm-token-pruning": {"blocks": [1, 3]},
    "spatten": {"keep_heads": [0.8, 0.8]},
    "tome": {"r": 4},
    "optiprune": {"rounds": 1, "steps": 1, "last_steps": 1},
    "zero-tprune": {"layers": [0, 2], "retention": [0.9, 0.7], "iterations": [30, 1], "duplicates": 4},
    "token-transforming": {"layers": [1, 2]},
    "cfsp": {"sparsity": 0.15},
    "armor": {"block": 4, "iterations": 10},
    "gaprune": {"topic": ["e", "t", "a", "o"]},
    "minitron": {"multiple": 8, "top_k": 3},
    "llm-pruner": {"keep_first": 1, "keep_last": 1},
    "grad": {"alpha": 1.0, "plausible": 0.0, "fusion": "additive"},
    "laco": {"merge_layers": 2, "threshold": 0.2},
    "tyr-the-pruner": {"rounds": 1, "generations": 2, "offspring": 4},
    "tracenas": {"population": 6, "elites": 2, "iterations": 2, "depth": 0.5},
    "layer-skip-self-speculation": {"context_window": 4},
    "prunevid": {"layer": 2},
    "catp": {"layer": 1},
    "mustdrop": {
        "merge_threshold": 0.2,
        "global_threshold": 0.02,
        "individual_threshold": 0.03,
        "layers": [0, 2],
    },
    "fitprune": {"counts": [7, 5, 3, 0], "fitted_on": 36},
    "pact": {"layer": 2},
    "vscan": {"keep_ratio": 0.4, "shallow_layer": 0, "window": 3},
    "random-tokens": {"schedule": {-1: 0.5, 2: 0.5}},
    "dart": {"keep_ratio": 0.5},
    "todre": {"keep_tokens": 4, "tau": 0.4},
    "hiprune": {"object_layer": 2, "alpha": 0.5},
    "vflowopt": {"threshold": 1.2},
    "window-diffusion": {"window_tokens": 8, "active_tokens": 4, "refresh_cycle": 4},
}
PICTURES = {"catp": 3}
"""Methods for prompts with several pictures, and how many they get."""
FRAMES = {"dycoke": 8, "prunevid": 8, "holitom": 8, "aot": 8, "fastvid": 8}
"""Methods that need a video, and its frames; a model without a video input gets them as pictures."""
SEGMENTERS = {"dtop"}
"""Methods for encoders with heads for masks."""
DIFFUSION = {"window-diffusion"}
"""Methods for masked diffusion language models; those without the method denoise the whole sequence in every step."""
REORDERED = {"aot", "dycoke"}
"""Methods that put the survivors of a run in an order of their own; all others keep that of the sequence."""
VIDEO_MODELS = ("tiny-llava", "tiny-llava-onevision", "tiny-qwen2.5-vl", "tiny-internvl")
NEW = 16
QUESTIONS = ("What is it?", "How many are there?", "Is it on the left of the house?", "Read the sign.", "z")
TEXTS = (
    "the cat sat on the mat and the cat sat on the mat and the",
    "one two three one two three one two",
    "a completely different line, without much in common.",
)


DRAWINGS = ("a cat and a frog", "a red car", "three birds in a tree")


@dataclass(frozen=True)
class Bench:
    slug: str
    model: str

    @property
    def cls(self) -> type[Method]:
        return method_class(self.slug)

    @property
    def method(self) -> Method:
        built = zoo.method(self.slug, **SETTINGS.get(self.slug, {}))
        assert isinstance(built, Method)
        return built

    def load(self) -> LoadedModel:
        """A fresh model: checks may not disturb each other."""
        model, processor = tiny_model(self.model)
        if hasattr(model, "generation_config"):
            model.generation_config.eos_token_id = None  # so that every sample gives NEW tokens
        return LoadedModel(model, processor, self.model)

    def resources(self) -> dict[str, Any]:
        if self.cls.phase == "weights":
            generator = torch.Generator().manual_seed(3)
            return {"calibration": torch.randint(4, 250, (6, 24), generator=generator)}
        if self.slug == "speculative-sampling":
            draft, processor = tiny_model(self.model, seed=1)
            return {"draft": LoadedModel(draft, processor, "tiny draft")}
        if self.slug == "eagle":
            return {"heads": EagleHead.fresh(self.load()).eval()}
        if self.slug == "medusa":
            return {"heads": MedusaHeads.fresh(self.load(), 3).eval()}
        if self.slug == "rest":
            _, tokenizer = tiny_model(self.model)
            return {"datastore": Datastore.build(TEXTS, tokenizer, 16)}
        if self.slug == "grad":
            codes = torch.randint(33, 127, (5, 500), generator=torch.Generator().manual_seed(0))
            return {"corpus": ["".join(map(chr, row)) for row in codes.tolist()]}
        return {}

    def apply(self, loaded: LoadedModel) -> zoo.Applied:
        return self.method.apply(loaded, **self.resources())


@cache
def models_of(slug: str) -> tuple[str, ...]:
    """Architectures that the method does not refuse (one without a [CLS] token, say)."""
    fitting = []
    models = MODELS[method_class(slug).phase]
    if slug in SEGMENTERS | DIFFUSION:
        models = ("tiny-segvit",) if slug in SEGMENTERS else ("tiny-llada",)
    for model in VIDEO_MODELS if slug in FRAMES else models:
        bench = Bench(slug, model)
        try:
            bench.method.check(bench.load())
        except Refused:
            continue
        fitting.append(model)
    return tuple(fitting)


# --- inputs and outputs ----------------------------------------------------------------------------------------


@cache
def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)


def clip(seed: int, frames: int) -> list[Image.Image]:
    """A video whose frames differ a little, with one cut in the middle."""
    scenes = [picture(seed + 10), picture(seed + 20)]
    return [
        Image.blend(scenes[2 * number // frames], picture(seed + 30 + number), 0.3)
        for number in range(frames)
    ]


def data(bench: Bench, loaded: LoadedModel, samples: tuple[int, ...] = (0,)) -> dict[str, torch.Tensor]:
    """Inputs of a few samples; texts of different lengths are padded on the left."""
    match bench.cls.phase:
        case "encoder-tokens":
            return dict(loaded.processor(images=[picture(s) for s in samples], return_tensors="pt"))
        case "diffusion":
            return {"prompt": [DRAWINGS[s] for s in samples], "steps": 2}
        case "visual-tokens":
            return visual(bench, loaded, [QUESTIONS[s] for s in samples], samples)
        case _:
            return dict(loaded.processor([TEXTS[s] for s in samples], return_tensors="pt", padding=True))


def visual(
    bench: Bench, loaded: LoadedModel, questions: list[str], seeds: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Prompts with what the method is made for: a picture, several with a few words behind each, or a video."""
    if bench.slug in FRAMES:
        clips = [clip(seed, FRAMES[bench.slug]) for seed in seeds]
        if bench.model == "tiny-llava":
            texts = ["<image>" * len(clips[0]) + f"\n{question}" for question in questions]
            frames = [frame for one in clips for frame in one]
            return dict(loaded.processor(images=frames, text=texts, return_tensors="pt", padding=True))
        texts = [f"<video>\n{question}" for question in questions]
        return dict(loaded.processor(videos=clips, text=texts, return_tensors="pt", padding=True))
    count = PICTURES.get(bench.slug, 1)
    texts = ["<image>\nthis\n" * (count - 1) + f"<image>\n{question}" for question in questions]
    pictures = [picture(seed + 10 * number) for seed in seeds for number in range(count)]
    return dict(loaded.processor(images=pictures, text=texts, return_tensors="pt", padding=True))


@torch.no_grad()
def outcome(bench: Bench, applied: zoo.Applied, samples: tuple[int, ...] = (0,)) -> list[torch.Tensor]:
    """What a user gets for each sample: new tokens, or features of an encoder."""
    inputs = data(bench, applied.loaded, samples)
    if bench.cls.phase == "diffusion":
        return list(applied.generate(**inputs))
    if applied.loaded.anatomy.text_encoder is not None:
        return list(applied(**inputs).last_hidden_state[:, 0])
    if bench.cls.phase == "encoder-tokens":
        output = applied(**inputs)
        return list(output.logits if "logits" in output else output.last_hidden_state[:, 0])
    ids = applied.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return list(ids[:, inputs["input_ids"].shape[1] :])


@torch.no_grad()
def plain(bench: Bench, loaded: LoadedModel, samples: tuple[int, ...] = (0,)) -> list[torch.Tensor]:
    inputs = data(bench, loaded, samples)
    if bench.cls.phase == "diffusion":
        return list(loaded.model.generate(**inputs))
    if loaded.anatomy.text_encoder is not None:
        return list(loaded.model(**inputs).last_hidden_state[:, 0])
    if bench.cls.phase == "encoder-tokens":
        output = loaded.model(**inputs)
        return list(output.logits if "logits" in output else output.last_hidden_state[:, 0])
    if bench.slug in DIFFUSION:
        whole = zoo.method(bench.slug, refresh_cycle=1).apply(loaded)
        return list(whole.generate(**inputs, max_new_tokens=NEW)[:, inputs["input_ids"].shape[1] :])
    ids = loaded.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return list(ids[:, inputs["input_ids"].shape[1] :])


def prefill(applied: zoo.Applied, inputs: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        return applied(**inputs, use_cache=True) if "input_ids" in inputs else applied(**inputs)


class FullMaps(TorchDispatchMode):
    """Notices every softmax over a square of tokens: a materialised attention map."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.found: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "softmax" in func.__name__ and isinstance(result, torch.Tensor) and result.dim() >= 3:
            rows, columns = result.shape[-2:]
            if rows >= self.tokens and self.tokens <= columns <= 2 * rows:
                self.found.append(result.shape)
        return result


@contextmanager
def layer_lengths(loaded: LoadedModel) -> Iterator[list[int]]:
    """Sequence lengths that reach the MLP of each decoder layer (or encoder block)."""
    anatomy = loaded.anatomy
    text = anatomy.decoder or anatomy.text_encoder
    if text is not None:
        places = [layer.mlp.module for layer in text.layers]
    elif anatomy.state_space is not None:
        places = [block.input for block in anatomy.state_space.blocks]
    else:
        assert anatomy.encoder is not None
        places = [block.mlp for block in anatomy.encoder.blocks]
    lengths: list[int] = []
    hooks = [
        place.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1])) for place in places
    ]
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()


# --- checks ----------------------------------------------------------------------------------------------------


def query_aware(bench: Bench, declared: bool) -> None:
    loaded = bench.load()
    kept = []
    with bench.apply(loaded) as applied:
        for question in QUESTIONS:
            prefill(applied, visual(bench, loaded, [question], (0,)))
            kept.append({layer: rows[0].tolist() for layer, rows in applied.kept.items()})
    changed = any(one != kept[0] for one in kept)
    assert changed == declared, f"other questions {'changed' if changed else 'did not change'} what is kept"


def needs_attention_maps(bench: Bench, declared: bool) -> None:
    loaded = bench.load()
    samples = (0,) if bench.cls.phase in ("weights", "decoding", "diffusion") else (0, 1)
    inputs = data(bench, loaded, samples)
    # Anything square and at least as large as half of the tokens counts as a map.
    tokens = 12
    with FullMaps(tokens) as watched, bench.apply(loaded) as applied:
        if bench.cls.phase == "decoding":
            applied.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        elif bench.cls.phase == "diffusion":
            applied.generate(**inputs)
        else:
            prefill(applied, inputs)
        implementation = applied.model.config._attn_implementation
    assert implementation == "sdpa"
    assert bool(watched.found) == declared, f"attention maps of shapes {watched.found}"


def query_aware_noise(bench: Bench, declared: bool) -> None:
    """Pictures of other prompts begin with other noise, though the seed is the same."""
    loaded = bench.load()
    begun = []
    with bench.apply(loaded) as applied:
        for prompt in DRAWINGS:
            applied.generate(prompt=prompt, steps=1)
            begun.append(applied.initial_noise)
    changed = any(not torch.equal(one, begun[0]) for one in begun)
    assert changed == declared, f"other prompts {'changed' if changed else 'did not change'} the noise"


def lossless(bench: Bench, declared: bool) -> None:
    loaded = bench.load()
    different = 0
    for sample in range(3):
        expected = plain(bench, loaded, (sample,))[0]
        with bench.apply(loaded) as applied:
            different += not torch.equal(outcome(bench, applied, (sample,))[0], expected)
    assert (different == 0) == declared, f"{different} of 3 outputs differ from the dense model's"


def deterministic(bench: Bench, declared: bool) -> None:
    results = []
    for _ in range(2):
        with bench.apply(bench.load()) as applied:
            results.append(outcome(bench, applied, (0, 1)))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert same or not declared


def batchable(bench: Bench, declared: bool) -> None:
    if not declared:
        return
    loaded = bench.load()
    with bench.apply(loaded) as applied:
        together = outcome(bench, applied, (0, 1, 2))
        alone = [outcome(bench, applied, (sample,))[0] for sample in range(3)]
    for one, other in zip(together, alone, strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        else:
            assert one.tolist() == other.tolist()


def shrinks_sequence(bench: Bench, declared: bool) -> None:
    loaded = bench.load()
    inputs = data(bench, loaded)
    with layer_lengths(loaded) as dense, torch.no_grad():
        loaded.model(**inputs)
    with bench.apply(loaded) as applied, layer_lengths(applied.loaded) as short:
        prefill(applied, inputs)
        report = applied.report if declared else None
    assert (short[-1] < dense[-1]) == declared
    if report is None:
        return
    bars = next(iter(report.bars.values()))
    assert len(bars) == len(short)
    gone = [dense[0] - length for length in short]
    shown = [round(bar.total - bar.kept) for bar in bars]
    # Encoder reports count what enters a block; the reduction inside a block shows one block later.
    if bench.cls.phase == "encoder-tokens" and shown != gone:
        gone = [0, *gone[:-1]]
    assert shown == gone


def shrinks_grid(bench: Bench, declared: bool) -> None:
    """Tokens behind the self-attention of every block, where the report says that fewer went in."""
    loaded = bench.load()
    denoiser = loaded.anatomy.denoiser
    assert denoiser is not None
    lengths: list[list[int]] = [[], []]
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for block in denoiser.blocks
    ]
    seen = lengths[0]
    loaded.model.generate("a cat", steps=1)
    seen = lengths[1]
    with bench.apply(loaded) as applied:
        applied.generate(prompt="", steps=1)  # no subjects: one pass
    for hook in hooks:
        hook.remove()
    assert applied.report.kept < applied.report.total == sum(lengths[0])
    assert (sum(lengths[1]) < sum(lengths[0])) == declared


def shrinks_cache(bench: Bench, declared: bool) -> None:
    loaded = bench.load()
    inputs = data(bench, loaded)
    with torch.no_grad():
        dense = [
            layer.get_seq_length() for layer in loaded.model(**inputs, use_cache=True).past_key_values.layers
        ]
    with bench.apply(loaded) as applied:
        cache = prefill(applied, inputs).past_key_values
        report = applied.report.bars
        bars = report.get(CACHED) or next(iter(report.values()))
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert (sum(lengths) < sum(dense)) == declared
    if declared:
        assert [d - length for d, length in zip(dense, lengths, strict=True)] == [
            round(bar.total - bar.kept) for bar in bars
        ]


def shrinks_weights(bench: Bench, declared: bool) -> None:
    loaded = bench.load()
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    before = decoder.prunable_parameters()
    dense = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with bench.apply(loaded) as applied:
        pruned = applied.loaded.anatomy.decoder
        assert pruned is not None
        after = pruned.prunable_parameters()
        assert (after < before) == declared
        if bench.cls.phase == "weights":
            assert bench.method.remaining(pruned) == applied.report.kept < applied.report.total
            assert declared == (bench.method.remaining(pruned) == after)
        else:
            assert after == applied.report.kept
        assert (
            sum(p.numel() for p in applied.model.parameters()) < sum(v.numel() for v in dense.values())
            or not declared
        )
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, dense[name]), "the caller's own model was changed"


def keeps_positions(bench: Bench, declared: bool) -> None:
    """What the last layer rotates by, against what it rotates by in the dense model."""
    loaded = bench.load()
    inputs = data(bench, loaded)
    assert loaded.anatomy.decoder is not None
    seen: list[torch.Tensor] = []

    def see(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["position_embeddings"][0])

    last = loaded.anatomy.decoder.layers[-1].module
    hook = last.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        loaded.model(**inputs)
    hook.remove()
    with bench.apply(loaded) as applied:
        hook = last.register_forward_pre_hook(see, with_kwargs=True)
        prefill(applied, inputs)
        hook.remove()
        kept = applied.kept[max(applied.kept)][0]
    dense, short = seen
    numbers = torch.tensor(list(loaded.anatomy.visual_token_ids.values()))
    visual = torch.isin(inputs["input_ids"][0], numbers).nonzero().squeeze(-1)
    gone = set(visual.tolist()) - set(kept.tolist())
    assert gone
    order = iter(kept.tolist() if bench.slug in REORDERED else sorted(kept.tolist()))
    survivors = [
        next(order) if place in kept else place for place in range(dense.shape[1]) if place not in gone
    ]
    grid = "mrope_section" in str(loaded.model.config)
    # Places in an image grid (M-RoPE) are kept whatever the policy for plain positions is.
    expected = survivors if declared or grid else list(range(len(survivors)))
    assert torch.equal(short[0], dense[0, expected])


CHECKS: dict[str, dict[str, Callable[[Bench, bool], None]]] = {
    "weights": {
        "needs_attention_maps": needs_attention_maps,
        "lossless": lossless,
        "deterministic": deterministic,
        "batchable": batchable,
        "shrinks_sequence": shrinks_sequence,
        "shrinks_weights": shrinks_weights,
    },
    "decoding": {
        "needs_attention_maps": needs_attention_maps,
        "lossless": lossless,
        "deterministic": deterministic,
        "batchable": batchable,
        "shrinks_weights": shrinks_weights,
    },
    "visual-tokens": {
        "query_aware": query_aware,
        "needs_attention_maps": needs_attention_maps,
        "lossless": lossless,
        "deterministic": deterministic,
        "batchable": batchable,
        "shrinks_sequence": shrinks_sequence,
        "shrinks_cache": shrinks_cache,
        "keeps_positions": keeps_positions,
    },
    "encoder-tokens": {
        "needs_attention_maps": needs_attention_maps,
        "lossless": lossless,
        "deterministic": deterministic,
        "batchable": batchable,
        "shrinks_sequence": shrinks_sequence,
    },
    "cache": {
        "needs_attention_maps": needs_attention_maps,
        "lossless": lossless,
        "deterministic": deterministic,
        "batchable": batchable,
        "shrinks_sequence": shrinks_sequence,
        "shrinks_cache": shrinks_cache,
    },
    "diffusion": {
        "query_aware": query_aware_noise,
        "needs_attention_maps": needs_attention_maps,
        "lossless": lossless,
        "deterministic": deterministic,
        "batchable": batchable,
        "shrinks_sequence": shrinks_grid,
    },
}
"""Family -> property -> how it is executed."""

POINTLESS = {("shrinks_cache", "tiny-bert")}
"""Properties that mean nothing on a model: an encoder has no cache."""


def training_none(bench: Bench) -> None:
    """``training = none``: applying and running changes no weight and leaves no gradient."""
    loaded = bench.load()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with bench.apply(loaded) as applied:
        outcome(bench, applied)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[name])


def acts_where_declared(bench: Bench) -> None:
    """``before-llm``: layer 0 runs short. ``inside-llm``: layer 0 does not, a later one does (unless both)."""
    loaded = bench.load()
    terms = bench.cls.card().terms("where")
    inputs = data(bench, loaded)
    full = inputs["input_ids"].shape[1]
    with bench.apply(loaded) as applied, layer_lengths(loaded) as lengths:
        prefill(applied, inputs)
    before, inside = lengths[0] < full, lengths[-1] < lengths[0]
    assert before == bool({"before-llm", "after-encoder", "inside-encoder"} & set(terms))
    assert inside == ("inside-llm" in terms)
