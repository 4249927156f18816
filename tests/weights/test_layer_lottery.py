"""Layer lottery: scores against autograd written out, initial weights, tickets that are really trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from depth import decoder_of, ids, loaded, scale_layer, state
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo
from zoo.engines.initialisation import draw_initial_weights
from zoo.errors import RunFailed
from zoo.methods.weights.layer_lottery import LayerLottery


def loss_of(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Windows are of one length, so the mean over all tokens is the mean over windows."""
    return model(input_ids=windows, labels=windows).loss


def names_by_layer(model: Any) -> list[list[str]]:
    names = [name for name, _ in model.named_parameters()]
    count = model.config.num_hidden_layers
    return [[name for name in names if name.startswith(f"model.layers.{index}.")] for index in range(count)]


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_gradient_scores_are_those_of_autograd(criterion: Any, aggregate: Any) -> None:
    model, windows = loaded("tiny-qwen2"), ids()
    scores = LayerLottery(criterion=criterion, aggregate=aggregate).scores(
        decoder_of(model), windows, batch=2
    )
    loss_of(model.model, windows).backward()
    parameters = dict(model.model.named_parameters())
    for found, names in zip(scores.tolist(), names_by_layer(model.model), strict=True):
        products = torch.cat(
            [(parameters[name] * parameters[name].grad).detach().flatten() for name in names]
        )
        products = products.abs() if criterion == "snip" else products
        expected = products.sum() if aggregate == "sum" else products.mean()
        assert found == pytest.approx(float(expected), rel=1e-3, abs=1e-7)


def test_hessian_scores_are_those_of_differences_of_gradients() -> None:
    model, windows = loaded(num_hidden_layers=2), ids(3, 10)
    model.model.double()
    weights = {name: value.detach() for name, value in model.model.named_parameters()}
    layers = names_by_layer(model.model)

    def gradient(shift: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moved = {name: weights[name] + shift.get(name, 0) for name in weights}
        moved = {name: value.requires_grad_(True) for name, value in moved.items()}
        out = functional_call(model.model, moved, kwargs={"input_ids": windows, "labels": windows})
        chosen = [name for names in layers for name in names]
        found = torch.autograd.grad(out.loss, [moved[name] for name in chosen])
        return dict(zip(chosen, found, strict=True))

    g = gradient({})
    step = 1e-4
    ahead = gradient({name: step * value for name, value in g.items()})
    back = gradient({name: -step * value for name, value in g.items()})
    expected = [
        -sum(float((weights[n] * (ahead[n] - back[n]) / (2 * step)).sum()) for n in names) for names in layers
    ]
    found = LayerLottery(criterion="grasp-hessian").scores(decoder_of(model), windows, batch=2)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


def test_the_hessian_product_leaves_fused_attention_on() -> None:
    model = loaded()
    LayerLottery(criterion="grasp-hessian", weights="given").apply(model, calibration=ids())
    assert torch.backends.cuda.flash_sdp_enabled()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        model.model(input_ids=ids())


def test_scoring_leaves_no_trace_and_works_under_no_grad_on_frozen_weights() -> None:
    model, windows = loaded(), ids()
    expected = LayerLottery().scores(decoder_of(model), windows)
    model.model.requires_grad_(False)
    before = state(model.model)
    with torch.no_grad():
        assert torch.equal(LayerLottery().scores(decoder_of(model), windows), expected)
        assert not torch.is_grad_enabled()
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in model.model.parameters()
    )
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


def test_a_layer_whose_weights_do_nothing_leaves_first_by_snip() -> None:
    model = loaded()
    scale_layer(model, 2, 0.0)
    # Zero projections still have gradients, but the product with the weight is what counts.
    method = LayerLottery(criterion="snip", weights="given", layers=1)
    applied = method.apply(model, calibration=ids())
    assert applied.report.facts["removed"] == "layer 2"


def test_initial_weights_are_drawn_by_the_class_itself() -> None:
    model = loaded("tiny-qwen2").model
    before, random = state(model), torch.random.get_rng_state()
    draw_initial_weights(model, 5)
    assert torch.equal(torch.random.get_rng_state(), random)
    drawn = state(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(torch.equal(drawn[name], before[name]) for name in dict(model.named_parameters()))
    assert float(drawn["model.layers.1.mlp.up_proj.weight"].std()) == pytest.approx(
        model.config.initializer_range, rel=0.1
    )
    assert (drawn["model.norm.weight"] == 1).all()
    draw_initial_weights(model, 5)
    assert all(torch.equal(value, drawn[name]) for name, value in model.state_dict().items())
    draw_initial_weights(model, 6)
    assert not torch.equal(
        model.state_dict()["model.layers.1.mlp.up_proj.weight"], before["model.norm.weight"]
    )


def test_the_ticket_has_the_weights_that_the_dense_network_began_with() -> None:
    model = loaded()
    begun = LayerLottery(sparsity=0).apply(model, calibration=ids(), seed=3)
    ticket = LayerLottery(layers=1).apply(model, calibration=ids(), seed=3)
    removed = int(str(ticket.report.facts["removed"]).removeprefix("layer "))
    kept = [layer for index, layer in enumerate(begun.model.model.layers) if index != removed]
    for layer, own in zip(ticket.model.model.layers, kept, strict=True):
        for one, other in zip(layer.parameters(), own.parameters(), strict=True):
            assert torch.equal(one, other)


def test_rewinding_scores_trained_weights_and_draws_the_rest_anew() -> None:
    model = loaded()
    given = LayerLottery(layers=2, weights="given").apply(model, calibration=ids())
    rewound = LayerLottery(layers=2, weights="rewound").apply(model, calibration=ids())
    assert given.report.facts["removed"] == rewound.report.facts["removed"]
    one, other = (x.model.model.layers[0].mlp.up_proj.weight for x in (given, rewound))
    assert one.shape == other.shape
    assert not torch.equal(one, other)


def test_nothing_to_remove_and_nothing_to_draw_keeps_every_bit() -> None:
    model = loaded()
    applied = LayerLottery(sparsity=0, weights="given").apply(model, calibration=ids())
    with torch.no_grad():
        assert torch.equal(applied(input_ids=ids()).logits, model.model(input_ids=ids()).logits)


def test_infinite_gradients_are_said() -> None:
    model = loaded()
    with torch.no_grad():
        model.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(RunFailed, match="gradient"):
        LayerLottery(weights="given").apply(model, calibration=ids())


def test_a_ticket_is_trained_saved_and_loads_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded()
    batches = []
    score = LayerLottery.scores

    def watched(self: LayerLottery, decoder: Any, windows: torch.Tensor, batch: int = 8) -> torch.Tensor:
        batches.append(len(windows))
        return score(self, decoder, windows, batch)

    monkeypatch.setattr(LayerLottery, "scores", watched)
    texts = [
        f"{word} runs and {word} sits and {word} runs again." for word in ("cat", "dog", "owl", "cow")
    ] * 5
    from zoo.dialogues import Dialogue

    trained = zoo.train(
        LayerLottery(layers=1, windows=8),
        model,
        [Dialogue(prompt="", response=text) for text in texts],
        output=tmp_path / "ticket",
        recipe={"steps": 30, "learning_rate": 3e-3},
        calibration=[" ".join(texts)],
        calibration_windows=2,
        length=64,
    )
    assert batches == [2]
    record = trained.record
    assert record.after["held-out perplexity"] < 0.5 * record.before["held-out perplexity"]
    again = zoo.load_model(str(tmp_path / "ticket" / "model"))
    assert again.model.config.num_hidden_layers == 3
    with torch.no_grad():
        torch.testing.assert_close(
            again.model(input_ids=ids()).logits, trained.outcome.model(input_ids=ids()).logits
        )
