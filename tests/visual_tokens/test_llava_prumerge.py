"""PruMerge and PruMerge+: the rule against a slow reference, and the tokens that the decoder gets."""

from __future__ import annotations

import pytest
import torch
from encoder_reference import check_two_pictures, embeddings, encode, inputs
from reference import NEW, cast, load

import zoo
from zoo.methods.visual_tokens.llava_prumerge import LlavaPruMerge, headless_attention, outlier_ratio


def slow_prumerge(
    attention: torch.Tensor, keys: torch.Tensor, features: torch.Tensor, kept: list[int], neighbours: int
) -> torch.Tensor:
    """Steps 5 to 7 for different ``kept`` patches, token by token."""
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    complement = [i for i in range(len(features)) if i not in kept]
    out = []
    for place, i in enumerate(kept):
        rest = kept[:place] + kept[place + 1 :] + complement
        rest.sort(key=lambda j: -float(unit[i] @ unit[j]))
        near = rest[:neighbours]
        out.append(features[i] + sum(attention[j] * features[j] for j in near))
    out.append(sum((attention[j] * features[j] for j in complement), torch.zeros_like(features[0])))
    return torch.stack(out)


def test_outliers_by_hand() -> None:
    values = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 12.1]])  # quartiles 2.75 and 6.25: above 11.5 is out
    assert outlier_ratio(values) == 1 / 8
    assert outlier_ratio(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 11.4])) == 0
    assert outlier_ratio(torch.ones(2, 9)) == 0


@pytest.mark.parametrize("neighbours", [4, 32])
def test_enriched_tokens_equal_the_rule_in_plain_loops(neighbours: int) -> None:
    generator = torch.Generator().manual_seed(neighbours)
    attention, keys = torch.rand(30, generator=generator), torch.randn(30, 6, generator=generator)
    features = torch.randn(30, 5, generator=generator)
    kept = [7, 0, 29, 12]
    method = LlavaPruMerge(neighbours=neighbours)
    got = method.enriched(attention, keys, torch.tensor(kept)) @ features
    torch.testing.assert_close(got, slow_prumerge(attention, keys, features, kept, neighbours))


def test_which_patches_are_kept() -> None:
    attention = torch.rand(576, generator=torch.Generator().manual_seed(0)) * 1e-3
    planted = [5, 100, 333, 570]
    attention[planted] = torch.tensor([0.1, 0.4, 0.2, 0.3])
    plain = LlavaPruMerge(plus=False).centres(attention)
    assert plain.tolist() == [100, 570, 333, 5]
    grid = list(range(0, 575, int(int(1 / (4 / 576)) / 3)))
    plus = LlavaPruMerge().centres(attention)
    assert plus.tolist() == [100, 570, 333, 5, *(place for place in grid if place not in planted)]
    fixed = LlavaPruMerge(keep_ratio=0.25).centres(attention)
    assert len(fixed) == 144
    assert fixed[72:].tolist() == list(range(4, 575, 8))
    assert len(LlavaPruMerge(plus=False, keep_ratio=0.125).centres(attention)) == 72


@pytest.mark.parametrize("plus", [False, True])
def test_flat_attention_and_tiny_crops_keep_something(plus: bool) -> None:
    for size in (1, 2, 5, 36):
        method = LlavaPruMerge(plus=plus)
        attention, keys = torch.full((size,), 0.1), torch.eye(size)
        centres = method.centres(attention)
        assert len(centres) >= 1
        weight = method.enriched(attention, keys, centres)
        assert len(weight) == min(len(centres) + 1, size)


def test_a_patch_that_is_kept_twice() -> None:
    """A fixed grid may repeat a patch: both copies stay, and the summary loses the first of the others."""
    attention = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.05, 0.2])
    weight = LlavaPruMerge(neighbours=1).enriched(attention, torch.eye(6), torch.tensor([2, 0, 2]))
    assert torch.equal(weight[0], weight[2])
    assert weight[0].tolist() == pytest.approx([0, 0, 1.2, 0, 0, 0])  # its nearest is its copy
    assert weight[3].tolist() == pytest.approx([0, 0, 0, 0.15, 0.05, 0.2])


@torch.no_grad()
@pytest.mark.parametrize(
    "parameters", [{}, {"plus": False}, {"plus": False, "keep_ratio": 0.2, "neighbours": 5}], ids=str
)
def test_the_decoder_gets_the_tokens_of_the_release(parameters: dict[str, object]) -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (0, 2))
    run = encode("tiny-llava", data["pixel_values"])
    query, keys = run.projection(-1, "q_proj"), run.projection(-1, "k_proj")
    maps = (query @ keys.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(headless_attention(query[:, 0], keys), maps[:, 0])
    method = LlavaPruMerge(**parameters)
    for sample, got in enumerate(embeddings(loaded, data, method)):
        attention, features = maps[sample, 0, 1:], run.states[-2][sample, 1:]
        kept = method.centres(attention).tolist()
        tokens = slow_prumerge(attention, keys[sample, 1:], features, kept, method.neighbours)
        expected = run.loaded.model.model.multi_modal_projector(tokens)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("keep_ratio", [None, 0.5])
@pytest.mark.parametrize(
    "name",
    [
        "tiny-llava",
        "tiny-llava-next",
        "tiny-llava-onevision",
        "tiny-qwen2.5-vl",
        "tiny-internvl",
        "tiny-smolvlm",
    ],
)
def test_a_padded_batch_equals_single_samples(
    name: str, keep_ratio: float | None, dtype: torch.dtype
) -> None:
    loaded = load(name, dtype)
    method = zoo.method("llava-prumerge", keep_ratio=keep_ratio)

    def generate(*samples: int) -> list[list[int]]:
        data = cast(inputs(loaded, samples), dtype)
        with method.apply(loaded) as applied:
            ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
            assert all(len(set(kept.tolist())) == len(kept) for kept in applied.kept[-1])
        return ids[:, data["input_ids"].shape[1] :].tolist()

    together = generate(0, 1, 2)
    if dtype == torch.float32:
        assert together == [generate(sample)[0] for sample in range(3)]


def test_everything_kept_costs_nothing() -> None:
    assert LlavaPruMerge(keep_ratio=1).stages(load("tiny-llava").anatomy) == []


def test_two_pictures_in_one_prompt() -> None:
    check_two_pictures("llava-prumerge", neighbours=5)
