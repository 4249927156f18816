"""Medusa: trees of ranks, typical acceptance, and heads that are trained, saved and used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import build, left_padded, plain, prompts
from taught import own_text, taught

import zoo
from zoo.dialogues import Dialogue
from zoo.engines.draft_heads import FACTS, output_of
from zoo.engines.language_modelling import IGNORED
from zoo.engines.rank_trees import RankTree, likeliest_tree, parse_paths
from zoo.engines.sampling import typical_path
from zoo.engines.training import Recipe, fit
from zoo.errors import BadInput, Refused
from zoo.methods.decoding._medusa_heads import MedusaHeads, accuracies, heads_loss
from zoo.methods.decoding._medusa_training import frozen_lesson
from zoo.methods.decoding.medusa import PAPER_TREE
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "medusa" / "case2_mc_sim_7b_63.npz"
QUICK: dict[str, Any] = {"steps": 12, "batch": 4, "accumulate": 1, "learning_rate": 0.01}
TEXTS = [Dialogue("", "one two three four five six seven eight " * 3) for _ in range(10)]


def tiny(seed: int = 0) -> LoadedModel:
    model, tokenizer = tiny_model("tiny-llama", seed=seed)
    model.generation_config.eos_token_id = None
    return LoadedModel(model, tokenizer, "tiny-llama")


# --- trees ----------------------------------------------------------------------------------------------------


def test_the_paper_tree_is_that_of_the_release() -> None:
    rows = np.load(GOLDEN)["tree_choices"].tolist()
    assert sorted(PAPER_TREE) == sorted(tuple(rank for rank in row if rank >= 0) for row in rows)


def test_a_tree_of_ranks() -> None:
    tree = RankTree(parse_paths("1 00 0 000 10"))
    assert tree.paths == [(0,), (1,), (0, 0), (1, 0), (0, 0, 0)]
    assert tree.parents == [-1, -1, 0, 1, 2]
    assert tree.fill_by_depth([[5, 6], [7, 8], [9]]) == [5, 6, 7, 7, 9]
    assert tree.within(2, 1).paths == [(0,), (0, 0)]
    for broken in ("00", "0 0"):
        with pytest.raises(ValueError, match="its parent is missing"):
            RankTree(parse_paths(broken))


def test_the_likeliest_tree_has_the_largest_sum_of_products() -> None:
    chances = [[0.6, 0.2, 0.1], [0.5, 0.3, 0.05], [0.4, 0.1, 0.0]]
    worths = {
        (*path,): float(np.prod([chances[depth][rank] for depth, rank in enumerate(path)]))
        for path in parse_paths("0 1 2 00 01 02 10 11 12 20 21 000 001 010 011 100 101")
    }
    best = sorted(worths.values(), reverse=True)
    for nodes in (1, 4, 9):
        tree = likeliest_tree(chances, nodes)
        assert sorted((worths[path] for path in tree.paths), reverse=True) == best[:nodes]


# --- typical acceptance ---------------------------------------------------------------------------------------


def test_typical_acceptance_follows_its_threshold() -> None:
    sure = torch.tensor([0.97, 0.01, 0.01, 0.01])
    unsure = torch.tensor([0.28, 0.26, 0.24, 0.22])
    p = torch.stack([unsure, sure, unsure, sure])
    # Behind the uncertain root every token passes; behind the certain node only the likely one.
    assert typical_path([1], [-1], p[:2], 0.09, 0.3) == [0]
    assert typical_path([1, 1], [-1, 0], torch.stack([unsure, sure, sure]), 0.09, 0.3) == [0]
    # Of two equally deep runs the likelier one wins, wherever it stands.
    assert typical_path([2, 1], [-1, -1], p[[0, 1, 1]], 0.09, 0.3) == [1]
    # A deeper run wins over a likelier one.
    assert typical_path([0, 2, 3], [-1, -1, 1], p[[0, 1, 2, 1]], 0.09, 0.3) == [1, 2]
    assert typical_path([], [], p[:1], 0.09, 0.3) == []


def test_typical_acceptance_through_the_loop() -> None:
    """It accepts more than exact sampling, every accepted token passes the rule, and greedy decoding stays exact."""
    loaded = build(initializer_range=0.05)
    heads = MedusaHeads.fresh(loaded, 3)
    accepted = {}
    for rule in ("exact", "typical"):
        applied = zoo.method("medusa", acceptance=rule).apply(loaded, heads=heads)
        torch.manual_seed(0)
        out = applied.generate(input_ids=prompts(), do_sample=True, temperature=0.7, max_new_tokens=40)
        accepted[rule] = applied.report.decoding.tokens_per_step
    assert accepted["typical"] > accepted["exact"]
    with torch.no_grad():
        p = (loaded.model(out).logits[0, 13:-1].float() / 0.7).softmax(-1)
    limit = (0.3 * (p * (p + 1e-5).log()).sum(-1).exp()).clamp(max=0.09)
    assert (p.gather(1, out[0, 14:, None]).squeeze(1) > limit).all()
    greedy = applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=40)
    assert torch.equal(greedy, plain(loaded, prompts(), max_new_tokens=40))
    processed = {"do_sample": True, "repetition_penalty": 1.3, "max_new_tokens": 12}
    assert applied.generate(input_ids=prompts(), **processed).shape == (1, 26)


# --- heads ----------------------------------------------------------------------------------------------------


def test_fresh_heads_predict_what_the_model_predicts() -> None:
    loaded = build()
    output = output_of(loaded.model)
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for own in (True, False):
        heads = MedusaHeads.fresh(loaded, 2, layers=2, own_output=own)
        for head in range(2):
            assert torch.equal(heads.logits(head, hidden, output), output(hidden))
    assert sum(value.numel() for value in heads.parameters()) == 2 * (32 * 32 + 32)


def test_the_loss_looks_two_and_more_tokens_ahead() -> None:
    loaded = build()
    heads = MedusaHeads.fresh(loaded, 2)
    for value in heads.blocks.parameters():
        torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[IGNORED, 4, 5, 6, 7], [IGNORED, IGNORED, IGNORED, 8, IGNORED]])
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    output = output_of(loaded.model)
    loss = heads_loss(heads, hidden, labels, output, 0.8)
    # (sample, place, head): the token head + 2 places on.
    lessons = {0: [(0, 0, 5), (0, 1, 6), (0, 2, 7), (1, 1, 8)], 1: [(0, 0, 6), (0, 1, 7), (1, 0, 8)]}
    expected = 0.0
    for head, places in lessons.items():
        logs = heads.logits(head, hidden, output).detach().log_softmax(-1)
        own = -sum(float(logs[sample, place, token]) for sample, place, token in places)
        assert loss.parts[f"head {head + 1}"].item() == pytest.approx(own, rel=1e-5)
        expected += 0.8 ** (head + 1) * own
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.terms == 4
    assert heads_loss(heads, hidden[:, :2], labels[:, :2], output, 0.8).terms == 0


def test_heads_trained_on_the_model_s_own_text_are_accepted(tmp_path: Path) -> None:
    loaded = taught()
    text = own_text(loaded)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    heads = MedusaHeads.fresh(loaded, 3)
    lesson = frozen_lesson(loaded, heads, text, 0.8)
    untrained = lesson.measure()
    fit(lesson.task, Recipe(steps=60, batch=16, learning_rate=5e-3, warmup=0.1), tmp_path)
    trained = lesson.measure()
    assert all(trained[name] > untrained[name] + 0.5 for name in trained)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    folder = lesson.finish().save(tmp_path / "model")

    rows = [prompts(1, length, seed=9)[0] for length in (5, 9)]
    ids, mask = left_padded(rows)
    speeds = {}
    for name, made in {"fresh": MedusaHeads.fresh(loaded, 3), "trained": None}.items():
        for tree in ("paper", "measured")[: 1 if made else 2]:
            method = zoo.method("medusa", heads=str(folder), tree=tree, nodes=12)
            applied = method.apply(loaded, heads=made)
            out = applied.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=30)
            speeds[name, tree] = applied.report.decoding.tokens_per_step
            for row, line in zip(rows, out, strict=True):
                single = plain(loaded, row[None], max_new_tokens=30)[0]
                assert torch.equal(line[9:], single[len(row) :])
    # Of two samples together.
    assert speeds["fresh", "paper"] < 2.6
    assert speeds["trained", "paper"] > 6
    assert speeds["trained", "measured"] > 6


def test_accuracies_count_every_rank() -> None:
    loaded = build()
    heads = MedusaHeads.fresh(loaded, 2)
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    output = output_of(loaded.model)
    order = output(hidden).argsort(-1, descending=True)
    labels = torch.full((1, 6), IGNORED)
    labels[0, 2], labels[0, 3] = order[0, 0, 4], order[0, 1, 0]
    found = accuracies(heads, [(hidden, labels)], output)
    assert [rank for rank, share in enumerate(found[0]) if share] == [0, 4]
    assert found[0][4] == 0.5


# --- zoo train ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("medusa") / "out"
    result = zoo.train("medusa", tiny(), TEXTS, output=output, recipe=QUICK, parameters={"train_heads": 2})
    assert result.record.last_loss < result.record.first_loss
    name = "held-out accuracy of head 1"
    assert result.record.after[name] > result.record.before[name] + 0.2
    return output


def test_trained_heads_are_found_from_both_folders(trained: Path) -> None:
    loaded = tiny()
    ids = torch.randint(4, 250, (1, 12), generator=torch.Generator().manual_seed(0))
    for folder in (trained, trained / "model"):
        applied = zoo.method("medusa", heads=str(folder)).apply(loaded)
        out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=16)
        assert torch.equal(out, plain(loaded, ids, max_new_tokens=16))
    half = tiny()
    half.model.to(torch.bfloat16)
    applied = zoo.method("medusa", heads=str(trained)).apply(half)
    assert applied.generate(input_ids=ids, do_sample=False, max_new_tokens=16).shape == (1, 28)
    fresh = MedusaHeads.fresh(half, 2)  # float32, as after a training
    applied = zoo.method("medusa").apply(half, heads=fresh)
    assert applied.generate(input_ids=ids, do_sample=False, max_new_tokens=16).shape == (1, 28)


def test_joint_training_saves_a_model_with_its_heads(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    dense = tiny()
    before = {name: value.clone() for name, value in dense.model.state_dict().items()}
    result = zoo.train(
        "medusa",
        dense,
        TEXTS,
        output=tmp_path / "joint",
        recipe=QUICK,
        parameters={"joint": True, "heads": str(trained), "joint_rank": 4},
    )
    assert all(torch.equal(value, before[name]) for name, value in dense.model.state_dict().items())
    assert result.record.last_loss < result.record.first_loss
    again = zoo.load_model(tmp_path / "joint" / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = again.model(ids).logits
        assert torch.equal(logits, result.outcome.backbone.model(ids).logits)
        assert not torch.equal(logits, dense.model(ids).logits)
    applied = zoo.method("medusa", heads=str(tmp_path / "joint")).apply(again)
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=16)
    assert torch.equal(out, plain(again, ids, max_new_tokens=16))


def test_what_is_missing_is_said_in_one_line(trained: Path, tmp_path: Path) -> None:
    loaded = tiny()
    with pytest.raises(BadInput, match="zoo train medusa --model MODEL --output DIR"):
        zoo.method("medusa").apply(loaded)
    with pytest.raises(BadInput, match="holds no heads that can be read"):
        zoo.method("medusa", heads=str(tmp_path)).apply(loaded)
    with pytest.raises(Refused, match="trained for tiny-llama"):
        zoo.method("medusa", heads=str(trained)).apply(build(vocab_size=50))
    with pytest.raises(BadInput, match="begins with trained heads"):
        zoo.train("medusa", loaded, TEXTS, output=tmp_path / "no", parameters={"joint": True})
    with pytest.raises(BadInput, match="set tree=paper"):
        zoo.method("medusa", tree="measured").apply(loaded, heads=MedusaHeads.fresh(loaded, 2))
    other = tmp_path / "other"
    other.mkdir()
    stored = json.loads((trained / "model" / FACTS).read_text())
    (other / FACTS).write_text(json.dumps({**stored, "method": "eagle"}))
    with pytest.raises(BadInput, match="heads for eagle, not for medusa"):
        zoo.method("medusa", heads=str(other)).apply(loaded)
