from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import FullMaps
from torch.nn import functional as F

import zoo
from zoo.bench.settings import Settings
from zoo.engines.denoising import AttentionMaps, SelfAttentionReuse, grid_of, watch_attention
from zoo.errors import BadInput, BadParameter, NeedsExtra
from zoo.methods.diffusion._latent_mapper import DRIFT, _blurred, drift, map_noise, optimise, scores
from zoo.methods.diffusion._simprune import base_tokens, similarity_prune
from zoo.methods.diffusion.optiprune import subject_tokens
from zoo.models import LoadedModel
from zoo.models.tiny import byte_tokenizer, tiny_model

pytest.importorskip("diffusers")
PROMPT = "a cat and a frog"


@pytest.fixture
def loaded() -> LoadedModel:
    model, tokenizer = tiny_model("tiny-diffusion")
    return LoadedModel(model, tokenizer, "tiny-diffusion")


@pytest.fixture
def step(loaded: LoadedModel) -> dict[str, Any]:
    text = loaded.model.encode([PROMPT])
    return {"sample": loaded.model.noise(1), "timestep": torch.tensor(900), "encoder_hidden_states": text}


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


# --- SimPrune -------------------------------------------------------------------------------------------------


def test_simprune_is_what_the_similarity_matrix_says() -> None:
    """The same choice, made slowly and literally from the whole matrix, on a grid with a left-over border."""
    rows, columns, ratio = 5, 7, 0.4
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, rows * columns, 8, generator=generator)
    noise = torch.randn(2, rows * columns, generator=generator)
    bases, reuse = similarity_prune(tokens, (rows, columns), noise, ratio, patch=(2, 3), alpha=2.0)
    unit = F.normalize(tokens, dim=-1)
    for sample, likeness in enumerate(unit @ unit.mT):
        score = likeness.sum(1) + 2.0 * noise[sample]
        expected = []
        for top in range(0, rows - 1, 2):
            for left in range(0, columns - 2, 3):
                patch = [(top + i) * columns + left + j for i in range(2) for j in range(3)]
                expected.append(max(patch, key=lambda place: score[place].item()))
        assert bases[sample].tolist() == expected
        others = [place for place in range(rows * columns) if place not in expected]
        others.sort(key=lambda place: -likeness[place, expected].max().item())
        pruned = others[: int(rows * columns * ratio)]
        kept = sorted(set(range(rows * columns)) - set(pruned))
        assert reuse.kept[sample].tolist() == kept
        for place in range(rows * columns):
            heir = place if place in kept else max(kept, key=lambda one: likeness[place, one].item())
            assert reuse.kept[sample, reuse.source[sample, place]] == heir


def test_bases_never_leave() -> None:
    tokens = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    bases, reuse = similarity_prune(tokens, (4, 4), torch.zeros(1, 16), 0.99)
    assert reuse.kept[0].tolist() == sorted(bases[0].tolist())
    assert base_tokens(torch.arange(16.0)[None], (4, 4), (2, 2)).tolist() == [[5, 7, 13, 15]]
    assert base_tokens(torch.arange(16.0)[None], (4, 4), (9, 2)).tolist() == [[13, 15]]


@pytest.mark.parametrize(("tokens", "latent", "expected"), [
    (1024, (32, 32), (1, (32, 32))),
    (256, (32, 32), (2, (16, 16))),
    (15, (10, 18), (4, (3, 5))),
])  # fmt: skip
def test_grids(tokens: int, latent: tuple[int, int], expected: object) -> None:
    assert grid_of(tokens, latent) == expected
    with pytest.raises(ValueError, match="no halving"):
        grid_of(tokens + 1, latent)


def test_attention_runs_on_the_kept_tokens_and_others_copy(loaded: LoadedModel, step: dict[str, Any]) -> None:
    denoiser = loaded.anatomy.denoiser
    assert denoiser is not None
    block = denoiser.blocks[0]
    chosen = []

    def choose(tokens: torch.Tensor, grid: tuple[int, int]) -> Any:
        chosen.append(similarity_prune(tokens, grid, torch.zeros(1, tokens.shape[1]), 0.5)[1])
        return chosen[-1]

    seen: dict[str, torch.Tensor] = {}
    block.self_attention.query.linear.register_forward_hook(lambda _, args, __: seen.update(into=args[0]))
    block.self_attention.output.linear.register_forward_hook(lambda _, __, out: seen.update(out=out))
    reuse = SelfAttentionReuse(denoiser, choose, 1)
    block.self_attention.module.register_forward_hook(lambda _, __, out: seen.update(behind=out))
    with torch.no_grad():
        loaded.model(**step)
    assert seen["into"].shape[1] == seen["out"].shape[1] == 512
    assert len(chosen) == sum(total == 1024 for _, total in reuse.lengths) == 3  # the finest blocks only
    for place in (0, 333, 1023):
        assert torch.equal(seen["behind"][0, place], seen["out"][0, chosen[0].source[0, place]])


def test_without_pruning_and_optimisation_nothing_changes(loaded: LoadedModel) -> None:
    plain = loaded.model.generate(PROMPT, steps=2)
    with zoo.method("optiprune", prune_ratio=0, rounds=0).apply(loaded) as applied:
        assert torch.equal(applied.generate(prompt=PROMPT, steps=2), plain)
        assert applied.report.kept_ratio == 1


def test_is_undone_exactly_also_after_an_error(loaded: LoadedModel, step: dict[str, Any]) -> None:
    before = hooks_of(loaded.model)
    with torch.no_grad():
        dense = loaded.model(**step)
    method = zoo.method("optiprune", rounds=1, steps=1, last_steps=0)
    with method.apply(loaded) as applied:
        with torch.no_grad():
            assert not torch.equal(applied(**step), dense)
        with pytest.raises(RuntimeError):  # in the middle of a pass that is being watched
            applied(**{**step, "encoder_hidden_states": torch.zeros(1, 3, 5)})
        applied.generate(prompt=PROMPT, steps=1)
    assert hooks_of(loaded.model) == before
    with torch.no_grad():
        assert torch.equal(loaded.model(**step), dense)


def test_pruning_alone_makes_no_attention_map(loaded: LoadedModel, step: dict[str, Any]) -> None:
    with zoo.method("optiprune", rounds=0).apply(loaded) as applied, FullMaps(12) as watched, torch.no_grad():
        applied(**step)
    assert not watched.found


def test_half_precision_other_sizes_and_batches(loaded: LoadedModel) -> None:
    loaded.model.to(torch.bfloat16)
    with zoo.method("optiprune", rounds=1, steps=1, last_steps=0, max_downsample=2).apply(loaded) as applied:
        pictures = applied.generate(prompt=[PROMPT, "the"], steps=2, size=40)
        assert pictures.shape == (2, 3, 40, 40)
        assert torch.isfinite(pictures).all()
        shortened = [bar.ratio for bar in applied.report.bars["tokens in self-attention"]]
    assert shortened == [0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]
    with pytest.raises(BadInput, match="no attention on a grid of 9 x 9 tokens"):
        scores(AttentionMaps((9, 9)), [1])
    with pytest.raises(BadInput, match="multiple of 2 pixels"):
        loaded.model.generate(PROMPT, size=41)


# --- LatentMapper ---------------------------------------------------------------------------------------------


def maps_of(text: torch.Tensor, image: torch.Tensor, grid: tuple[int, int]) -> AttentionMaps:
    maps = AttentionMaps(grid)
    maps._seen = {"text": [text], "image": [image]}
    return maps


def test_scores_by_hand() -> None:
    """Two subjects on a 3 x 3 grid, in opposite corners: shown, but looking at the same, or at different places."""
    text = torch.zeros(1, 9, 4)
    text[0, :, 1] = 0.5  # where no subject is, another word takes all
    text[0, 0] = torch.tensor([0.9, 0, 1.0, 0])
    text[0, 8] = torch.tensor([0.9, 0, 0, 1.0])
    same, apart = torch.zeros(1, 9, 9), torch.eye(9)[None]
    same[:, :, 4] = 1
    peak = 1 / (1 + 2 * torch.exp(torch.tensor(-0.5 / 0.25)).item()) ** 2  # of the mirrored 3 x 3 Gaussian
    neglect, mixing = scores(maps_of(text, same, (3, 3)), [2, 3])
    assert neglect.item() == pytest.approx(1 - peak, abs=1e-5)
    assert mixing.item() == pytest.approx(0.5, abs=1e-5)
    assert scores(maps_of(text, apart, (3, 3)), [2, 3])[1].item() == 0
    assert scores(maps_of(text, same, (3, 3)), [2])[1].item() == 0  # one subject cannot mix
    assert _blurred(torch.ones(2, 3, 4)).allclose(torch.ones(2, 3, 4))


def test_optimisation_shows_subjects_more_and_stays_normal(loaded: LoadedModel) -> None:
    denoiser, model = loaded.anatomy.denoiser, loaded.model
    assert denoiser is not None
    text, places = model.encode([PROMPT]), subject_tokens(loaded.tokenizer, PROMPT, ("cat",))
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def look(noise: torch.Tensor) -> AttentionMaps:
        with watch_attention(denoiser, (8, 8)) as maps:
            model(noise, torch.tensor(950), text)
        return maps

    noise = model.noise(1)
    before, after = (optimise(look, noise, places, steps) for steps in (0, 8))
    assert torch.equal(before.noise, noise)
    assert (
        after.neglect < before.neglect - 5e-4
    )  # random weights: the maps are flat, and so are their gradients
    assert 0.9 < after.noise.std() / noise.std() < 1.1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Target:
    """In place of a U-Net: the subject shows where latent 0 is large."""

    def __init__(self, needed: float) -> None:
        self.needed, self.passes = needed, 0

    def __call__(self, noise: torch.Tensor) -> AttentionMaps:
        self.passes += 1
        text = torch.zeros(9, 3)
        text[:, 1] = 1  # another word, which has every other place to itself
        lift = (noise.flatten()[0] - self.needed) * F.one_hot(torch.tensor(4), 9).float()
        text = torch.stack((text[:, 0], text[:, 1], text[:, 2] + lift + 1 * (torch.arange(9) == 4)), dim=1)
        return maps_of(text[None], torch.eye(9)[None], (3, 3))


def test_rounds_end_with_the_first_valid_noise_or_the_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo.methods.diffusion._latent_mapper as mapper

    monkeypatch.setattr(mapper, "CROSS", 0.5)  # the blur leaves no subject of one token more than 0.62
    fresh = iter(torch.full((1, 1, 3, 3), value) for value in (1.0, 5.0, 9.0))
    start = torch.zeros(1, 1, 3, 3)
    options: dict[str, Any] = {"steps": 0, "fresh": lambda: next(fresh)}
    found, tried = map_noise(Target(3.0), start, [2], rounds=4, last_steps=0, **options)
    assert (tried, found.noise[0, 0, 0, 0].item(), found.valid) == (3, 5.0, True)
    fresh = iter(torch.full((1, 1, 3, 3), value) for value in (2.97, -4.0, -5.0))
    target = Target(3.0)
    found, tried = map_noise(target, start, [2], rounds=3, last_steps=30, **options)
    assert tried == 3
    assert target.passes < 3 + 31  # the best of the three became valid before the last step
    assert found.valid
    assert found.noise[0, 0, 0, 0] > 2.97


def test_drift_is_held_down() -> None:
    """Scores that can never be met pull on and on, and the noise stays near a standard normal distribution."""

    def look(noise: torch.Tensor) -> AttentionMaps:
        text = torch.zeros(9, 3)
        logit = 0.01 * noise.mean() * torch.ones(9)
        return maps_of(torch.stack((text[:, 0], text[:, 1], logit), 1)[None], torch.eye(9)[None], (3, 3))

    noise = torch.zeros(1, 1, 3, 3)
    found = optimise(look, noise, [2], 100)
    assert not found.valid
    held = (2 * DRIFT) ** 0.5  # of the mean alone: KL = mu^2 / 2
    assert drift(torch.full((9,), held), torch.zeros(9)).item() == pytest.approx(DRIFT, rel=1e-3)
    assert 0.5 * held < found.noise.max() <= 1.01 * held  # 100 steps of 0.01 would go twenty times as far


def test_subjects_are_words_of_the_prompt() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 77
    prompt = "A cat and the frog"

    def last_letters(subjects: tuple[str, ...] | None) -> list[str]:
        return [
            prompt[place - 1] for place in subject_tokens(tokenizer, prompt, subjects)
        ]  # <s> stands in front

    assert last_letters(None) == ["t", "g"]
    assert last_letters(("Frog",)) == ["g"]
    with pytest.raises(BadInput, match="'dog' is not a word of the prompt"):
        last_letters(("cat", "dog"))
    tokenizer.model_max_length = 8
    assert subject_tokens(tokenizer, prompt, None) == [5]


def test_more_of_the_prompt_is_worked_on_at_its_own_place(loaded: LoadedModel) -> None:
    """Prompts of a batch get the noise that they get alone, and one without subjects keeps its own."""
    method = zoo.method("optiprune", rounds=2, steps=1, last_steps=1)
    begun = {}
    for prompts in ([PROMPT, "the"], [PROMPT]):
        with method.apply(loaded) as applied:
            applied.generate(prompt=prompts, steps=1)
            begun[len(prompts)] = applied.initial_noise
            facts = applied.report.facts
    assert torch.equal(begun[2][:1], begun[1])
    assert torch.equal(begun[2][1:], loaded.model.noise(1))
    assert facts["initial noises tried"] == 2
    assert facts["noise is valid"] == "no"


def test_the_tiny_model_tells_prompts_apart(loaded: LoadedModel) -> None:
    text = loaded.model.encode(["a cat", "the red car"])
    with torch.no_grad():
        predicted = loaded.model(loaded.model.noise(2), torch.tensor(500), text)
    assert 0.1 < predicted.std() < 10
    assert not torch.allclose(predicted[0], predicted[1], atol=0.01)
    pictures = loaded.model.generate(["a cat", "the red car"], steps=2)
    assert pictures.shape == (2, 3, 64, 64)
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert not torch.equal(pictures[0], pictures[1])


# --- loading and running --------------------------------------------------------------------------------------


def test_pipelines_are_loaded_from_folders(loaded: LoadedModel, tmp_path: Path) -> None:
    from transformers import CLIPTokenizerFast

    loaded.model.pipeline.tokenizer = CLIPTokenizerFast(
        vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "cat</w>": 3}, merges=[]
    )
    loaded.model.pipeline.tokenizer.model_max_length = 77
    loaded.model.pipeline.save_pretrained(tmp_path / "sd")
    again = zoo.load_model(tmp_path / "sd", device="cpu")
    assert again.anatomy.kind == "diffusion"
    assert torch.equal(again.model.generate("a cat", steps=2), loaded.model.generate("a cat", steps=2))
    assert len(subject_tokens(again.tokenizer, "a cat", None)) == 1
    (weights,) = (tmp_path / "sd" / "unet").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadInput, match="cannot be loaded"):
        zoo.load_model(tmp_path / "sd", device="cpu")
    index = tmp_path / "sd" / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "unet": ["os", "system"]}))
    with pytest.raises(BadInput, match="names classes of os"):
        zoo.load_model(tmp_path / "sd", device="cpu")
    index.write_text(json.dumps({**content, "_class_name": "FluxPipeline"}))
    with pytest.raises(BadInput, match="holds a FluxPipeline"):
        zoo.load_model(tmp_path / "sd", device="cpu")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(NeedsExtra, match=r"pip install 'efficiency-zoo\[diffusion\]'"):
        tiny_model("tiny-diffusion")


def test_run_measures_a_step_and_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.bench.scenarios.diffusion.STEPS", 2)
    record = zoo.run(
        "optiprune",
        parameters={"rounds": 1, "steps": 1, "last_steps": 0},
        settings=Settings(repeats=3, seconds=1),
        prompt="a cat",
        store=False,
    )
    rows = {row.quantity: row for row in record.comparisons}
    assert {"step-time", "flops", "picture-time", "cosine-noise"} <= rows.keys()
    assert rows["flops"].gain > 1.2
    assert rows["step-time"].bound == pytest.approx(rows["flops"].gain)
    assert (record.reports[0].kept, record.reports[0].total) == (2560, 4096)
    assert any("random" in note for note in record.notes)
    with pytest.raises(BadInput, match="optiprune works on a text-to-image model"):
        zoo.run("optiprune", "tiny-llama")
    with pytest.raises(BadInput, match="leave out the image"):
        zoo.run("optiprune", images=["china"])
    with pytest.raises(BadParameter, match="prune_ratio"):
        zoo.method("optiprune", prune_ratio=1)
