"""Several visual-token methods on one model: each prunes what those before it have left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import NEW, cast, load, picture, visual_places

import zoo
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.errors import BadInput, Refused
from zoo.families.visual_tokens import VisualTokenReducer, keep
from zoo.interface import AppliedStack, Method, Stack
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy


class Deep(VisualTokenReducer):
    """A test method: keeps the first tokens in front of a layer, after a look at another layer."""

    slug = "deep"
    layer: int = 3
    looks_at: tuple[int, ...] = ()

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        return [Stage(self.layer, lambda view: keep(torch.arange(4)), observes=self.looks_at)]


def inputs(loaded: LoadedModel) -> dict[str, Any]:
    return dict(
        loaded.processor(
            text=["<image>\nWhat is it?", "Now <image>, and what is this?"],
            images=[picture(0), picture(1, 60, 90)],
            return_tensors="pt",
            padding=True,
        )
    )


def generate(applied: Any, data: dict[str, Any]) -> list[list[int]]:
    ids = applied.generate(**data, max_new_tokens=NEW, do_sample=False)
    return ids[:, data["input_ids"].shape[1] :].tolist()


def made(spec: str, **parameters: Any) -> Method:
    method = zoo.method(spec, **parameters)
    assert isinstance(method, Method)
    return method


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-onevision", "tiny-qwen3-vl"])
def test_a_stack_equals_one_reducer_with_both_stages(name: str) -> None:
    loaded = load(name)
    data = inputs(loaded)
    first, second = made("divprune", keep_ratio=0.5), made("fastv", keep_ratio=0.4, layer=2)
    stack = zoo.method(
        "divprune+fastv", **{"divprune.keep_ratio": 0.5, "fastv.keep_ratio": 0.4, "fastv.layer": 2}
    )
    with stack.apply(loaded) as applied:
        assert isinstance(applied, AppliedStack)
        tokens = generate(applied, data)
        whole, reports = applied.report, applied.reports
    stages = [
        Stage(-1, first.select, positions="renumber"),
        Stage(2, second.select, observes=(1,), positions="keep"),
    ]
    reducer = TokenReducer(loaded.anatomy, stages, "keep", "test")
    ids = loaded.model.generate(**data, max_new_tokens=NEW, do_sample=False)
    reducer.close()
    assert tokens == ids[:, data["input_ids"].shape[1] :].tolist()
    assert whole.method == "divprune+fastv"
    assert [report.method for report in reports] == ["divprune", "fastv"]
    gone = [[bar.total - bar.kept for bar in report.bars["visual tokens"]] for report in reports]
    assert [bar.total - bar.kept for bar in whole.bars["visual tokens"]] == pytest.approx(
        [a + b for a, b in zip(*gone, strict=True)]
    )
    assert gone[1][:2] == [0, 0]
    assert gone[0][0] == gone[0][3] > 0
    assert whole.parameters["fastv"] == {"keep_ratio": 0.4, "keep_tokens": None, "layer": 2}


def test_each_method_keeps_its_own_position_policy() -> None:
    """DivPrune renumbers before the LLM; FastV inside leaves gaps in the numbers it finds."""
    loaded = load("tiny-llava")
    data = inputs(loaded)
    single = {"input_ids": data["input_ids"][1:], "pixel_values": data["pixel_values"][1:]}
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    seen: dict[int, list[torch.Tensor]] = {0: [], 3: []}
    with Stack([made("divprune", keep_ratio=0.5), made("fastv", keep_ratio=0.5, layer=2)]).apply(
        loaded
    ) as applied:
        hooks = [
            decoder.layers[number].module.register_forward_pre_hook(
                lambda _, args, kwargs, found=found: found.append(kwargs["position_ids"][0]), with_kwargs=True
            )
            for number, found in seen.items()
        ]
        generate(applied, single)
        for hook in hooks:
            hook.remove()
        kept = applied.layers[0].kept
    length = len(single["input_ids"][0])
    visual = visual_places(loaded, single["input_ids"][0]).tolist()
    after_first = [place for place in range(length) if place not in visual or place in kept[-1][0].tolist()]
    assert seen[0][0].tolist() == list(range(len(after_first)))
    assert seen[3][0].tolist() == [
        number
        for number, place in enumerate(after_first)
        if place not in visual or place in kept[2][0].tolist()
    ]
    assert seen[0][1].tolist() == seen[3][1].tolist() == [len(after_first)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "policies", [("keep", "renumber"), ("renumber", "keep"), ("renumber", "renumber")], ids="+".join
)
def test_mixed_policies_in_a_padded_batch(policies: tuple[Any, Any], dtype: torch.dtype) -> None:
    loaded = load("tiny-llava-next", dtype)
    data = cast(inputs(loaded), dtype)

    def some(view: View) -> Any:
        return keep(view.tokens.float().sum(-1).topk(3 + len(view.text) % 3).indices)

    def run(given: dict[str, Any]) -> list[list[int]]:
        stages = [
            Stage(1, some, positions=policies[0]),
            Stage(3, lambda view: keep(torch.arange(2)), positions=policies[1]),
        ]
        reducer = TokenReducer(loaded.anatomy, stages, "keep", "test")
        try:
            ids = loaded.model.generate(**given, max_new_tokens=NEW, do_sample=False)
            return ids[:, given["input_ids"].shape[1] :].tolist()
        finally:
            reducer.close()

    together = run(data)
    for sample in range(2):
        real = data["attention_mask"][sample].bool()
        alone = {
            "input_ids": data["input_ids"][sample : sample + 1, real],
            "pixel_values": data["pixel_values"][sample : sample + 1],
            "image_sizes": data["image_sizes"][sample : sample + 1],
        }
        if dtype == torch.float32:  # half precision may break ties of two logits differently under a mask
            assert together[sample] == run(alone)[0]
        assert len(together[sample]) == NEW


def test_clashes_are_refused_with_the_reason() -> None:
    loaded = load("tiny-llava")
    with pytest.raises(Refused, match="fastv and deep both prune before layer 2: move one of them"):
        Stack([made("fastv", layer=2), Deep(layer=2)]).check(loaded)
    with pytest.raises(Refused, match="divprune and deep both prune before the LLM"):
        Stack([made("divprune"), Deep(layer=0)]).apply(loaded)
    with pytest.raises(Refused, match="deep prunes before layer 3 by what it saw before layer 2"):
        Stack([made("fastv", layer=2), Deep(layer=3, looks_at=(1,))]).check(loaded)
    with pytest.raises(BadInput, match="flap and cfsp both act on weights"):
        zoo.method("flap+cfsp")


def test_order_of_the_slugs_does_not_matter() -> None:
    loaded = load("tiny-llava")
    data = inputs(loaded)
    one, other = made("divprune", keep_ratio=0.5), made("fastv", layer=2)
    with Stack([one, other]).apply(loaded) as applied:
        expected = generate(applied, data)
    with Stack([other, one]).apply(loaded) as applied:
        assert generate(applied, data) == expected


def test_two_stages_of_one_method_at_one_place_are_refused() -> None:
    loaded = load("tiny-llava")
    stages = [Stage(layer, lambda view: keep(torch.arange(4))) for layer in (-1, 0)]
    with pytest.raises(Refused, match="test has two stages before the LLM: make them one"):
        TokenReducer(loaded.anatomy, stages, "keep", "test")
