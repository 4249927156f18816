"""``zoo train`` of weight methods: CFSP's importance-guided adapters, healing on self-generated responses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import DIALOGUES, TEXTS
from torch import nn

import zoo
from zoo.dialogues import Dialogue
from zoo.engines.training import Step, TrainingInterrupted
from zoo.errors import BadInput, BadParameter, Refused
from zoo.methods.weights.cfsp import Cfsp
from zoo.methods.weights.layer_pruning_sgr import LayerPruningSgr, closest_stretch
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model
from zoo.training import Setting, split, trainable

pytest.importorskip("peft")
CALIBRATION = TEXTS * 30
QUICK: dict[str, Any] = {
    "recipe": {
        "steps": 6,
        "learning_rate": 0.01,
        "batch": 4,
        "accumulate": 1,
        "checkpoint_every": 2,
        "warmup": 0,
    },
    "length": 48,
    "calibration": CALIBRATION,
}
DATA = [Dialogue("", text) for text in TEXTS]


def load(seed: int = 0) -> LoadedModel:
    model, processor = tiny_model("tiny-llama", seed=seed)
    return LoadedModel(model, processor, "tiny-llama")


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loaded.model.state_dict().items()}


def setting(folder: Path) -> Setting:
    return Setting(folder, 0, 48, CALIBRATION, 16, lambda *_: None)


def cfsp(loaded: LoadedModel, output: Path, **more: Any) -> zoo.training.Trained:
    return zoo.train("cfsp", loaded, DATA, output=output, parameters={"sparsity": 0.15}, **{**QUICK, **more})


def test_cfsp_prunes_recovers_and_saves(tmp_path: Path) -> None:
    dense = load()
    before = weights(dense)
    trained = cfsp(dense, tmp_path / "out", recipe={**QUICK["recipe"], "steps": 30})
    assert all(torch.equal(value, before[name]) for name, value in dense.model.state_dict().items())
    record = trained.record
    assert record.after["held-out perplexity"] < 0.7 * record.before["held-out perplexity"]
    assert record.last_loss < record.first_loss
    assert (record.steps, record.examples, record.heldout) == (30, 22, 2)
    assert trained.outcome.report.removed_ratio == pytest.approx(0.15, abs=0.01)
    again = zoo.load_model(tmp_path / "out" / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, trained.outcome.model(ids).logits)
    assert not any(isinstance(module, nn.Dropout) for module in again.model.modules())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model",
        "record.json",
        "settings.json",
        "training.jsonl",
    }
    assert json.loads((tmp_path / "out" / "record.json").read_text())["after"] == record.after


def test_ranks_follow_the_coarse_importance(tmp_path: Path) -> None:
    """Layers that do not move their tokens get the smallest adapters; the mean stays near the one asked for."""
    dense = load()
    layers = dense.model.model.layers
    with torch.no_grad():
        for place in (1, 3):
            layers[place].mlp.down_proj.weight.zero_()
            layers[place].self_attn.o_proj.weight.zero_()
    method = Cfsp(sparsity=0.15, recovery_rank=8, slope=0.5)
    ranks = method.adapter_ranks(dense, dense, setting(tmp_path))
    assert ranks[1] == ranks[3] < ranks[2] < ranks[0]
    assert sum(ranks) / 4 == pytest.approx(8, abs=0.5)
    assert Cfsp(sparsity=0.15, coarse="none").adapter_ranks(dense, dense, setting(tmp_path)) == [8] * 4


def test_an_interrupted_recovery_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = cfsp(load(), tmp_path / "whole")

    def stop(step: Step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted) as caught:
        cfsp(load(), tmp_path / "parted", on_step=stop)
    assert caught.value.step == 3
    with pytest.raises(BadInput, match="unfinished training: add --resume"):
        cfsp(load(), tmp_path / "parted")
    with pytest.raises(BadInput, match="has length = 48, not 32"):
        cfsp(load(), tmp_path / "parted", resume=True, length=32)
    parted = cfsp(load(), tmp_path / "parted", resume=True)
    for name, value in whole.outcome.model.state_dict().items():
        assert torch.equal(parted.outcome.model.state_dict()[name], value)
    assert parted.record.before == whole.record.before
    assert parted.record.last_loss == whole.record.last_loss
    with pytest.raises(BadInput, match="is finished"):
        cfsp(load(), tmp_path / "parted", resume=True)


def test_a_folder_that_the_method_pruned_is_only_recovered(tmp_path: Path) -> None:
    pruned = zoo.method("cfsp", ffn_sparsity=0.3).apply(load(), calibration=CALIBRATION)
    saved = zoo.load_model(pruned.save(tmp_path / "pruned"))
    trained = zoo.train("cfsp", saved, DATA, output=tmp_path / "out", **QUICK)
    assert trained.outcome.report.kept == pruned.report.kept
    assert trained.outcome.model.num_parameters() == pruned.model.num_parameters()
    record = json.loads((tmp_path / "out" / "model" / "zoo_pruning.json").read_text())
    assert record["parameters"]["ffn_sparsity"] == 0.3
    assert "ranks of recovery adapters" in record["report"]["facts"]
    with pytest.raises(Refused, match="was pruned by cfsp"):
        zoo.train("layer-pruning-sgr", saved, DATA, output=tmp_path / "other", **QUICK)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_healing_on_the_models_own_responses(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = load()
    dense.model.to(dtype)
    before = weights(dense)
    parameters = {"layers": 1, "response_tokens": 12}
    trained = zoo.train(
        "layer-pruning-sgr", dense, DIALOGUES, output=tmp_path / "out", parameters=parameters, **QUICK
    )
    assert all(torch.equal(value, before[name]) for name, value in dense.model.state_dict().items())
    assert trained.outcome.model.config.num_hidden_layers == 3
    assert zoo.load_model(tmp_path / "out" / "model", dtype="float32").model.config.num_hidden_layers == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").open()]
    assert len(rows) == len(DIALOGUES)
    assert all(row["prompt"].startswith("<s>Count from") for row in rows)
    assert all(len(row["ids"]) - row["start"] <= 12 for row in rows)
    assert not any(
        row["response"] == dialogue.response for row, dialogue in zip(rows, DIALOGUES, strict=True)
    )


def test_responses_are_made_once_and_depend_on_the_seed_only(tmp_path: Path) -> None:
    dense = load()
    method = LayerPruningSgr(layers=1, response_tokens=6)
    for name in "abc":
        (tmp_path / name).mkdir()
    first = method.lessons(dense, DIALOGUES, setting(tmp_path / "a"))
    torch.manual_seed(1)
    assert method.lessons(dense, DIALOGUES, setting(tmp_path / "b")) == first
    other = Setting(tmp_path / "c", 1, 48, None, 16, lambda *_: None)
    assert method.lessons(dense, DIALOGUES, other) != first
    lines = (tmp_path / "a" / "responses.jsonl").read_text().splitlines(keepends=True)
    # Cut off in the middle of the second batch: its answers are drawn again, those of the first one are read.
    (tmp_path / "b" / "responses.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    calls = []
    hook = dense.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert method.lessons(dense, DIALOGUES, setting(tmp_path / "b")) == first
    assert 0 < len(calls) <= 6
    calls.clear()
    assert method.lessons(dense, DIALOGUES, setting(tmp_path / "b")) == first
    assert not calls
    hook.remove()
    long = [*DIALOGUES[:3], Dialogue("a long prompt " * 9, "")]
    assert [len(lesson) for lesson in method.lessons(dense, long, setting(tmp_path))] == [1, 1, 1, 0]
    shutil.copy(tmp_path / "a" / "responses.jsonl", tmp_path / "c" / "responses.jsonl")
    with pytest.raises(BadInput, match="answers to other prompts"):
        method.lessons(dense, DIALOGUES[::-1], setting(tmp_path / "c"))


@pytest.mark.parametrize(
    ("parameters", "removed"),
    [
        ({"rule": "reverse", "layers": 2}, [3, 4]),
        ({"rule": "reverse", "layers": 2, "keep_last": False}, [4, 5]),
        ({"rule": "contiguous", "layers": 2}, [2, 3]),
        ({"rule": "block-influence", "layers": 2}, [2, 3]),
        ({"rule": "iterative", "layers": 2}, [2, 3]),
    ],
)
def test_rules_find_planted_layers(parameters: dict[str, Any], removed: list[int]) -> None:
    """Layers 0, 2 and 3 do nothing at all. Every rule that looks finds the last two; the first layer stays."""
    model, processor = tiny_model("tiny-llama", num_hidden_layers=6)
    with torch.no_grad():
        for index in (0, 2, 3):
            model.model.layers[index].mlp.down_proj.weight.zero_()
            model.model.layers[index].self_attn.o_proj.weight.zero_()
    loaded = LoadedModel(model, processor)
    ids = torch.randint(4, 250, (6, 24), generator=torch.Generator().manual_seed(2))
    if parameters["rule"] == "iterative":
        with (
            torch.no_grad()
        ):  # calibration text that the model predicts, so that losing a layer costs accuracy
            for _ in range(23):
                ids = torch.cat(
                    (ids[:, :1] if _ == 0 else ids, model(ids[:, : _ + 1]).logits[:, -1:].argmax(-1)), 1
                )
    applied = LayerPruningSgr(**parameters).apply(loaded, calibration=ids)
    assert applied.report.facts["removed"] == ", ".join(f"layer {index}" for index in removed)
    assert applied.model.config.num_hidden_layers == 4


def test_the_closest_stretch_by_hand() -> None:
    """Angles of 0, 10, 30, 35, 80 degrees: the pair that turns least starts at layer 2 (30 - 10 + 5 = 25 degrees)."""
    angles = torch.tensor([0.0, 0.0, 10.0, 30.0, 35.0, 80.0]).deg2rad()
    states = torch.stack((angles.cos(), angles.sin()), -1)[:, None]
    assert closest_stretch(states, 1) == 3
    assert closest_stretch(states, 2) == 2
    assert closest_stretch(states, 3) == 1
    assert LayerPruningSgr(sparsity=0.1).apply(load(), calibration=CALIBRATION).report.removed_ratio == 0
    with pytest.raises(BadParameter):
        LayerPruningSgr(layers=4).apply(load(), calibration=torch.ones(2, 8, dtype=torch.long))


def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path: Path) -> None:
    assert {"cfsp", "layer-pruning-sgr"} <= set(trainable())
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (
            BadInput,
            "prompt-lookup has nothing to train; zoo train works with .*cfsp",
            {"spec": "prompt-lookup"},
        ),
        (BadParameter, "a recipe has no field 'speed'", {"recipe": {"speed": 3}}),
        (BadParameter, "recipe: learning_rate", {"recipe": {"learning_rate": -1}}),
        (BadInput, "two examples or more", {"data": DATA[:1]}),
        (Refused, "cfsp needs a decoder LLM", {"model": LoadedModel(*tiny_model("tiny-vit"))}),
        (Refused, "cfsp needs a decoder LLM", {"model": LoadedModel(*tiny_model("tiny-llava"))}),
    ]
    for kind, message, change in cases:
        given: dict[str, Any] = {
            "spec": "cfsp",
            "model": load(),
            "data": DATA,
            "output": tmp_path / "out",
            **change,
        }
        with pytest.raises(kind, match=message) as caught:
            zoo.train(given.pop("spec"), given.pop("model"), given.pop("data"), **given)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(BadInput, match="is not empty"):
        cfsp(load(), tmp_path / "full")


def test_the_held_out_part_is_a_tenth_and_disjoint() -> None:
    learnt, held = split(list(range(100)), seed=3)
    assert len(held) == 10
    assert sorted([*learnt, *held]) == list(range(100))
    assert list(split(list(range(100)), seed=4)[1]) != list(held)
    assert list(held[:2]) == [held[0], held[1]]
