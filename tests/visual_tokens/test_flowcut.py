"""FlowCut: the rule against a slow reference, the shorter encoder, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from encoder_reference import encode, inputs, kept_by
from reference import NEW, cast, load, picture

import zoo
from zoo.engines.selection import highest_of_each
from zoo.errors import BadInput, Refused
from zoo.methods.visual_tokens.flowcut import FlowCut, cut_size
from zoo.models import LoadedModel, tiny


def deep() -> LoadedModel:
    """A tiny LLaVA whose encoder has eight blocks, enough for three cuts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fields = {**tiny._ENCODER, "num_hidden_layers": 8}
        model, processor = tiny._build_llava(fields, dict(tiny._DECODER))
    return LoadedModel(model.eval(), processor, "tiny-llava")


def slow_flowcut(loaded: Any, pixels: torch.Tensor, target: int) -> list[int]:
    """The encoder of one picture by hand, with eager maps; numbers of the surviving patches."""
    tower = loaded.model.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    blocks = loaded.anatomy.encoder.blocks
    last, heads = len(blocks) - 2, loaded.anatomy.encoder.heads
    patches, history = list(range(x.shape[1] - 1)), None
    for number, block in enumerate(blocks[:last]):
        attention = block.module.self_attn
        normed = block.module.layer_norm1(x)[0]
        q, k, v = (
            part(normed).unflatten(-1, (heads, -1)).transpose(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        maps = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        alike = (v @ v.transpose(1, 2)).softmax(-1)[:, 0, 1:].mean(0)
        paid = maps[:, 0, 1:].mean(0)
        x = block.module(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
        size, remaining = len(patches), last - number - 1
        if size <= target:
            continue
        score = (paid / paid.sum() + alike / alike.sum()) * v.mean(0)[1:].abs().sum(-1)
        history = score if history is None else (history + score) / 2
        if remaining % 2:
            continue
        share = (paid / paid.sum()).tolist()
        entropy = -sum(p * math.log(p) for p in share) / math.log(size)
        cut = size if not remaining else round((size - target) / math.sqrt(remaining) * (1 - entropy**2))
        stay = history.topk(max(size - cut, target)).indices.sort().values
        patches = [patches[place] for place in stay.tolist()]
        history = history[stay]
        x = torch.cat((x[:, :1], x[:, 1:][:, stay]), dim=1)
    return patches


@torch.no_grad()
def test_survivors_equal_the_encoder_run_by_hand_alone_and_in_a_batch() -> None:
    loaded = deep()
    data = inputs(loaded, (0, 1, 2))
    expected = [slow_flowcut(loaded, pixels[None], 9) for pixels in data["pixel_values"]]
    method = FlowCut(keep_tokens=9)
    assert kept_by(loaded, data, method) == expected
    assert len({tuple(rows) for rows in expected}) == 3
    for sample in range(3):
        alone = {name: value[sample : sample + 1] for name, value in data.items()}
        assert kept_by(loaded, alone, method) == [expected[sample]]


@torch.no_grad()
def test_the_encoder_runs_short_and_the_report_says_so() -> None:
    loaded = deep()
    lengths: list[int] = []
    assert loaded.anatomy.encoder is not None
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        for block in loaded.anatomy.encoder.blocks
    ]
    with FlowCut(keep_tokens=9).apply(loaded) as applied:
        applied(**inputs(loaded))
        report = applied.report
    for hook in hooks:
        hook.remove()
    assert [bar.kept for bar in report.bars["encoder tokens per crop"]] == lengths
    assert lengths[:2] == [37, 37]
    assert lengths == [*sorted(lengths[:-1], reverse=True), 37]  # nobody reads what the last block makes
    assert lengths[6] == 10
    assert report.kept == 9


def test_one_cut_for_all_is_the_largest() -> None:
    attention = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) ** torch.tensor(
        [[1.0], [4], [9]]
    )
    cuts = cut_size(attention, torch.full((3,), 20), 5, 4)
    assert cuts[0] < cuts[1] < cuts[2] < 15
    assert cut_size(attention, torch.full((3,), 20), 5, 0).tolist() == [15.0] * 3


def test_highest_of_each() -> None:
    score = torch.tensor([[3.0, 1, 2, 0], [0, 5, -float("inf"), 4]])
    index, valid = highest_of_each(score, torch.tensor([3, 2]))
    assert index[0].tolist() == [0, 1, 2]
    assert index[1, :2].tolist() == [1, 3]
    assert valid is not None
    assert valid.tolist() == [[True] * 3, [True, True, False]]
    index, valid = highest_of_each(score, torch.tensor([2, 2]))
    assert (index.tolist(), valid) == ([[0, 2], [1, 3]], None)


@torch.no_grad()
def test_what_looks_alike_to_cls_stays() -> None:
    loaded = deep()
    data = inputs(loaded)
    (kept,) = kept_by(loaded, data, FlowCut(keep_tokens=9))
    assert kept == sorted(set(kept))
    loaded = load("tiny-llava")  # four blocks: one cut, behind block 1, by the scores of two
    scores = []
    run = encode("tiny-llava", data["pixel_values"])
    for layer in (-4, -3):
        values = run.projection(layer, "v_proj")[0].unflatten(-1, (run.maps[0].shape[1], -1)).transpose(0, 1)
        paid = run.maps[layer][0, :, 0, 1:].mean(0)
        alike = (values @ values.transpose(1, 2)).softmax(-1)[:, 0, 1:].mean(0)
        scores.append((paid / paid.sum() + alike / alike.sum()) * values.mean(0)[1:].abs().sum(-1))
    score = (scores[0] + scores[1]) / 2
    (kept,) = kept_by(loaded, data, FlowCut(keep_tokens=9))
    assert kept == sorted(score.topk(9).indices.tolist())
    assert score[kept].sum() > score.topk(9, largest=False).values.sum()


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next"])
def test_a_padded_batch_equals_single_samples(name: str, dtype: torch.dtype, layer: int | None) -> None:
    loaded = load(name, dtype)
    method = FlowCut(keep_ratio=0.3, llm_layer=layer)

    def generate(*samples: int) -> list[list[int]]:
        data = cast(inputs(loaded, samples), dtype)
        with method.apply(loaded) as applied:
            ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
            assert all(rows.tolist() == sorted(set(rows.tolist())) for rows in applied.kept[-1])
        return ids[:, data["input_ids"].shape[1] :].tolist()

    together = generate(0, 1, 2)
    if dtype == torch.float32:
        assert together == [generate(sample)[0] for sample in range(3)]


@torch.no_grad()
def test_tiles_are_cut_a_second_time_by_the_question() -> None:
    """Four tiles and a thumbnail: half of the budget stays in each, then the budget of the whole picture."""
    loaded = load("tiny-llava-next")
    data = dict(loaded.processor(text="<image>?", images=picture(0, 96, 96), return_tensors="pt"))
    total = int((data["input_ids"] == loaded.model.config.image_token_id).sum())
    loaded.model.set_attn_implementation("eager")
    with FlowCut(keep_tokens=20, llm_layer=1).apply(loaded) as applied:
        values: list[torch.Tensor] = []
        attention = loaded.anatomy.decoder.layers[1].attention.module
        hook = attention.v_proj.register_forward_hook(lambda *given: values.append(given[2][0]))
        output = applied.model(**data, output_attentions=True)
        hook.remove()
        first, second = applied.kept[-1][0], applied.kept[2][0]
        lengths = [layer.get_seq_length() for layer in output_cache(applied, data)]
    assert len(first) == 50
    assert len(second) == 20
    text = data["input_ids"].shape[1] - total
    assert lengths == [text + 50, text + 50, text + 20, text + 20]
    start = int((data["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[0])
    visual = slice(start, start + 50)
    row = output.attentions[1][0, :, -1, visual]
    paid = (row / row.sum(-1, keepdim=True)).mean(0)
    heads = values[0].unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
    alike = (heads[:, -1:] @ heads[:, visual].transpose(1, 2) * attention.scaling).softmax(-1)[:, 0].mean(0)
    score = (paid / paid.sum() + alike / alike.sum()) * heads[:, visual].mean(0).abs().sum(-1)
    assert second.tolist() == first[score.topk(20).indices.sort().values].tolist()


def output_cache(applied: zoo.Applied, data: dict[str, Any]) -> Any:
    return applied.model(**data, use_cache=True).past_key_values.layers


@pytest.mark.parametrize("name", ["tiny-llava-onevision", "tiny-qwen2.5-vl", "tiny-internvl", "tiny-smolvlm"])
def test_other_encoders_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(Refused, match="flowcut needs") as caught:
        FlowCut().apply(load(name))
    assert "\n" not in str(caught.value)


def test_a_stack_prunes_further_inside_the_llm() -> None:
    loaded = load("tiny-llava")
    settings = {"flowcut.keep_ratio": 0.5, "fastv.keep_ratio": 0.5, "layer": 2}
    singles = []
    with zoo.method("flowcut+fastv", **settings).apply(loaded) as applied:
        data = inputs(loaded, (0, 1, 2))
        together = applied.generate(**data, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
        lengths = [len(rows) for kept in applied.layers[0].kept.values() for rows in kept]
        first, second = applied.reports
        for sample in range(3):
            alone = inputs(loaded, (sample,))
            singles.append(applied.generate(**alone, max_new_tokens=NEW, do_sample=False)[0, -NEW:])
    assert lengths == [18] * 3 + [9] * 3
    assert together.tolist() == [tokens.tolist() for tokens in singles]
    assert [bar.kept for bar in first.bars["encoder tokens per crop"]][-2:] == [19, 37]
    assert "encoder tokens per crop" not in second.bars


def test_the_projector_runs_on_what_is_left() -> None:
    loaded = load("tiny-llava-next")
    data = inputs(loaded, (0, 1))
    rows: list[int] = []
    first = next(part for part in loaded.anatomy.projector.modules() if isinstance(part, torch.nn.Linear))
    hook = first.register_forward_hook(lambda _, args, output: rows.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        with FlowCut(keep_ratio=0.25).apply(loaded) as applied:
            applied(**data)
        loaded.model(**data)
    hook.remove()
    assert rows == [9 * (rows[1] // 36), rows[1]]


def test_what_another_method_may_not_touch_is_said_in_one_line() -> None:
    loaded = load("tiny-llava")
    with pytest.raises(Refused, match="flowcut and mustdrop both prune before the LLM"):
        zoo.method("flowcut+mustdrop").apply(loaded)
    with pytest.raises(Refused, match="flowcut and divprune both prune before the LLM"):
        zoo.method("flowcut+divprune").apply(loaded)


@torch.no_grad()
def test_nothing_is_left_behind() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded)
    before = loaded.model(**data).logits
    with FlowCut(keep_ratio=1).apply(loaded) as applied:
        assert torch.equal(applied.model(**data).logits, before)
    with FlowCut().apply(loaded) as applied:
        assert not torch.equal(applied.model(**data).logits[:, -1], before[:, -1])
        with pytest.raises(BadInput):
            FlowCut(keep_tokens=99).apply(load("tiny-llava")).model(**data)
    assert torch.equal(loaded.model(**data).logits, before)
    assert all("forward" not in vars(module) for module in loaded.model.modules())
