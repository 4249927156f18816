"""LLM-Pruner and DepGraph's group norms: groups, counts, cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MODELS, build, decoder_of, ids, logits, state

import zoo
from zoo.engines.coupling import attention_group, layer_groups, mlp_group, residual_group
from zoo.errors import BadParameter, Refused
from zoo.families.group_pruning import sizes_of
from zoo.families.weights import Work
from zoo.methods.weights.llm_pruner import LlmPruner
from zoo.methods.weights.torch_pruning_groupnorm import GroupNorm, normalise
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

PRUNERS: dict[str, dict[str, Any]] = {
    "llm-pruner": {"keep_first": 0, "keep_last": 0},
    "torch-pruning-groupnorm": {},
}


def work_on(loaded: LoadedModel) -> Work:
    return Work(loaded, 0, None, None, ids)


@pytest.mark.parametrize("name", ["llama-gqa", "phi3", "qwen3"])
def test_a_group_holds_the_weights_that_leave_with_its_units(name: str) -> None:
    """Counted against the cut itself."""
    loaded = build(name)
    total = decoder_of(loaded).prunable_parameters()
    for slug in PRUNERS:
        method = zoo.method(slug, ratio=0.4, **PRUNERS[slug])
        applied = method.apply(loaded, calibration=ids())
        sizes = sizes_of(layer_groups(decoder_of(loaded)))
        left = sizes_of(layer_groups(decoder_of(applied.loaded)))
        gone = sum((old.units - new.units) * old.unit_weights for old, new in zip(sizes, left, strict=True))
        assert gone == total - decoder_of(applied.loaded).prunable_parameters() > 0
        assert sum(size.weights for size in sizes) == total


def test_scores_of_query_heads_go_to_the_key_value_head_that_they_read() -> None:
    """First-order scores summed head by head, in loops that know nothing of groups."""
    loaded, windows = build("llama-gqa"), ids()
    model = loaded.model
    model(input_ids=windows, labels=windows).loss.backward()
    attention = model.model.layers[1].self_attn
    dim, group = attention.head_dim, attention.num_key_value_groups
    expected = torch.zeros(attention.config.num_key_value_heads)
    worth = {
        part: (getattr(attention, part).weight * getattr(attention, part).weight.grad).abs().detach()
        for part in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    for head in range(len(expected)):
        own = slice(head * dim, (head + 1) * dim)
        queries = slice(head * group * dim, (head + 1) * group * dim)
        expected[head] = worth["k_proj"][own].sum() + worth["v_proj"][own].sum()
        expected[head] += worth["q_proj"][queries].sum() + worth["o_proj"][:, queries].sum()
    model.zero_grad(set_to_none=True)
    groups = [attention_group(decoder_of(loaded).layers[1].attention, 1)]
    (found,) = LlmPruner().score(work_on(loaded), groups)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_dead_channel_and_a_dead_head_leave_first() -> None:
    loaded = build("llama-gqa")
    with torch.no_grad():
        for layer in decoder_of(loaded).layers:
            for part in (*layer.mlp.inputs, layer.attention.key, layer.attention.value):
                part.weight[: part.out_features // 2 if part in layer.mlp.inputs else 8] = 0
            layer.mlp.down.weight[:, : layer.mlp.width // 2] = 0
            layer.attention.query.weight[:16] = 0
            layer.attention.output.weight[:, :16] = 0
    for slug, options in PRUNERS.items():
        applied = zoo.method(slug, ratio=0.3, **options).apply(loaded, calibration=ids())
        for old, new in zip(decoder_of(loaded).layers, decoder_of(applied.loaded).layers, strict=True):
            assert new.attention.kv_heads == 2
            assert torch.equal(new.attention.key.weight, old.attention.key.weight[8:])
            assert torch.equal(new.mlp.up.weight[-40:], old.mlp.up.weight[40:])


def test_the_first_and_last_layers_stay_whole() -> None:
    loaded = build("llama-mha")
    applied = zoo.method("llm-pruner", keep_first=1, keep_last=1, sparsity=0.15).apply(
        loaded, calibration=ids()
    )
    widths = [(layer.attention.heads, layer.mlp.width) for layer in decoder_of(applied.loaded).layers]
    assert widths[0] == widths[2] == (6, 80)
    assert widths[1] < (6, 80)
    assert 1 - applied.report.kept / applied.report.total == pytest.approx(0.15, abs=0.01)
    with pytest.raises(BadParameter, match="lower keep_first and keep_last"):
        zoo.method("llm-pruner").apply(loaded, calibration=ids())
    with pytest.raises(BadParameter, match="sparsity must be below"):
        zoo.method("llm-pruner", keep_first=1, keep_last=1, sparsity=0.5).apply(loaded, calibration=ids())


@pytest.mark.parametrize("slug", PRUNERS)
@pytest.mark.parametrize("ranking", ["local", "isomorphic", "global"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_budget_is_met_in_any_ranking_and_number_of_steps(slug: str, ranking: str, steps: int) -> None:
    loaded = build("llama-mha")
    before = state(loaded.model)
    method = zoo.method(slug, sparsity=0.3, ranking=ranking, steps=steps, **PRUNERS[slug])
    applied = method.apply(loaded, calibration=ids())
    # A head is 2.5% of all weights, and a global threshold is met to within one.
    assert 1 - applied.report.kept / applied.report.total == pytest.approx(0.3, abs=0.025)
    assert torch.isfinite(logits(applied.model, input_ids=ids(2))).all()
    for name, value in state(loaded.model).items():
        assert torch.equal(value, before[name])
    assert all(value.grad is None for value in (*loaded.model.parameters(), *applied.model.parameters()))


def test_published_ratios_are_rounded_as_published() -> None:
    sizes = sizes_of([attention_group(decoder_of(build("llama-mha")).layers[0].attention, 0)])
    # 48 - int(48 * 0.84) = 8 channels are one head of eight; one of six heads is kept less by int(6 * 0.84) = 5.
    assert LlmPruner().units_removed(sizes[0], 0.16) == 1
    assert LlmPruner().units_removed(sizes[0], 0.14) == 0
    assert GroupNorm().units_removed(sizes[0], 0.16) == 1
    assert GroupNorm().units_removed(sizes[0], 0.01) == 1


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mistral-window", "qwen2-window"}))
def test_a_narrower_residual_stream_is_the_model_of_that_width(name: str, tmp_path: Path) -> None:
    """Against transformers' own model of the smaller width, its weights sliced by shape alone, and from disk."""
    loaded = build(name)
    method = GroupNorm(sparsity=0.25, residual_ratio=0.25)
    scores = method.channel_scores(residual_group(decoder_of(loaded)))
    kept = scores.argsort(descending=True)[:36].sort().values
    applied = method.apply(loaded)
    assert decoder_of(applied.loaded).hidden_size == 36
    assert applied.report.kept == pytest.approx(0.75 * applied.report.total, rel=1e-6)
    fields = {"hidden_size": 36, "head_dim": decoder_of(loaded).layers[0].attention.head_dim}
    config = type(loaded.model.config)(**{**loaded.model.config.to_dict(), **fields})
    smaller = type(loaded.model)(config).eval()
    weights = {}
    for key, value in loaded.model.state_dict().items():
        for dim, size in enumerate(smaller.state_dict()[key].shape):
            value = value if value.shape[dim] == size else value.index_select(dim, kept)
        weights[key] = value
    smaller.load_state_dict(weights)
    batch = ids(2)
    torch.testing.assert_close(
        logits(applied.model, input_ids=batch), logits(smaller, input_ids=batch), rtol=1e-4, atol=1e-4
    )
    applied.save(tmp_path / "saved")
    again = zoo.load_model(tmp_path / "saved", device="cpu")
    assert again.model.config.hidden_size == 36
    torch.testing.assert_close(logits(again.model, input_ids=batch), logits(applied.model, input_ids=batch))


def test_residual_channels_leave_room_in_the_budget_or_are_refused() -> None:
    loaded = build("llama-mha")
    applied = GroupNorm(sparsity=0.4, residual_ratio=0.25).apply(loaded)
    assert 1 - applied.report.kept / applied.report.total == pytest.approx(0.4, abs=0.01)
    with pytest.raises(BadParameter, match="lower residual_ratio"):
        GroupNorm(sparsity=0.2, residual_ratio=0.5).apply(loaded)
    model, processor = tiny_model("tiny-llava")
    with pytest.raises(Refused, match="residual_ratio=0"):
        GroupNorm(residual_ratio=0.1).check(LoadedModel(model, processor, "tiny-llava"))


def test_the_penalty_makes_weak_channels_decay_fastest() -> None:
    loaded = build("llama-gqa")
    decoder = decoder_of(loaded)
    GroupNorm(regularisation=0.01, alpha=16.0).penalty(decoder).backward()
    mlp = decoder.layers[0].mlp
    norm = mlp_norms = sum(
        (part.weight.detach().square().sum(1) for part in mlp.inputs),
        mlp.down.weight.detach().square().sum(0),
    ).sqrt()
    gamma = 16 ** ((mlp_norms.max() - norm) / (mlp_norms.max() - mlp_norms.min()))
    assert float(gamma.max()) == pytest.approx(16, rel=1e-4)
    assert float(gamma.min()) == pytest.approx(1, rel=1e-4)
    up, down = mlp.up.linear.weight, mlp.down.linear.weight
    torch.testing.assert_close(up.grad, 0.01 * gamma[:, None] * up.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(down.grad, 0.01 * gamma * down.detach(), rtol=1e-4, atol=1e-7)


def test_normalised_scores() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert normalise(scores, "lamp").tolist() == pytest.approx([1.0, 1 / 6, 2 / 5])
    assert normalise(scores, "standardise").tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert normalise(scores, "sum").sum() == pytest.approx(1.0)
    assert normalise(scores, "gaussian").mean() == pytest.approx(0.0, abs=1e-6)
    group = mlp_group(decoder_of(build("llama-mha")).layers[0].mlp, 0)
    assert GroupNorm(normaliser="max").channel_scores(group).max() == 1


@pytest.mark.parametrize("slug", PRUNERS)
def test_half_precision_and_no_budget(slug: str) -> None:
    half = build("llama-gqa", torch.bfloat16)
    applied = zoo.method(slug, sparsity=0.2, **PRUNERS[slug]).apply(half, calibration=ids())
    assert applied.model.dtype == torch.bfloat16
    assert torch.isfinite(logits(applied.model, input_ids=ids(2)).float()).all()
    same = zoo.method(slug, sparsity=0.0, **PRUNERS[slug]).apply(half)
    assert torch.equal(logits(same.model, input_ids=ids(2)), logits(half.model, input_ids=ids(2)))
