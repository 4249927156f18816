"""The encoder engine with small stages of its own: places, masks, padding, passes, undoing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import DEPTH, ENCODERS, PREFIX, features, footprint, lengths, pixels, tiny
from torch.testing import assert_close

from zoo.engines.blocks import BlockReducer, BlockStage, BlockView, Place
from zoo.engines.reductions import Join, Keep, Transform
from zoo.errors import BadInput, Refused, RunFailed
from zoo.models.anatomy import Encoder


def encoder_of(loaded: Any) -> Encoder:
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    return encoder


def drop_last(view: BlockView) -> Keep:
    batch, tokens = view.tokens.shape[:2]
    return Keep(torch.arange(tokens - 1).expand(batch, -1))


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("training", [False, True])
def test_split_blocks_equal_the_model(kind: str, training: bool) -> None:
    """Without stages the halves are the block, bit by bit, with dropout and stochastic depth too."""
    rates = {"drop_path_rate": 0.3} if "dinov2" in kind else {"hidden_dropout_prob": 0.2}
    rates = {} if kind in ("clip", "siglip") else rates
    noise = "attention_dropout" if kind in ("clip", "siglip") else "attention_probs_dropout_prob"
    loaded = tiny(kind, **rates, **{noise: 0.2})
    loaded.model.train(training)
    torch.manual_seed(1)
    dense = features(loaded.model, pixels())
    reducer = BlockReducer(encoder_of(loaded), [], "test")
    torch.manual_seed(1)
    assert torch.equal(features(loaded.model, pixels()), dense)
    reducer.close()
    if training:
        torch.manual_seed(2)
        assert not torch.equal(features(loaded.model, pixels()), dense)


@pytest.mark.parametrize(
    ("place", "attention", "mlp"),
    [
        ("before", [37, 36, 36, 36], [37, 36, 36, 36]),
        ("between", [37, 37, 36, 36], [37, 36, 36, 36]),
        ("after", [37, 37, 36, 36], [37, 37, 36, 36]),
    ],
)
def test_places(place: Place, attention: list[int], mlp: list[int]) -> None:
    loaded = tiny("vit")
    reducer = BlockReducer(encoder_of(loaded), [BlockStage(1, drop_last, place)], "test")
    with lengths(loaded) as seen:
        features(loaded.model, pixels())
    assert seen == {"attention": attention, "mlp": mlp}
    assert reducer.tokens == [*attention, 36]
    reducer.close()


@pytest.mark.parametrize("kind", ENCODERS)
def test_rows_equal_eager_attention(kind: str) -> None:
    """Rows computed beside SDPA are those that eager attention returns."""
    rows: dict[int, torch.Tensor] = {}

    def look(view: BlockView) -> None:
        rows[view.block] = view.attention(slice(None))
        assert_close(view.attention(slice(0, 1)), rows[view.block][:, :, :1])

    loaded = tiny(kind)
    stages = [BlockStage(block, look, observes=True) for block in range(DEPTH)]
    reducer = BlockReducer(encoder_of(loaded), stages, "test")
    features(loaded.model, pixels())
    reducer.close()
    with torch.no_grad():
        eager = tiny(kind, attention="eager").model(pixels(), output_attentions=True)
    for block in range(DEPTH):
        assert_close(rows[block], eager.attentions[block], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "clip", "dinov2"])
def test_key_bias_is_added_to_the_logits(kind: str) -> None:
    """A very low bias hides a key as well as removing it from the sequence does."""
    loaded = tiny(kind)
    hidden = torch.zeros(2, 36 + PREFIX[kind])
    hidden[:, -1] = -1e4

    biased = BlockReducer(encoder_of(loaded), [], "test", key_bias=lambda view: hidden)
    left = features(loaded.model, pixels())[:, :-1]
    biased.close()
    cut = BlockReducer(encoder_of(loaded), [BlockStage(0, drop_last, "before")], "test")
    assert_close(left, features(loaded.model, pixels()), rtol=1e-4, atol=1e-5)
    cut.close()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_samples_that_keep_different_numbers_equal_single_ones(attention: str) -> None:
    """``Keep.valid`` pads; padding is invisible to attention from then on."""
    counts = [20, 31]

    def ragged(view: BlockView) -> Keep:
        index = torch.arange(max(counts)).expand(len(view.tokens), -1)
        valid = index < torch.tensor(counts[: len(view.tokens)]).unsqueeze(1)
        return Keep(index.where(valid, 0), valid)

    loaded = tiny("vit", attention=attention)
    x = pixels()
    together = BlockReducer(encoder_of(loaded), [BlockStage(1, ragged)], "test")
    out = features(loaded.model, x)
    together.close()
    for sample, count in enumerate(counts):
        alone = BlockReducer(
            encoder_of(loaded), [BlockStage(1, lambda view, n=count: Keep(torch.arange(n)[None]))], "test"
        )
        assert_close(
            out[sample, :count], features(loaded.model, x[sample : sample + 1])[0], rtol=1e-4, atol=1e-5
        )
        alone.close()


def test_a_given_mask_is_shortened_with_the_tokens() -> None:
    """Patches hidden by the caller stay hidden after a reduction that moves tokens around."""
    loaded = tiny("vit")
    x = pixels()
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[0, 30:] = 0

    def reverse(view: BlockView) -> Keep:
        order = torch.cat((torch.zeros(1, dtype=torch.long), torch.arange(36, 0, -1)))
        return Keep(order.expand(2, -1))

    with torch.no_grad():
        dense = loaded.model(pixel_values=x, attention_mask=mask).logits
        unmasked = loaded.model(pixel_values=x).logits
        reducer = BlockReducer(encoder_of(loaded), [BlockStage(1, reverse)], "test")
        moved = loaded.model(pixel_values=x, attention_mask=mask).logits
        reducer.close()
    assert_close(moved, dense, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dense[0], unmasked[0], atol=1e-3)


def test_a_mask_that_differs_between_queries_is_refused() -> None:
    loaded = tiny("vit")
    causal = torch.ones(37, 37, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    reducer = BlockReducer(encoder_of(loaded), [BlockStage(1, drop_last)], "test")
    with pytest.raises(Refused, match="differs between queries"):
        loaded.model(pixel_values=pixels(), attention_mask=causal)
    reducer.close()


def test_sizes_follow_every_kind_of_reduction() -> None:
    seen: dict[int, torch.Tensor] = {}

    def pair(view: BlockView) -> Join:
        seen[0] = view.sizes
        kept = torch.cat((torch.arange(35), torch.tensor([36]))).expand(2, -1)
        moved = torch.full((2, 1), 35)
        return Join(kept, moved, torch.full((2, 1), 35), 37, view.sizes)

    def keep(view: BlockView) -> Keep:
        seen[1] = view.sizes
        return Keep(torch.tensor([[0, 35, 3]] * 2))

    def double(view: BlockView) -> Transform:
        seen[2] = view.sizes
        return Transform(torch.eye(3).expand(2, -1, -1) * 2, torch.arange(3).expand(2, -1))

    def last(view: BlockView) -> None:
        seen[3] = view.sizes

    loaded = tiny("vit")
    stages = [BlockStage(block, stage) for block, stage in enumerate((pair, keep, double, last))]
    reducer = BlockReducer(encoder_of(loaded), stages, "test", counts=True)
    features(loaded.model, pixels())
    reducer.close()
    assert seen[0].eq(1).all()
    assert seen[1][0].tolist() == [1.0] * 35 + [2.0]
    assert seen[2][0].tolist() == [1, 2, 1]
    assert seen[3][0].tolist() == [2, 4, 2]


def test_restore_brings_every_position_back() -> None:
    loaded = tiny("vit")
    reducer = BlockReducer(encoder_of(loaded), [BlockStage(1, drop_last)], "test", restore=2)
    with lengths(loaded) as seen:
        out = features(loaded.model, pixels())
    assert out.shape[1] == 37
    assert seen["attention"] == [37, 37, 36, 37]
    reducer.close()


def test_memory_and_passes_do_not_leak_between_inputs() -> None:
    loaded = tiny("vit")
    found: list[dict[str, Any]] = []

    def note(view: BlockView) -> None:
        found.append(dict(view.memory))
        view.memory["seen"] = float(view.tokens.sum())

    reducer = BlockReducer(encoder_of(loaded), [BlockStage(0, note), BlockStage(2, note)], "test")
    features(loaded.model, pixels(seed=0))
    first = reducer.memory["seen"]
    features(loaded.model, pixels(batch=3, seed=1))
    assert found[0] == found[2] == {}
    assert reducer.memory["seen"] != first
    reducer.close()


@pytest.mark.parametrize("where", ["in a stage", "between blocks"])
def test_an_interrupted_input_leaves_nothing_behind(where: str) -> None:
    """Also when the exception comes from somebody else's hook, outside our code."""
    loaded = tiny("vit")
    features(loaded.model, pixels())  # transformers installs its own recording hooks once
    before = footprint(loaded.model)
    reference = BlockReducer(encoder_of(loaded), [BlockStage(1, drop_last)], "test")
    expected = features(loaded.model, pixels())
    reference.close()
    fail = [True]

    def stage(view: BlockView) -> Keep:
        if fail[0] and where == "in a stage":
            raise KeyboardInterrupt
        return drop_last(view)

    def hook(*_: Any) -> None:
        if fail[0] and where == "between blocks":
            raise KeyboardInterrupt

    reducer = BlockReducer(encoder_of(loaded), [BlockStage(1, stage)], "test")
    handle = encoder_of(loaded).blocks[1].module.register_forward_hook(hook)
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            loaded.model(pixel_values=pixels(batch=3))
    with pytest.raises(BadInput, match="no input has run"):
        _ = reducer.tokens
    fail[0] = False
    assert torch.equal(features(loaded.model, pixels()), expected)
    assert reducer.tokens == [37, 37, 36, 36, 36]
    handle.remove()
    reducer.close()
    reducer.close()
    assert footprint(loaded.model) == before


def test_an_encoder_run_inside_an_encoder() -> None:
    """A hook that runs the same model again gets its own pass."""
    loaded = tiny("vit")
    reducer = BlockReducer(encoder_of(loaded), [BlockStage(1, drop_last)], "test")
    expected = features(loaded.model, pixels())
    inner: list[torch.Tensor] = []

    def again(*_: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))
            with torch.no_grad():
                inner.append(loaded.model(pixel_values=pixels(batch=1)).logits)

    handle = encoder_of(loaded).blocks[2].module.register_forward_hook(again)
    with torch.no_grad():
        outer = loaded.model(pixel_values=pixels()).logits
    handle.remove()
    with torch.no_grad():
        assert torch.equal(outer, loaded.model(pixel_values=pixels()).logits)
        assert torch.equal(inner[1], loaded.model(pixel_values=pixels(batch=1)).logits)
    assert torch.equal(features(loaded.model, pixels()), expected)
    reducer.close()


def test_blocks_out_of_order_are_an_error() -> None:
    loaded = tiny("vit")
    reducer = BlockReducer(encoder_of(loaded), [BlockStage(1, drop_last)], "test")
    with pytest.raises(RunFailed, match="block 2"):
        encoder_of(loaded).blocks[2].module(torch.zeros(1, 5, 64))
    reducer.close()


def test_refusals() -> None:
    loaded = tiny("vit")
    encoder = encoder_of(loaded)
    first = BlockReducer(encoder, [], "first")
    with pytest.raises(Refused, match="close the method"):
        BlockReducer(encoder, [], "second")
    first.close()
    with pytest.raises(ValueError, match="same place"):
        BlockReducer(encoder, [BlockStage(0, drop_last), BlockStage(0, drop_last)], "test")
    encoder.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(Refused, match="attn_implementation='sdpa'"):
        BlockReducer(encoder, [], "test", key_bias=lambda view: None)
    with pytest.raises(BadInput, match="no input has run"):
        _ = first.sources
    with pytest.raises(ValueError, match="not observed"):
        _ = BlockView(torch.zeros(1, 2, 3), 0, 0, None, {}).seen


def test_gradient_checkpointing_is_refused_in_training_only() -> None:
    loaded = tiny("vit")
    for block in encoder_of(loaded).blocks:
        block.module.gradient_checkpointing = True
    reducer = BlockReducer(encoder_of(loaded), [BlockStage(1, drop_last)], "test")
    assert features(loaded.model, pixels()).shape[1] == 36
    loaded.model.train()
    with pytest.raises(BadInput, match="turn it off"):
        loaded.model(pixel_values=pixels())
    reducer.close()


def test_a_failed_installation_is_undone() -> None:
    loaded = tiny("vit")
    encoder = encoder_of(loaded)
    module = encoder.blocks[2].attention.module
    config = module.config
    before = footprint(loaded.model)
    module.config = None
    with pytest.raises(Refused, match="attention registry"):
        BlockReducer(encoder, [BlockStage(b, drop_last, observes=True) for b in range(DEPTH)], "test")
    module.config = config
    assert footprint(loaded.model) == before
