"""``zoo train`` where all weights learn: Minitron's distillation, group sparsity, and LLM-Pruner's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from texts import TEXTS
from torch.nn import functional

import zoo
from zoo.dialogues import Dialogue
from zoo.engines.language_modelling import TokenExample, collate
from zoo.errors import Refused
from zoo.methods.weights.minitron import Minitron
from zoo.methods.weights.torch_pruning_groupnorm import GroupNorm
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

DATA = [Dialogue("", text) for text in TEXTS]


def load() -> LoadedModel:
    model, processor = tiny_model("tiny-llama")
    return LoadedModel(model, processor, "tiny-llama")


def train(slug: str, loaded: LoadedModel, output: Path, parameters: dict[str, Any], steps: int = 12) -> Any:
    recipe = {"steps": steps, "learning_rate": 3e-3, "batch": 4, "accumulate": 1, "warmup": 0}
    return zoo.train(
        slug,
        loaded,
        DATA,
        output=output,
        parameters=parameters,
        recipe=recipe,
        length=48,
        calibration=TEXTS * 30,
        calibration_windows=8,
    )


def logits(model: Any, loaded: LoadedModel) -> torch.Tensor:
    ids = loaded.tokenizer(TEXTS[3], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


def test_minitron_learns_from_the_dense_model(tmp_path: Path) -> None:
    dense = load()
    before = {name: value.clone() for name, value in dense.model.state_dict().items()}
    shape = {"hidden": 48, "channels": 96}
    plain = Minitron(**shape).apply(dense, calibration=TEXTS * 30, samples=8)
    trained = train("minitron", dense, tmp_path / "out", shape)
    assert trained.record.last_loss < trained.record.first_loss
    again = zoo.load_model(tmp_path / "out" / "model", device="cpu")
    target = logits(dense.model, dense).log_softmax(-1)
    gaps = [
        float(
            functional.kl_div(
                logits(model, dense).log_softmax(-1), target, reduction="batchmean", log_target=True
            )
        )
        for model in (plain.model, again.model)
    ]
    assert gaps[1] < gaps[0]
    assert again.model.config.hidden_size == 48
    for name, value in dense.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_minitrons_loss_is_the_divergence_from_the_dense_model_alone() -> None:
    dense, other = load(), LoadedModel(tiny_model("tiny-llama", seed=1)[0])
    batch = collate([TokenExample((5, 6, 7, 8), 1), TokenExample((9, 10), 1)], 0, "cpu")
    loss = Minitron().batch_loss(dense, other, batch)
    assert loss.terms == 4
    with torch.no_grad():
        p, q = (
            m.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, :3].log_softmax(-1)
            for m in (dense, other)
        )
        r, s = (
            m.model(input_ids=torch.tensor([[9, 10]])).logits[0, :1].log_softmax(-1) for m in (dense, other)
        )
        expected = (p.exp() * (p - q)).sum() + (r.exp() * (r - s)).sum()
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-5)
    assert float(Minitron().batch_loss(dense, dense, batch).total.detach().abs()) < 1e-5
    loss.total.backward()
    assert all(value.grad is None for value in dense.model.parameters())


def test_sparse_training_then_pruning_then_fine_tuning(tmp_path: Path) -> None:
    slug = "torch-pruning-groupnorm"
    parameters = {"sparsity": 0.3, "regularisation": 0.05}
    trained = train(slug, load(), tmp_path / "sparse", parameters)
    assert "held-out perplexity" in trained.record.after
    pruned = zoo.load_model(tmp_path / "sparse" / "model", device="cpu")
    decoder = pruned.anatomy.decoder
    assert decoder is not None
    size = decoder.prunable_parameters()
    full = load().anatomy.decoder
    assert full is not None
    assert size < 0.75 * full.prunable_parameters()
    tuned = train(slug, pruned, tmp_path / "tuned", parameters)
    again = tuned.outcome.loaded.anatomy.decoder
    assert again.prunable_parameters() == size
    assert tuned.record.after["held-out perplexity"] < tuned.record.before["held-out perplexity"]
    other = zoo.method("magnitude-sp", sparsity=0.2).apply(load())
    other.loaded.facts["pruning"] = {"method": "magnitude-sp"}
    with pytest.raises(Refused, match="magnitude-sp"):
        train(slug, other.loaded, tmp_path / "no", parameters)


def test_the_penalty_is_weighted_per_step_not_per_token() -> None:
    loaded = load()
    decoder = loaded.anatomy.decoder
    assert decoder is not None
    method = GroupNorm(regularisation=0.1)
    for examples in ([TokenExample((5, 6, 7, 8), 1)], [TokenExample((5, 6), 1)]):
        loss = method.batch_loss(loaded, loaded, collate(examples, 0, "cpu"))
        torch.testing.assert_close(loss.parts["group norms"] / loss.terms, method.penalty(decoder))


def test_llm_pruner_recovers_with_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    parameters = {"sparsity": 0.2, "keep_first": 1, "keep_last": 1}
    trained = train("llm-pruner", load(), tmp_path / "out", parameters)
    assert trained.record.after["held-out perplexity"] < trained.record.before["held-out perplexity"]
    again = zoo.load_model(tmp_path / "out" / "model", device="cpu")
    decoder = again.anatomy.decoder
    assert decoder is not None
    assert decoder.layers[0].mlp.width == 128 > decoder.layers[1].mlp.width
