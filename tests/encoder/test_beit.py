"""BEiT: the bias of relative positions follows the tokens that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import features, pixels, tiny
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

import zoo
from zoo.engines.blocks import BlockReducer, BlockStage, BlockView
from zoo.engines.reductions import Join, Keep
from zoo.errors import Refused
from zoo.models import LoadedModel
from zoo.models.anatomy import anatomy_of

KINDS: dict[str, dict[str, Any]] = {
    "own": {"use_relative_position_bias": True},
    "shared": {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
    "both": {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
}
every = pytest.mark.parametrize("kind", KINDS)


def bias_of(model: Any, layer: Any, side: int) -> torch.Tensor:
    """What is added to the logits of a block for ``side x side`` patches, ``[H, N, N]``."""
    sources = (model.base_model.shared_position_bias, layer.relative_position_bias)
    return sum(source((side, side))[0] for source in sources if source is not None)


def by_hand(layer: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One block on ``x [N, D]`` with ``bias [H, N, N]``."""
    normed = layer.layernorm_before(x)
    attention = layer.attention
    query, key, value = (
        linear(normed).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    attended = scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(0, 1).flatten(1)
    x = x + layer.lambda_1 * attention.o_proj(attended)
    return x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))


@every
@pytest.mark.parametrize("size", [48, 40])
def test_kept_tokens_keep_their_positions(kind: str, size: int) -> None:
    """Two drops in a row, other tokens in each sample, also at another size than the one trained for."""
    loaded = tiny("beit", **KINDS[kind])
    side = size // 8
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([torch.randperm(side**2 + 1, generator=generator)[:20] for _ in range(2)])
    second = torch.stack([torch.randperm(20, generator=generator)[:9] for _ in range(2)])
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    stages = [
        BlockStage(1, lambda _: Keep(first), "before"),
        BlockStage(2, lambda _: Keep(second), "between"),
    ]
    with torch.no_grad():
        start = loaded.model(pixel_values=pixels(2, size), output_hidden_states=True).hidden_states[1]
    reducer = BlockReducer(encoder, stages, "test")
    out = features(loaded.model, pixels(2, size))
    reducer.close()
    layers = [block.module for block in encoder.blocks]
    for sample in range(2):
        with torch.no_grad():
            biases = [bias_of(loaded.model, layer, side) for layer in layers]
            place = first[sample]
            x = by_hand(layers[1], start[sample, place], biases[1][:, place][:, :, place])
            # The second drop lies between the halves of block 2: what stays sees the others once more.
            both = by_hand(layers[2], x, biases[2][:, place][:, :, place])
            x, place = both[second[sample]], place[second[sample]]
            x = by_hand(layers[3], x, biases[3][:, place][:, :, place])
        assert_close(out[sample], x, rtol=1e-4, atol=1e-5)


@every
def test_a_merged_token_stands_at_its_anchor(kind: str) -> None:
    loaded = tiny("beit", **KINDS[kind])
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    anchor = torch.tensor([[0, 5, 3, 30]])
    seen: list[torch.Tensor] = []

    def merge(view: BlockView) -> Join:
        return Join(anchor, torch.tensor([[7, 9]]), torch.tensor([[1, 1]]), view.tokens.shape[1])

    def look(view: BlockView) -> None:
        mask = view.seen.mask
        assert mask is not None
        seen.append(mask[0])

    reducer = BlockReducer(encoder, [BlockStage(0, merge), BlockStage(2, look, observes=True)], "test")
    features(loaded.model, pixels(1))
    reducer.close()
    with torch.no_grad():
        bias = bias_of(loaded.model, encoder.blocks[2].module, 6)
    assert_close(seen[0], bias[:, anchor[0]][:, :, anchor[0]])


@every
def test_all_positions_come_back_when_restored(kind: str) -> None:
    """Where nothing is dropped before the last block, restoring gives blocks their own bias again."""
    loaded = tiny("beit", **KINDS[kind])
    with zoo.method("tome", r=4, restore=True).apply(loaded):
        assert features(loaded.model, pixels()).shape == (2, 37, 64)
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    one = BlockStage(0, lambda view: Keep(torch.arange(36).expand(len(view.tokens), -1)), "after")
    masks: list[Any] = []
    probe = BlockStage(2, lambda view: masks.append(view.seen.mask), observes=True)
    reducer = BlockReducer(encoder, [one, probe], "test", restore=1)
    features(loaded.model, pixels())
    reducer.close()
    with torch.no_grad():
        expected = bias_of(loaded.model, encoder.blocks[2].module, 6)
    assert_close(masks[0][0], expected)


def test_gradients_reach_the_table_of_positions() -> None:
    loaded = tiny("beit")
    with zoo.method("evit", layers=(1,), keep_ratio=0.5).apply(loaded):
        loaded.model(pixel_values=pixels()).logits.sum().backward()
    for layer in loaded.model.base_model.layers:
        assert layer.relative_position_bias.relative_position_bias_table.grad.abs().max() > 0


def test_plain_beit_without_relative_positions() -> None:
    loaded = tiny("beit", use_relative_position_bias=False, use_absolute_position_embeddings=True)
    dense = features(loaded.model, pixels())
    with zoo.method("tome", r=0).apply(loaded):
        assert torch.equal(features(loaded.model, pixels()), dense)
    with zoo.method("tome", r=5).apply(loaded):
        assert features(loaded.model, pixels()).shape[1] == 17


@pytest.mark.parametrize("name", ["BeitForSemanticSegmentation", "BeitBackbone"])
def test_models_that_read_grids_are_refused(name: str) -> None:
    import transformers

    config = tiny("beit").model.config
    config.out_indices = [1, 2, 3, 4]
    config.use_auxiliary_head = False
    model = getattr(transformers, name)(config)
    with pytest.raises(Refused, match=f"{name} lays the patches .* load the encoder alone"):
        anatomy_of(model)
    assert LoadedModel(model.beit).anatomy.encoder is not None
