"""EAGLE: trees grown by confidence or by rank, the alignment of features and tokens, and a head that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import build, left_padded, plain, prompts
from taught import own_text, taught
from test_speculative_sampling import SMALL, WARP, chi_square, ids_of_small, pair_law

import zoo
from zoo.dialogues import Dialogue
from zoo.engines.draft_heads import TrainedHeads, final_hidden, output_of
from zoo.engines.language_modelling import collate
from zoo.engines.rank_trees import RankTree, parse_paths
from zoo.engines.training import Group, Recipe, Task, fit
from zoo.engines.trees import ROOT
from zoo.errors import BadInput, Refused
from zoo.methods.decoding._eagle_head import EagleHead, agreement, head_loss, predict_ahead
from zoo.methods.decoding._eagle_trees import DynamicTree, StaticTree
from zoo.methods.decoding.eagle import PAPER_TREE
from zoo.models import LoadedModel
from zoo.models.tiny import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "eagle" / "case3_eagle1_static.npz"
TEXTS = [Dialogue("", "one two three four five six seven eight " * 3) for _ in range(10)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> EagleHead:
    """A head for the model that has learnt a cycle, trained on what that writes."""
    loaded, text = taught(), own_text(taught())
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    head = EagleHead.fresh(loaded)
    embed, output = loaded.model.get_input_embeddings(), output_of(loaded.model)
    task = Task(
        [Group(dict(head.named_parameters()))],
        text.learnt,
        text.collate,
        lambda batch, _: head_loss(head, final_hidden(loaded.model, batch), batch, embed, output, 0.002),
        head,
    )
    untrained = agreement(head, loaded.model, text)
    recipe = Recipe(steps=100, batch=16, learning_rate=5e-3, warmup=0.1, betas=(0.9, 0.95))
    fit(task, recipe, tmp_path_factory.mktemp("eagle"))
    assert agreement(head.eval(), loaded.model, text) > max(0.8, untrained + 0.4)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    return head


# --- trees ----------------------------------------------------------------------------------------------------


def test_the_static_tree_is_that_of_the_release() -> None:
    rows = np.load(GOLDEN)["tree_choices"].tolist()
    assert sorted(PAPER_TREE) == sorted(tuple(rank for rank in row if rank >= 0) for row in rows)


def bigram(seed: int = 0, vocabulary: int = 12) -> torch.Tensor:
    """Logits ``[token, successor]`` of a language without memory."""
    return 2 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_a_wide_beam_finds_the_likeliest_nodes_of_all() -> None:
    """With all successors in the beam, the tree is the best one: found here by going through every path."""
    table = bigram(vocabulary=4)
    law = table.log_softmax(-1)
    growth = DynamicTree(table[0], 4, 13)
    growth.expand(table[growth.tokens])
    draft = growth.draft()
    assert draft.parents is not None
    paths: dict[tuple[int, ...], float] = {}
    for first in range(4):
        paths[(first,)] = float(law[0, first])
        for second in range(4):
            paths[first, second] = float(law[0, first] + law[first, second])
    best = sorted(paths, key=lambda path: -paths[path])[:12]
    found = [
        (token,) if parent == ROOT else (draft.tokens[parent], token)
        for token, parent in zip(draft.tokens, draft.parents, strict=True)
    ]
    assert set(found) == set(best)


def test_no_node_is_kept_without_its_parent() -> None:
    """A head that is entirely sure scores children as high as their parents."""
    table = torch.full((6, 6), -200.0)
    table[torch.arange(6), (torch.arange(6) + 1) % 6] = 200.0
    growth = DynamicTree(table[0], 3, 4)
    for _ in range(4):
        growth.expand(table[growth.tokens])
    draft = growth.draft()
    assert (draft.tokens, draft.parents) == ([1, 2, 3], [-1, 0, 1])


def test_a_static_tree_takes_the_ranks_of_each_parent() -> None:
    table = bigram()
    order = table.argsort(-1, descending=True)
    growth = StaticTree(table[0], RankTree(PAPER_TREE))
    while len(growth.tokens):
        growth.expand(table[growth.tokens])
    draft = growth.draft()
    for path, token in zip(sorted(PAPER_TREE, key=lambda path: (len(path), path)), draft.tokens, strict=True):
        expected = 0
        for rank in path:
            expected = int(order[expected, rank])
        assert token == expected
    shallow = StaticTree(table[0], RankTree(parse_paths("0 1 00 01 000"))).draft()
    assert (shallow.tokens, shallow.parents) == (order[0, :2].tolist(), [-1, -1])


# --- features and tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", ["dynamic", "static"])
def test_drafting_reads_what_training_read(trained: EagleHead, tree: str) -> None:
    """The first guess of every draft is the head's prediction from the true features of the whole text before it."""
    loaded = taught()
    embed, output = loaded.model.get_input_embeddings(), output_of(loaded.model)
    # A tree of three nodes, so that many are refused and the caches are cut.
    applied = zoo.method("eagle", tree=tree, nodes=4, depth=3, top_k=2).apply(loaded, heads=trained)
    proposed: list[tuple[list[int], list[int]]] = []
    inner = applied.drafter.propose_row

    def watch(row: Any) -> Any:
        draft = inner(row)
        proposed.append((list(row.tokens), draft.tokens))
        return draft

    applied.drafter.propose_row = watch
    applied.generate(input_ids=prompts(1, 9), do_sample=False, max_new_tokens=24)
    assert len({step.accepted for step in applied.trace}) >= 2
    for tokens, drafted in proposed:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            features = final_hidden(loaded.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            predicted, _ = predict_ahead(trained, features, ids, embed)
            assert int(output(predicted[0, -1]).argmax()) == drafted[0]


def test_a_path_through_the_tree_is_scored_like_a_chain(trained: EagleHead) -> None:
    """Tree mask and positions: guesses along the likeliest path equal those of drafting that path alone."""
    loaded = taught()
    guesses = []
    for top_k, nodes in ((1, 5), (4, 60)):
        method = zoo.method("eagle", depth=3, top_k=top_k, nodes=nodes)
        applied = method.apply(loaded, heads=trained)
        applied.generate(input_ids=prompts(1, 9), do_sample=False, max_new_tokens=12)
        step = applied.trace[1]
        path, parent = [], ROOT
        for node, (token, above) in enumerate(zip(step.draft.tokens, step.draft.parents, strict=True)):
            if above == parent and len(path) < 4:  # the first child is the likeliest
                path.append(token)
                parent = node
        guesses.append(path)
    assert guesses[0] == guesses[1]
    assert len(guesses[0]) == 4


def test_features_are_predicted_along_the_draft_as_along_a_text(trained: EagleHead) -> None:
    """Positions and caches of a draft: its features equal those of one pass over the text with the draft behind it."""
    loaded = taught()
    embed = loaded.model.get_input_embeddings()
    applied = zoo.method("eagle", depth=3, top_k=1, nodes=5).apply(loaded, heads=trained)
    drafter = applied.drafter
    seen: list[torch.Tensor] = []
    output, propose = drafter.output, drafter.propose_row
    checked = 0

    def watch(row: Any) -> Any:
        nonlocal checked
        seen.clear()
        draft = propose(row)
        ids = torch.tensor([row.tokens])
        inputs = final_hidden(loaded.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[
            :, :-1
        ]
        tokens = row.tokens[1:]
        for feature, token in zip(seen, draft.tokens, strict=True):
            out = trained(inputs, embed(torch.tensor([tokens])), torch.arange(len(tokens)))[0, -1:]
            torch.testing.assert_close(feature, out, rtol=1e-4, atol=1e-4)
            inputs, tokens = torch.cat((inputs, out[None]), dim=1), [*tokens, token]
            checked += 1
        return draft

    drafter.output = lambda features: seen.append(features) or output(features)
    drafter.propose_row = watch
    applied.generate(input_ids=prompts(1, 9), do_sample=False, max_new_tokens=24)
    assert checked > 12


def test_the_loss_compares_each_feature_with_the_next_one() -> None:
    loaded = build()
    head = EagleHead.fresh(loaded).eval()
    embed, output = loaded.model.get_input_embeddings(), output_of(loaded.model)
    text = own_text(loaded, 6)
    batch = collate(text.learnt[:1], 0, "cpu")
    features = final_hidden(loaded.model, batch)
    loss = head_loss(head, features, batch, embed, output, 0.0)
    ids = batch["input_ids"]
    total = 0.0
    with torch.no_grad():
        for place in range(3, ids.shape[1] - 1):  # the given token, at place + 1, is one to predict
            out = head(features[:, : place + 1], embed(ids[:, 1 : place + 2]), torch.arange(place + 1))[0, -1]
            true = features[0, place + 1]
            close = torch.nn.functional.smooth_l1_loss(out, true)
            cross = -(output(true).softmax(-1) * output(out).log_softmax(-1)).sum()
            total += float(close + 0.1 * cross)
    assert loss.terms == ids.shape[1] - 4
    assert loss.total.item() == pytest.approx(total, rel=1e-4)
    noisy = head_loss(head, features, batch, embed, output, 0.2)
    assert noisy.total.item() != pytest.approx(total, rel=1e-3)


# --- at work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", ["dynamic", "static"])
def test_a_trained_head_is_accepted_and_changes_nothing(trained: EagleHead, tree: str) -> None:
    loaded = taught()
    rows = [prompts(1, length, seed=9)[0] for length in (5, 9)]
    ids, mask = left_padded(rows)
    speeds = []
    for head in (EagleHead.fresh(loaded).eval(), trained):
        applied = zoo.method("eagle", tree=tree).apply(loaded, heads=head)
        out = applied.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=30)
        speeds.append(applied.report.decoding.tokens_per_step / 2)
        for row, line in zip(rows, out, strict=True):
            single = plain(loaded, row[None], max_new_tokens=30)[0]
            assert torch.equal(line[9:], single[len(row) :])
    assert speeds[1] > 3
    assert speeds[1] > 1.5 * speeds[0]


@pytest.mark.parametrize("tree", ["dynamic", "static"])
def test_sampling_follows_the_law(tree: str) -> None:
    loaded = build(**SMALL)
    law = pair_law(loaded, ids_of_small())
    method = zoo.method("eagle", tree=tree, nodes=6, depth=1, top_k=3)
    applied = method.apply(loaded, heads=EagleHead.fresh(loaded).eval())
    torch.manual_seed(11)
    options = {"do_sample": True, "max_new_tokens": 3, "pad_token_id": 0} | WARP
    samples = applied.generate(input_ids=ids_of_small(), num_return_sequences=400, **options)
    assert chi_square(samples, law) > 1e-3
    assert sum(applied.report.decoding.accepted) > 0


def test_bfloat16_and_other_sizes() -> None:
    for loaded in (build("mha", torch.bfloat16), build("gqa", torch.bfloat16)):
        for kind in (torch.bfloat16, torch.float32):
            head = EagleHead.fresh(loaded).to(kind).eval()
            applied = zoo.method("eagle").apply(loaded, heads=head)
            assert applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=12).shape == (1, 26)


def test_zoo_train_and_back(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("tiny-llama")
    loaded = LoadedModel(model, tokenizer, "tiny-llama")
    result = zoo.train(
        "eagle",
        loaded,
        TEXTS,
        output=tmp_path / "out",
        recipe={"steps": 30, "learning_rate": 3e-3, "warmup": 0, "batch": 4},
        parameters={"noise": 0.0},
    )
    assert result.record.last_loss < 0.8 * result.record.first_loss
    name = "held-out agreement with the model"
    assert result.record.after[name] > result.record.before[name] + 0.2
    again = EagleHead.open(tmp_path / "out", loaded)
    assert isinstance(result.outcome, TrainedHeads)
    for one, other in zip(again.parameters(), result.outcome.heads.parameters(), strict=True):
        assert torch.equal(one, other)
    ids = torch.tensor([[5, 6, 7, 8]])
    applied = zoo.method("eagle", heads=str(tmp_path / "out")).apply(loaded)
    out = applied.generate(input_ids=ids, do_sample=False, max_new_tokens=16)
    assert torch.equal(out, plain(loaded, ids, max_new_tokens=16))
    with pytest.raises(Refused, match="trained for tiny-llama"):
        zoo.method("eagle", heads=str(tmp_path / "out")).apply(build())
    with pytest.raises(BadInput, match="zoo train eagle --model MODEL --output DIR"):
        zoo.method("eagle").apply(loaded)
