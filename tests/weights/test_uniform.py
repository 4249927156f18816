"""Wanda-sp and structured magnitude: formulas against slow references, grouped queries, budgets, planted examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import MODELS, build, decoder_of, distance, ids, inputs_of, logits

import zoo
from zoo.errors import BadParameter
from zoo.methods.weights._uniform import UniformPruner
from zoo.methods.weights.magnitude_sp import MagnitudeSp
from zoo.methods.weights.wanda_sp import WandaSp
from zoo.models import LoadedModel

KINDS: tuple[type[UniformPruner], ...] = (WandaSp, MagnitudeSp)
FOUR_GROUPS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


def slow_scores(weight: torch.Tensor, inputs: torch.Tensor | None) -> list[float]:
    """One channel at a time; with inputs ``[windows, tokens, in]`` Wanda-sp's, without them magnitude's."""
    scores = []
    for channel in range(weight.shape[1]):
        column = weight[:, channel].double()
        if inputs is None:
            scores.append(float(sum(w * w for w in column.tolist()) ** 0.5))
        else:
            energy = float(inputs[..., channel].double().square().sum()) / len(inputs)
            scores.append(sum(abs(w) for w in column.tolist()) / len(column) * energy**0.5)
    return scores


def kept_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Which rows of ``before`` are left in ``after``, in order."""
    return [
        next(index for index, row in enumerate(before) if torch.equal(row, one)) for one in after.detach()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_groups_of_lowest_score_leave(kind: type[UniformPruner]) -> None:
    """Layer by layer, with inputs from a model whose earlier layers are those of the pruned one."""
    dense = build(**FOUR_GROUPS)
    applied = kind(ratio=0.5).apply(dense, calibration=ids())
    for index in range(4):
        mixed = build(**FOUR_GROUPS)
        for earlier in range(index):
            mixed.model.model.layers[earlier] = applied.model.model.layers[earlier]
        inputs = inputs_of(mixed.model, ids())
        layer, pruned = decoder_of(dense).layers[index], decoder_of(applied.loaded).layers[index]
        texts = kind is WandaSp
        place = f"model.layers.{index}."
        heads = slow_scores(
            layer.attention.output.weight, inputs[f"{place}self_attn.o_proj"] if texts else None
        )
        groups = [
            sum(heads[16 * group : 16 * (group + 1)]) for group in range(4)
        ]  # two heads of eight channels
        best = sorted(sorted(range(4), key=lambda group: groups[group])[2:])
        rows = [8 * group + channel for group in best for channel in range(8)]
        assert kept_rows(layer.attention.key.weight, pruned.attention.key.weight) == rows
        assert kept_rows(layer.attention.value.weight, pruned.attention.value.weight) == rows
        assert pruned.attention.heads == 4
        assert pruned.attention.group == 2
        channels = slow_scores(layer.mlp.down.weight, inputs[f"{place}mlp.down_proj"] if texts else None)
        best = sorted(sorted(range(128), key=lambda channel: channels[channel])[64:])
        assert kept_rows(layer.mlp.up.weight, pruned.mlp.up.weight) == best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.5])
def test_sparsity_is_met_though_heads_are_few(kind: type[UniformPruner], name: str, sparsity: float) -> None:
    """Two groups per layer: one of them leaves at a half, none before, and channels make up for it."""
    applied = kind(sparsity=sparsity).apply(build(name), calibration=ids())
    assert applied.report.removed_ratio == pytest.approx(sparsity, abs=0.01)
    with torch.no_grad():
        generated = applied.generate(input_ids=ids(2, 8), max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 12)


def test_the_published_ratio_rounds_both_down() -> None:
    applied = WandaSp(ratio=0.49).apply(build(), calibration=ids())
    layers = decoder_of(applied.loaded).layers
    assert {layer.attention.kv_heads for layer in layers} == {2}
    assert {layer.mlp.width for layer in layers} == {128 - int(0.49 * 128)}


def test_magnitude_needs_no_text() -> None:
    report = MagnitudeSp().apply(LoadedModel(build().model)).report
    assert "calibration windows" not in report.facts
    assert report.facts["FFN channels removed"] > 0


def test_channels_cannot_make_up_for_everything() -> None:
    with pytest.raises(BadParameter, match="would take all channels"):
        WandaSp(sparsity=0.8).apply(build(num_key_value_heads=1), calibration=ids())
    with pytest.raises(BadParameter, match="not both"):
        zoo.method("wanda-sp", sparsity=0.2, ratio=0.2)


@torch.no_grad()
def plant_quiet_half(loaded: LoadedModel) -> None:
    """Half of all channels hardly ever speak, but have the largest outgoing weights."""
    for layer in decoder_of(loaded).layers:
        layer.mlp.up.weight[64:] *= 1e-4
        layer.mlp.down.weight[:, 64:] *= 3


def test_activations_find_what_magnitude_does_not() -> None:
    loaded = build()
    plant_quiet_half(loaded)
    applied = {kind: kind(ratio=0.49).apply(loaded, calibration=ids()) for kind in KINDS}
    away = {kind: distance(one.model, loaded.model, ids(seed=9)) for kind, one in applied.items()}
    assert away[WandaSp] < 1e-3
    assert away[MagnitudeSp] > 100 * away[WandaSp]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_and_padding(kind: type[UniformPruner]) -> None:
    applied = kind(sparsity=0.5).apply(build(dtype=torch.bfloat16), calibration=ids())
    row = ids(1, 10)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), row), 1)
    mask = torch.tensor([[0] * 3 + [1] * 10])
    with torch.no_grad():
        together = applied(input_ids=padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(together, logits(applied.model, row), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind: type[UniformPruner], tmp_path: Path) -> None:
    applied = kind(sparsity=0.5).apply(build("tiny-qwen3"), calibration=ids())
    again = zoo.load_model(str(applied.save(tmp_path / "smaller")))
    assert torch.equal(logits(again.model, ids(2)), logits(applied.model, ids(2)))
    parameters = sum(parameter.numel() for parameter in again.model.parameters())
    assert parameters == sum(parameter.numel() for parameter in applied.model.parameters())
