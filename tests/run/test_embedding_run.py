"""``zoo run`` of a weight method on an embedding model."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

import zoo
from zoo.bench.settings import Settings
from zoo.errors import BadInput, Refused
from zoo.models import LoadedModel
from zoo.models.tiny import byte_tokenizer


def embedder() -> LoadedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LoadedModel(BertModel(config).eval(), byte_tokenizer(), "tiny bert")


def test_what_is_measured_of_a_pruned_embedding_model() -> None:
    parameters = {"ratio": 0.9, "topic": ["number 1", "number 2"]}
    record = zoo.run("gaprune", embedder(), parameters=parameters, settings=Settings(), store=False)
    rows = {row.quantity: row for row in record.comparisons}
    assert set(rows) == {"parameters", "weight-bytes", "retrieval", "cosine-text"}
    found, similarity = rows["retrieval"], rows["cosine-text"].method
    assert found.dense is not None
    assert 0 <= found.dense.median <= 1
    assert similarity is not None
    assert 0 < similarity.median < 1
    assert record.outputs is None or not record.outputs
    assert any("became zero" in note for note in record.notes)


def test_an_embedding_model_generates_nothing() -> None:
    with pytest.raises(BadInput, match="leave out the prompt"):
        zoo.run("gaprune", embedder(), prompt="Hello", store=False)
    with pytest.raises(Refused, match="text encoder"):
        zoo.run("flap", embedder(), store=False)
