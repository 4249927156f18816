"""GAPrune on decoders and on a text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import build
from transformers import BertConfig, BertModel

import zoo
from zoo.engines.contrastive import contrastive_loss, embed, triplets_of
from zoo.errors import BadInput, BadParameter, Refused
from zoo.methods.weights._gradient_alignment import alignment, shared_out, without_lowest
from zoo.methods.weights.gaprune import GAPrune
from zoo.models import LoadedModel
from zoo.models.tiny import byte_tokenizer
from zoo.runner import kind_of

SPORTS = ["The team won the match after the coach had left.", "A cricket match: the wicket fell at noon."]
OTHERS = ["The river rises in the mountains and runs to the sea.", "Bread is made of flour, water and salt."]


def bert() -> LoadedModel:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48}
    config = BertConfig(**fields, num_hidden_layers=2, num_attention_heads=4)
    return LoadedModel(BertModel(config).eval(), byte_tokenizer(), "tiny bert")


def windows(tokenizer: Any, length: int = 32) -> torch.Tensor:
    texts = (SPORTS + OTHERS) * 2
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts])


def zeros(model: Any, name: str) -> float:
    weight = model.get_parameter(name)
    return float((weight == 0).float().mean())


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-phi3", "tiny-gemma3"])
@pytest.mark.parametrize("strategy", ["global", "uniform"])
def test_exactly_so_many_weights_of_the_mlp_become_zero(name: str, strategy: str) -> None:
    loaded = build(name)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    method = GAPrune(ratio=0.4, strategy=strategy)
    applied = method.apply(loaded, calibration=windows(loaded.tokenizer))
    decoder = applied.loaded.anatomy.decoder
    assert decoder is not None
    parts = method.selected(decoder)
    gone = sum(int((part.weight == 0).sum()) for part in parts)
    assert gone == int(0.4 * sum(part.weight.numel() for part in parts))
    if strategy == "uniform":
        assert all(float((part.weight == 0).float().mean()) == pytest.approx(0.4, abs=0.01) for part in parts)
    for layer in decoder.layers:
        assert bool((layer.attention.query.weight != 0).all())
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(value.grad is None for value in (*loaded.model.parameters(), *applied.model.parameters()))


def test_sparsity_counts_all_linear_layers() -> None:
    loaded = build()
    applied = GAPrune(sparsity=0.3).apply(loaded, calibration=windows(loaded.tokenizer))
    assert applied.report.kept == pytest.approx(0.7 * applied.report.total, rel=1e-4)
    with pytest.raises(BadParameter, match="hold 67% of the weights"):
        GAPrune(sparsity=0.7).apply(loaded, calibration=windows(loaded.tokenizer))
    everywhere = GAPrune(sparsity=0.7, matrices="all").apply(loaded, calibration=windows(loaded.tokenizer))
    assert everywhere.report.kept == pytest.approx(0.3 * everywhere.report.total, rel=1e-4)


def test_a_text_encoder_is_pruned_saved_and_loaded_again(tmp_path: Path) -> None:
    loaded = bert()
    method = GAPrune(ratio=0.5)
    applied = method.apply(loaded, calibration=windows(loaded.tokenizer))
    layers = [f"encoder.layer.{index}" for index in range(2)]
    both = [f"{layer}.{part}.dense.weight" for layer in layers for part in ("intermediate", "output")]
    assert sum(zeros(applied.model, name) for name in both) / 4 == pytest.approx(0.5, abs=1e-3)
    assert zeros(applied.model, f"{layers[0]}.attention.self.query.weight") == 0
    assert zeros(loaded.model, both[0]) == 0
    applied.save(tmp_path / "saved")
    again = zoo.load_model(tmp_path / "saved", device="cpu")
    assert again.tokenizer.padding_side == "right"
    ids = windows(loaded.tokenizer)
    with torch.no_grad():
        assert torch.equal(embed(again.anatomy, ids), embed(applied.loaded.anatomy, ids))


def test_a_text_encoder_is_no_decoder() -> None:
    for slug in ("flap", "shortgpt", "wanda", "prompt-lookup"):
        with pytest.raises(Refused, match=r"text encoder|language-model head"):
            zoo.method(slug).check(bert())
    gaprune, lookup = GAPrune(), zoo.method("prompt-lookup")
    assert kind_of([gaprune], "minilm") == "embedding"
    with pytest.raises(Refused, match="minilm is an embedding model"):
        kind_of([lookup], "minilm")


def test_windows_on_the_topic_are_the_domain(tmp_path: Path) -> None:
    loaded = build()
    ids = windows(loaded.tokenizer)
    applied = GAPrune(ratio=0.1).apply(loaded, calibration=ids)
    assert applied.report.facts["domain windows"] == applied.report.facts["general windows"] == 4
    with pytest.raises(BadInput, match="0 of 8 calibration windows are on the topic"):
        GAPrune(topic=("volcano",)).apply(loaded, calibration=ids)
    file = tmp_path / "domain.txt"
    file.write_text("\n\n".join(SPORTS * 20), encoding="utf-8")
    named = GAPrune(ratio=0.1, domain=str(file)).apply(loaded, calibration=ids)
    assert named.report.facts["general windows"] == 8


def test_domain_weights_stay_when_magnitude_does_not_count() -> None:
    """Without the magnitude term, what only the domain needs outlives what only general text needs."""
    weight = torch.ones(4, 6)
    domain, general = torch.zeros(4, 6), torch.zeros(4, 6)
    domain[:, :3], general[:, 3:] = 1.0, 1.0
    score = GAPrune(compression_weight=0.0).importance(weight, domain, general, torch.zeros(4, 6))
    assert bool((score[:, :3] > score[:, 3:]).all())


def test_half_precision_storage_takes_the_fisher_information_away() -> None:
    loaded = build()
    parts = GAPrune().selected(loaded.anatomy.decoder)

    class Tiny:
        def mean(self, part: Any) -> torch.Tensor:
            return torch.ones_like(part.weight)

        def mean_square(self, part: Any) -> torch.Tensor:
            return torch.full_like(part.weight, 1e-9)

    sums: Any = Tiny()
    rounded = GAPrune(half_precision=True).score(parts[0], sums, sums)
    magnitude = torch.nn.functional.softplus(0.5 * (parts[0].weight.abs() + 1e-8).sqrt())
    torch.testing.assert_close(rounded, magnitude)


def test_alignment_of_odd_shapes() -> None:
    first, second = torch.rand(2, 7), torch.rand(2, 7)
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    torch.testing.assert_close(alignment(first, second), cosine.expand(2, 7), rtol=1e-4, atol=1e-6)
    assert alignment(torch.zeros(5, 5), torch.rand(5, 5)).abs().sum() == 0
    ones = alignment(torch.ones(5, 5), torch.ones(5, 5))
    assert ones[2, 2] == pytest.approx(1 / 25, rel=1e-4)
    assert ones[0, 0] == pytest.approx(4 / 9 / 25, rel=1e-4)  # zeros beyond the edge, still divided by nine


def test_counts_are_exact() -> None:
    assert int((~without_lowest(torch.ones(10), 4)).sum()) == 4
    assert bool(without_lowest(torch.rand(5), 0).all())
    sizes = [100, 300, 50]
    for count in (0, 90, 225, 427):
        shares = shared_out(sizes, count)
        assert all(int(0.05 * n) <= share <= int(0.95 * n) for n, share in zip(sizes, shares, strict=True))
        assert count == 0 or sum(shares) == count


def test_triplets_and_their_loss() -> None:
    ids = torch.arange(24).view(3, 8)
    triplets = triplets_of(ids)
    assert triplets.query[1].tolist() == [8, 9, 10, 11]
    assert triplets.positive[1].tolist() == [12, 13, 14, 15]
    assert triplets.negative[1].tolist() == [20, 21, 22, 23]
    assert [len(batch) for batch in triplets.batches(2)] == [2, 1]
    loaded = build()
    batch = triplets_of(windows(loaded.tokenizer))
    anatomy = loaded.anatomy
    with torch.no_grad():
        query, positive, negative = (
            torch.nn.functional.normalize(loaded.model.model(input_ids=part).last_hidden_state[:, -1])
            for part in (batch.query, batch.positive, batch.negative)
        )
        scores = 20 * query @ torch.cat([positive, negative]).T
        expected = -scores.log_softmax(1).diagonal().mean()
        torch.testing.assert_close(contrastive_loss(anatomy, batch), expected, rtol=1e-4, atol=1e-5)
