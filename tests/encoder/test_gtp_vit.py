"""GTP-ViT: its graph, its attention and its propagation against literal loops."""

from __future__ import annotations

import pytest
import torch
from encoders import features, lengths, pixels, tiny
from pydantic import PrivateAttr
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

import zoo
from zoo.engines.blocks import BlockView
from zoo.engines.patch_graphs import grid_neighbours, nearest_neighbours, sparsified, standing
from zoo.engines.provenance import Trace, share
from zoo.engines.reductions import Absorb
from zoo.errors import BadInput, Refused
from zoo.methods.encoder_tokens.gtp_vit import GTPViT
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_grid_neighbours_are_the_eight_around() -> None:
    near = grid_neighbours(3, 4)
    for i in range(12):
        for j in range(12):
            apart = max(abs(i // 4 - j // 4), abs(i % 4 - j % 4))
            assert bool(near[i, j]) == (apart == 1)


def test_nearest_neighbours_are_the_most_similar_others() -> None:
    x = rand(2, 9, 6)
    near = nearest_neighbours(x, 3)
    for sample in range(2):
        for i in range(9):
            likeness = {
                j: float(cosine_similarity(x[sample, i], x[sample, j], dim=0)) for j in range(9) if j != i
            }
            best = sorted(likeness, key=lambda j: -likeness[j])[:3]
            assert near[sample, i].nonzero().flatten().tolist() == sorted(best)
    assert nearest_neighbours(x, 100).sum() == 2 * 9 * 8


@pytest.mark.parametrize("graph", ["mixed", "spatial", "semantic"])
def test_the_graph_is_normalised_by_row_sums(graph: str) -> None:
    x = rand(1, 12, 6)
    method = zoo.method("gtp-vit", graph=graph, grid=(3, 4), neighbours=2)
    assert isinstance(method, GTPViT)
    linked = torch.zeros(12, 12)
    if graph != "spatial":
        linked += nearest_neighbours(x, 2)[0]
    if graph != "semantic":
        linked += grid_neighbours(3, 4)
    linked = (linked > 0).float()
    degree = linked.sum(1)
    found = method.connect(x, 2)[0]
    for i in range(12):
        for j in range(12):
            assert float(found[i, j]) == pytest.approx(float(linked[i, j] / (degree[i] * degree[j]).sqrt()))


def test_the_smallest_entries_of_each_map_go() -> None:
    attention = rand(2, 3, 10, 10).softmax(-1)
    kept = sparsified(attention, 0.6)
    for sample in range(2):
        for head in range(3):
            ranked = attention[sample, head].flatten().sort().values
            expected = attention[sample, head].where(
                attention[sample, head] >= ranked[39], 0
            )  # the 40th stays
            assert torch.equal(kept[sample, head], expected)
    assert sparsified(attention, 1) is attention
    watched = attention.clone().requires_grad_()
    found = sparsified(watched, 0.6)
    assert torch.equal(found, kept)
    found.sum().backward()
    assert watched.grad is not None
    assert torch.equal(watched.grad, (kept > 0).float())


def test_entries_that_tie_with_the_threshold_stay() -> None:
    """Maps large enough that the threshold is searched for, of few different values, zeros and NaN among them."""
    generator = torch.Generator().manual_seed(0)
    for values in (1, 2, 5, 300, 10**6):
        attention = torch.randint(0, values, (1, 4, 33, 33), generator=generator) / values
        for fraction in (0.01, 0.4, 0.999):
            lowest = attention.flatten(2).kthvalue(max(1, int(33 * 33 * (1 - fraction)))).values
            expected = attention.where(attention >= lowest[..., None, None], 0)
            assert torch.equal(sparsified(attention, fraction), expected)
    broken = rand(1, 1, 33, 33).softmax(-1)
    broken[..., ::2, :] = torch.nan
    assert sparsified(broken, 0.1).isnan().any()


def test_every_rule_ranks_patches_only() -> None:
    attention = rand(1, 2, 8, 8, seed=1).softmax(-1)
    column, diagonal = attention.sum(2), attention.diagonal(dim1=2, dim2=3)
    expected = {
        "cls-max": attention[:, :, 0].amax(1),
        "received-mean": column.mean(1),
        "diagonal-max": diagonal.amax(1),
        "product-max": diagonal.amax(1) * column.amax(1),
        "sum-max": diagonal.amax(1) + column.amax(1),
    }
    for rule, score in expected.items():
        assert_close(standing(attention, rule, 3), score[:, 3:])
    row = attention.mean(1)[0, 3:]
    unlike = [-sum(float(cosine_similarity(a, b, dim=0)) for b in row) for a in row]
    assert_close(standing(attention, "unlike-mean", 3)[0], torch.tensor(unlike), rtol=1e-4, atol=1e-5)


def test_propagation_is_the_linear_map_that_is_traced() -> None:
    """Values, sizes and sources of the cheap form equal those of the dense matrix."""
    graph = rand(2, 9, 9).abs()
    attention = rand(2, 2, 11, 11, seed=2).softmax(-1)
    method = GTPViT(propagated=3, alpha=0.3)
    memory = {"graph": graph, "patches": torch.arange(9).expand(2, -1), "attention": attention}
    view = BlockView(rand(2, 11, 4, seed=3), 0, 2, None, memory)
    absorb = method.propagate(view)
    assert isinstance(absorb, Absorb)
    x = rand(2, 11, 4, seed=4)
    assert_close(absorb.apply(x), absorb.matrix @ x)
    assert_close(share(absorb, torch.ones(2, 11)), absorb.matrix.sum(-1))
    trace = Trace(2, 11, torch.device("cpu"))
    trace.add(absorb)
    assert_close(trace.sources(), absorb.matrix)
    for sample in range(2):
        kept, gone = absorb.anchor[sample, 2:] - 2, absorb.moved[sample] - 2
        assert sorted([*kept.tolist(), *gone.tolist()]) == list(range(9))
        for slot, patch in enumerate(kept.tolist()):
            expected = x[sample, patch + 2].clone()
            for leaving in gone.tolist():
                expected += 0.3 * graph[sample, patch, leaving] * x[sample, leaving + 2]
            assert_close(absorb.apply(x)[sample, slot + 2], expected)
        assert torch.equal(view.memory["patches"][sample], kept)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "siglip"])
def test_its_attention_equals_the_kernel_when_nothing_is_left_out(kind: str) -> None:
    loaded = tiny(kind)
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    seen: list[torch.Tensor] = []
    hook = encoder.blocks[0].attention.module.register_forward_hook(
        lambda *args: seen.append(args[2][0].detach())
    )
    features(loaded.model, pixels())
    for sparsity in (1, 0.3):
        with zoo.method("gtp-vit", sparsity=sparsity).apply(loaded):
            features(loaded.model, pixels())
    hook.remove()
    assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[2], seen[0], atol=1e-4)


def test_patches_hidden_by_a_mask_give_nothing() -> None:
    """A patch that the caller hides leaves first, and no other token takes it in."""
    loaded = tiny("vit")
    mask = torch.ones(1, 37, dtype=torch.long)
    mask[0, 30:] = 0
    other = pixels(1)
    other[:, :, 40:] = 9.0  # the last row of patches, all of them hidden
    with zoo.method("gtp-vit", propagated=7, graph="spatial").apply(loaded) as applied, torch.no_grad():
        one = loaded.model(pixel_values=pixels(1), attention_mask=mask).logits
        assert float(applied.sources[:, :, 30:].abs().max()) == 0
        two = loaded.model(pixel_values=other, attention_mask=mask).logits
    assert_close(two, one)


def test_grids_that_are_not_square() -> None:
    loaded = tiny("dinov2")
    wide = torch.randn(1, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    with (
        zoo.method("gtp-vit").apply(loaded),
        pytest.raises(BadInput, match="set grid to the rows"),
        torch.no_grad(),
    ):
        loaded.model(pixel_values=wide)
    with zoo.method("gtp-vit", grid=(6, 5), propagated=4).apply(loaded) as applied, torch.no_grad():
        loaded.model(pixel_values=wide)
    assert applied.tokens_per_block == [31, 27, 23, 19]


def test_an_encoder_without_cls_has_one_neighbour_more() -> None:
    """A quirk of the release, kept."""
    for kind, expected in (("vit", 3), ("siglip", 4)):
        loaded = tiny(kind)
        method = GTPViT(graph="semantic", neighbours=3, propagated=1)
        encoder = loaded.anatomy.encoder
        assert encoder is not None
        memory: dict[str, torch.Tensor] = {}
        method.stages(encoder)[0].reduce(BlockView(rand(1, 36, 8), 0, 0, None, memory))
        assert (memory["graph"][0] > 0).sum(1).tolist() == [expected] * 36


def test_one_patch_always_stays() -> None:
    loaded = tiny("vit")
    with zoo.method("gtp-vit", propagated=1000).apply(loaded) as applied:
        features(loaded.model, pixels())
    assert applied.tokens_per_block == [37, 2, 2, 2]


class Noting(GTPViT):
    """Writes down the blocks whose attention it stands for."""

    _blocks: list[int] = PrivateAttr(default_factory=list)

    def attend(self, view: BlockView) -> torch.Tensor:
        self._blocks.append(view.block)
        return super().attend(view)


def test_behind_the_projected_block_the_kernel_of_the_model_runs() -> None:
    model, processor = tiny_model("tiny-llava")
    loaded = LoadedModel(model, processor)
    ids = torch.full((1, 36), model.config.image_token_id)
    method = Noting(restore=True)
    with method.apply(loaded), lengths(loaded) as seen, torch.no_grad():
        model(input_ids=ids, pixel_values=pixels(1))
    assert seen["attention"] == [37, 29, 21, 37]
    assert method._blocks == [0, 1, 2]


def test_selection_by_cls_needs_one() -> None:
    with pytest.raises(Refused, match="has no"):
        zoo.method("gtp-vit", selection="cls-max").apply(tiny("siglip"))
