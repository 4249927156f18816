"""VisionZip: the rule against a slow reference, and the tokens that the decoder gets."""

from __future__ import annotations

import pytest
import torch
from encoder_reference import Run, check_two_pictures, embeddings, encode, inputs, kept_by
from reference import NEW, cast, load, picture

import zoo
from zoo.methods.visual_tokens.visionzip import compress


def slow_visionzip(
    scores: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor, dominant: int, contextual: int
) -> torch.Tensor:
    """Output before the projector, token by token. All inputs begin with [CLS], which counts as dominant."""
    size = len(hidden)
    ranked = sorted(range(1, size), key=lambda i: -float(scores[i]))[: dominant - 1]
    kept = [0, *sorted(ranked)]
    rest = [i for i in range(size) if i not in kept]
    step = max(1, len(rest) // contextual)
    targets = [rest[place] for place in range(0, len(rest), step)][:contextual]
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    joined: dict[int, list[torch.Tensor]] = {target: [] for target in targets}
    for token in rest:
        if token not in targets:
            joined[max(targets, key=lambda target: float(unit[token] @ unit[target]))].append(hidden[token])
    merged = [
        hidden[target] + sum(members) / max(1, len(members)) if members else hidden[target]
        for target, members in joined.items()
    ]
    return torch.stack([*(hidden[i] for i in kept), *merged])


def reference(run: Run, sample: int, dominant: int, contextual: int) -> torch.Tensor:
    keys = run.projection(-2, "k_proj")[sample].unflatten(-1, (run.maps[0].shape[1], -1)).mean(1)
    scores = run.maps[-2][sample, :, 0].sum(0)
    tokens = slow_visionzip(scores, keys, run.states[-2][sample], dominant, contextual)
    projected: torch.Tensor = run.loaded.model.model.multi_modal_projector(tokens)
    return projected


@pytest.mark.parametrize(
    ("size", "dominant", "contextual"), [(36, 9, 4), (37, 1, 7), (20, 0, 1), (12, 8, 4), (12, 6, 0)]
)
def test_weights_equal_the_rule_in_plain_loops(size: int, dominant: int, contextual: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores, keys = torch.rand(size, generator=generator), torch.randn(size, 6, generator=generator)
    hidden = torch.randn(size, 5, generator=generator)
    best, targets, weight = compress(scores, keys, dominant, contextual)
    assert best.tolist() == scores.argsort(descending=True)[:dominant].tolist()
    assert len(targets) == contextual
    if contextual:
        cls = torch.zeros(1, 1)
        expected = slow_visionzip(
            torch.cat((cls[0], scores)),
            torch.cat((torch.ones(1, 6), keys)),
            torch.cat((torch.zeros(1, 5), hidden)),
            dominant + 1,
            contextual,
        )
        torch.testing.assert_close(weight @ hidden, expected[dominant + 1 :])
    assert not weight[:, best].any()


@torch.no_grad()
def test_the_decoder_gets_the_tokens_of_the_paper() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded, (0, 1, 2))
    run = encode("tiny-llava", data["pixel_values"])
    method = zoo.method("visionzip", keep_tokens=12, contextual_ratio=0.25)
    for sample, got in enumerate(embeddings(loaded, data, method)):
        torch.testing.assert_close(got, reference(run, sample, 9, 3), rtol=1e-4, atol=1e-5)
    kept = kept_by(loaded, data, method)
    assert [len(set(rows)) for rows in kept] == [12] * 3
    scores = run.maps[-2][:, :, 0, 1:].mean(1)
    for rows, own in zip(kept, scores, strict=True):
        assert rows[1:9] == sorted(own.topk(8).indices.tolist())
        assert own[rows[1:9]].sum() > own.topk(8, largest=False).values.sum()


@torch.no_grad()
def test_tiles_come_as_in_the_release() -> None:
    """Thumbnail first; then the dominant tokens of all tiles in the order of the grid, [CLS] of each, merged ones."""
    loaded = load("tiny-llava-next")
    data = dict(loaded.processor(text="<image>?", images=picture(0, 96, 96), return_tensors="pt"))
    run = encode("tiny-llava-next", data["pixel_values"][0])
    crops = [reference(run, crop, 6, 2) for crop in range(5)]
    dominant = {}
    for tile in range(4):
        best = run.maps[-2][tile + 1, :, 0, 1:].mean(0).topk(5).indices.sort().values
        for rank, patch in enumerate(best.tolist()):
            row, column = divmod(patch, 6)
            place = (row + 6 * (tile // 2), column + 6 * (tile % 2))
            dominant[place] = crops[tile + 1][1 + rank]
    expected = torch.stack(
        [
            *crops[0],
            *(dominant[place] for place in sorted(dominant)),
            *(crop[0] for crop in crops[1:]),
            *(token for crop in crops[1:] for token in crop[6:]),
        ]
    )
    method = zoo.method("visionzip", keep_tokens=40, contextual_ratio=0.25)
    (got,) = embeddings(loaded, data, method)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
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
def test_a_padded_batch_equals_single_samples(name: str, dtype: torch.dtype) -> None:
    loaded = load(name, dtype)
    method = zoo.method("visionzip", keep_ratio=0.4)

    def generate(*samples: int) -> list[list[int]]:
        data = cast(inputs(loaded, samples), dtype)
        with method.apply(loaded) as applied:
            ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
            for sample, kept in enumerate(applied.kept[-1]):
                total = int((data["input_ids"][sample] == loaded.model.config.image_token_id).sum())
                assert len(set(kept.tolist())) == len(kept) == round(0.4 * total)
        return ids[:, data["input_ids"].shape[1] :].tolist()

    together = generate(0, 1, 2)
    if dtype == torch.float32:
        assert together == [generate(sample)[0] for sample in range(3)]


def test_two_pictures_in_one_prompt() -> None:
    check_two_pictures("visionzip", keep_ratio=0.5)
