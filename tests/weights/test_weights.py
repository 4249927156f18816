"""The weight engine and its methods on tiny random models of every supported architecture."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from architectures import MODELS, build, decided, decoder_of, ids, logits, masked, padded, state
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.engines.statistics import SquareSum, Watch, stream
from zoo.engines.surgery import LayerCut, cut_layers, keep_heads, share_parameters
from zoo.errors import BadInput, BadParameter, Refused, RunFailed
from zoo.families.weights import WeightPruner
from zoo.methods.weights.cfsp import Cfsp
from zoo.methods.weights.flap import Flap
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, DecoderLayer
from zoo.models.pruned import refit

METHODS = {
    "flap": Flap(sparsity=0.4),
    "flap-uniform": Flap(sparsity=0.4, structure="UL-UM", metric="WIFN"),
    "cfsp": Cfsp(sparsity=0.2, slope=20.0),
}


# --- what pruning means -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_pruned_equals_dense_with_masks_and_biases(name: str, method: WeightPruner) -> None:
    loaded = build(name)
    before = state(loaded.model)
    applied = method.apply(loaded, calibration=ids())
    reference = masked(loaded, decided(method, loaded, ids()))
    for inputs in (padded("left"), padded("right"), {"input_ids": ids(2)}):
        torch.testing.assert_close(logits(applied, **inputs), logits(reference, **inputs), rtol=0, atol=1e-4)
    assert not torch.allclose(
        logits(applied, input_ids=ids(2)), logits(loaded.model, input_ids=ids(2)), atol=1e-3
    )

    # The caller's model kept every bit, and has no hook or attribute of ours.
    after = state(loaded.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for module in loaded.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__

    # The report tells what is in memory.
    decoder, report = decoder_of(applied.loaded), applied.report
    assert (
        report.kept
        == decoder.prunable_parameters()
        < report.total
        == decoder_of(loaded).prunable_parameters()
    )
    linears = [m for layer in decoder.layers for m in layer.module.modules() if isinstance(m, nn.Linear)]
    assert report.kept == sum(linear.weight.numel() for linear in linears)
    assert [bar.kept for bar in report.bars["FFN channels"]] == [layer.mlp.width for layer in decoder.layers]
    assert [bar.kept for bar in report.bars["attention heads"]] == [x.attention.heads for x in decoder.layers]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "qwen3"])
def test_bfloat16(name: str, method: WeightPruner) -> None:
    loaded = build(name, torch.bfloat16)
    applied = method.apply(loaded, calibration=ids())
    assert {p.dtype for p in applied.model.parameters()} == {torch.bfloat16}
    # The same network in float32 on the same weights: rounding apart, the pruned model computes what it should.
    exact = share_parameters(masked(loaded, decided(method, loaded, ids()))).float()
    found, expected = logits(applied, **padded()).float(), logits(exact, **padded())
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()
    generated = applied.generate(**padded(), max_new_tokens=4, do_sample=False)
    assert generated.shape == (3, 16)


@pytest.mark.parametrize("method", [Flap(sparsity=0), Cfsp(sparsity=0), Cfsp(ffn_sparsity=0)])
def test_sparsity_zero_is_bit_equal(method: WeightPruner) -> None:
    loaded = build("llama-gqa")
    applied = method.apply(loaded)
    assert torch.equal(logits(applied, **padded()), logits(loaded.model, **padded()))
    assert applied.report.kept_ratio == 1.0
    assert type(applied.model) is type(loaded.model)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_sparsity_is_the_fraction_of_decoder_weights(sparsity: float) -> None:
    """On layers with many small units the realised fraction is close to the one asked for, for FLAP and CFSP alike."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=4,
        intermediate_size=256,
        num_attention_heads=8,
        head_dim=8,
    )
    loaded = LoadedModel(LlamaForCausalLM(config).eval())
    windows = torch.randint(0, 50, (8, 16))
    for method in (Flap(sparsity=sparsity), Cfsp(sparsity=sparsity)):
        assert method.apply(loaded, calibration=windows).report.removed_ratio == pytest.approx(
            sparsity, abs=0.012
        )


@pytest.mark.parametrize("structure", ["AL-AM", "AL-MM", "UL-MM", "UL-UM"])
def test_a_layer_is_never_emptied(structure: str) -> None:
    loaded = build("llama-gqa")
    applied = Flap(sparsity=0.95, structure=structure, remove_heads=1000).apply(loaded, calibration=ids())
    for layer in decoder_of(applied.loaded).layers:
        assert layer.attention.kv_heads >= 1
        assert layer.attention.group == 2
        assert layer.mlp.width >= 1
    assert torch.isfinite(logits(applied, **padded())).all()


def test_given_heads_are_removed_from_the_whole_model() -> None:
    loaded = build("llama-mha")
    applied = Flap(sparsity=0.3, structure="AL-MM", remove_heads=5).apply(loaded, calibration=ids())
    left = sum(layer.attention.heads for layer in decoder_of(applied.loaded).layers)
    assert left == 18 - 5
    assert applied.report.removed_ratio == pytest.approx(0.3, abs=0.01)


def test_tied_embeddings_stay_tied_and_shared() -> None:
    loaded = build("llama-gqa")
    pruned = Flap(sparsity=0.4).apply(loaded, calibration=ids()).model
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert pruned.lm_head.weight.data_ptr() == loaded.model.lm_head.weight.data_ptr()
    pruned.to(torch.bfloat16)  # casting the copy must not reach the original
    assert loaded.dtype == torch.float32


def test_inplace_cuts_the_model_itself() -> None:
    loaded, copy = build("llama-gqa"), build("llama-gqa")
    expected = logits(Flap(sparsity=0.4).apply(copy, calibration=ids()), **padded())
    applied = Flap(sparsity=0.4).apply(loaded, calibration=ids(), inplace=True)
    assert applied.model is loaded.model
    assert torch.equal(logits(loaded.model, **padded()), expected)


def test_pruning_twice() -> None:
    once = Cfsp(sparsity=0.2, slope=20.0).apply(build("qwen2"), calibration=ids()).loaded
    twice = Flap(sparsity=0.3).apply(once, calibration=ids())
    assert twice.report.total == decoder_of(once).prunable_parameters()
    assert twice.report.kept < twice.report.total
    assert torch.isfinite(logits(twice, **padded())).all()


def test_widths_can_be_multiples() -> None:
    applied = Cfsp(ffn_sparsity=0.4, round_to=16).apply(build("llama-gqa"), calibration=ids())
    assert all(layer.mlp.width % 16 == 0 and layer.mlp.width for layer in decoder_of(applied.loaded).layers)


def test_corrected_score_depends_on_the_weights() -> None:
    """As released, CFSP ranks by activation alone; relative to the layer, another weight matrix changes the order."""
    layer = decoder_of(build("llama-gqa")).layers[0]
    norms = torch.rand(80, generator=torch.Generator().manual_seed(3)) + 0.5
    released = Cfsp().channel_scores(layer.mlp, norms)
    torch.testing.assert_close(released, 3 / 48 * norms.sqrt(), rtol=1e-5, atol=0)
    corrected = Cfsp(relative_to="layer").channel_scores(layer.mlp, norms)
    assert not torch.equal(corrected.argsort(), released.argsort())


# --- the streaming pass -----------------------------------------------------------------------------------------


class Collect:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def update(self, *activations: torch.Tensor) -> None:
        self.seen.append(tuple(x.clone() for x in activations))


def watch_all(layer: DecoderLayer) -> dict[str, Watch]:
    points = {
        "output": layer.attention.output,
        "down": layer.mlp.down,
        "query": layer.attention.query,
        "norm": layer.post_norm,
        "layer": "layer",
    }
    return {name: Watch(point, Collect()) for name, point in points.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_pass_sees_what_a_plain_forward_sees(name: str) -> None:
    """Every point of every layer, against hooks on ordinary forward passes of single sequences."""
    loaded, windows = build(name), ids(5, 9)
    seen = stream(decoder_of(loaded), windows, watch_all, batch=2)
    for row in range(5):
        for layer, observers in zip(decoder_of(loaded).layers, seen, strict=True):
            found: dict[str, torch.Tensor] = {}

            def before(_: Any, inputs: Any, key: str, found: dict[str, torch.Tensor] = found) -> None:
                found[key] = inputs[0][0]

            def after(_: Any, inputs: Any, output: Any, found: dict[str, torch.Tensor] = found) -> None:
                found["out"] = output[0]

            points = {
                "output": layer.attention.output.linear,
                "down": layer.mlp.down.linear,
                "query": layer.attention.query.linear,
                "norm": layer.post_norm,
                "in": layer.module,
            }
            handles = [
                module.register_forward_pre_hook(partial(before, key=key)) for key, module in points.items()
            ]
            handles.append(layer.module.register_forward_hook(after))
            logits(loaded.model, input_ids=windows[row : row + 1])
            for handle in handles:
                handle.remove()
            for key in ("output", "down", "query", "norm"):
                torch.testing.assert_close(observers[key].seen[row][0], found[key], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(observers["layer"].seen[row][0], found["in"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(observers["layer"].seen[row][1], found["out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-window", "mistral-window"])
def test_padding_is_not_seen(name: str, side: str) -> None:
    loaded, batch = build(name), padded(side)
    together = stream(
        decoder_of(loaded), batch["input_ids"], watch_all, attention_mask=batch["attention_mask"], batch=3
    )
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = stream(decoder_of(loaded), batch["input_ids"][row : row + 1, mask], watch_all)
        for one, many in zip(alone, together, strict=True):
            for key, observer in one.items():
                for expected, found in zip(observer.seen[0], many[key].seen[row], strict=True):
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_decisions_do_not_depend_on_batching(method: WeightPruner) -> None:
    decoder = decoder_of(build("llama-gqa"))
    one, many = (
        method.decide(decoder, stream(decoder, ids(), method.observe, batch=size)) for size in (1, 4)
    )
    for a, b in zip(one, many, strict=True):
        assert a.heads is None or torch.equal(a.heads, b.heads)
        assert torch.equal(a.channels, b.channels)


def test_sequential_pruning_feeds_the_next_layer_from_the_pruned_one() -> None:
    loaded = build("llama-gqa")
    model = share_parameters(loaded.model)
    decoder = decoder_of(LoadedModel(model))
    steps: list[tuple[int, int]] = []

    def prune(index: int, seen: Any) -> None:
        norms = seen["down"].mean
        cut_layers(
            Decoder(**{**vars(decoder), "layers": decoder.layers[index : index + 1]}),
            [LayerCut(channels=norms > norms.median())],
        )

    def observe(layer: DecoderLayer) -> dict[str, Watch]:
        return {"down": Watch(layer.mlp.down, SquareSum())}

    seen = stream(decoder, ids(), observe, prune=prune, progress=lambda *step: steps.append(step))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    # The last layer was measured at full width, behind two pruned layers.
    checked = SquareSum()
    layer = decoder.layers[2]
    keep = seen[2]["down"].mean > seen[2]["down"].mean.median()
    handle = layer.mlp.down.linear.register_forward_pre_hook(
        lambda _, inputs: [checked.update(x) for x in inputs[0]] and None
    )
    logits(model, input_ids=ids())
    handle.remove()
    torch.testing.assert_close(checked.mean, seen[2]["down"].mean[keep], rtol=1e-4, atol=1e-6)
    dense = stream(decoder_of(loaded), ids(), observe)
    assert not torch.allclose(dense[2]["down"].mean, seen[2]["down"].mean, rtol=1e-2)


# --- refusals ---------------------------------------------------------------------------------------------------


def test_nan_activations_name_the_layer_and_change_nothing() -> None:
    loaded = build("llama-gqa")
    loaded.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RunFailed, match="layer 1 produces NaN"):
        Flap().apply(loaded, calibration=ids(), inplace=True)
    assert all("forward" not in module.__dict__ for module in loaded.model.modules())
    assert all(not module._forward_pre_hooks for module in loaded.model.modules())
    assert decoder_of(loaded).layers[0].mlp.width == 80


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (ids(1), "at least 2 calibration windows"),
        (torch.zeros(0, 5, dtype=torch.long), "at least 2 calibration windows"),
        (torch.full((3, 5), 97), "97 tokens"),
        (torch.rand(3, 5), "must be integers"),
        (["some text"], "no tokenizer"),
        (None, "no tokenizer"),
    ],
)
def test_calibration_that_cannot_be_used(calibration: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Flap().apply(build("llama-gqa"), calibration=calibration)


def test_cfsp_cannot_remove_more_than_the_ffn_holds() -> None:
    with pytest.raises(BadParameter, match=r"sparsity must be below 0\.\d{4}"):
        Cfsp(sparsity=0.8).apply(build("llama-gqa"), calibration=ids())
    with pytest.raises(ValueError, match="not both"):
        Cfsp(sparsity=0.1, ffn_sparsity=0.1)


def test_groups_must_stay_even() -> None:
    attention = decoder_of(build("llama-gqa")).layers[0].attention
    with pytest.raises(ValueError, match="different numbers"):
        keep_heads(attention, torch.tensor([True, False, True, True, True, True]))
    with pytest.raises(ValueError, match="at least one"):
        keep_heads(attention, torch.zeros(6, dtype=torch.bool))


def test_heads_may_leave_within_groups_when_evenly() -> None:
    loaded = build("qwen3")
    heads = torch.tensor(
        [True, False, False, True, True, False, False, False]
    )  # one of two, in three of four groups
    cuts = [LayerCut(heads=heads, channels=None)] * 3
    model = share_parameters(loaded.model)
    cut_layers(decoder_of(LoadedModel(model)), cuts)
    refit(model)
    assert model.config.num_attention_heads == 3  # alike in all layers: a plain configuration
    torch.testing.assert_close(
        logits(model, **padded()), logits(masked(loaded, cuts), **padded()), rtol=0, atol=1e-4
    )


def test_a_quantised_model_is_refused() -> None:
    loaded = build("llama-gqa")
    down = loaded.model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(Refused, match="'down_proj' of this model is quantised"):
        Flap().apply(loaded, calibration=ids())
    loaded.model.model.layers[0].self_attn.k_proj = nn.Identity()  # as packed weights of other libraries
    with pytest.raises(Refused, match="'k_proj' of this model is quantised or wrapped"):
        Flap().apply(loaded, calibration=ids())
