"""IDPruner: maximal marginal relevance over the visual tokens."""

from __future__ import annotations

import pytest
import torch
from reference import ARCHITECTURES, load, picture

import zoo
from zoo.errors import BadInput
from zoo.methods.visual_tokens.idpruner import IDPruner, min_max


def by_the_paper(x: torch.Tensor, raw: torch.Tensor, count: int, balance: float, per_round: int) -> list[int]:
    """Loops over tokens, with the full similarity matrix, in float64."""
    x, raw = x.double(), raw.double()
    importance = (raw - raw.min()) / (raw.max() - raw.min() + 1e-6)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    picked: list[int] = []
    while len(picked) < count:
        scores = {
            token: float(importance[token])
            if not picked
            else balance * float(importance[token])
            - (1 - balance) * max(float(cosine[token, p]) for p in picked)
            for token in range(len(x))
            if token not in picked
        }
        best = sorted(scores, key=lambda token: -scores[token])
        picked += best[: min(per_round, count - len(picked))]
    return picked


@pytest.mark.parametrize(("balance", "per_round"), [(0.5, 1), (0.3, 1), (0.0, 1), (1.0, 2), (0.5, 3)])
def test_picks_are_those_of_the_formula(balance: float, per_round: int) -> None:
    generator = torch.Generator().manual_seed(per_round)
    x, raw = torch.randn(40, 6, generator=generator), torch.randn(40, generator=generator)
    method = IDPruner(keep_tokens=11, mmr_lambda=balance, parallel_k=per_round)
    assert method.order(x, raw).tolist() == by_the_paper(x, raw, 11, balance, per_round)


def test_a_copy_of_an_important_token_waits_and_the_least_important_do_not_win() -> None:
    x = torch.eye(12)
    scores = torch.linspace(0, 0.3, 12)
    important, copy = [2, 5, 9], 6
    scores[important] = torch.tensor([1.0, 0.9, 0.8])
    x[copy], scores[copy] = x[5], 0.95
    method = IDPruner(keep_tokens=3)
    # Token 5 is a little less important than its copy, so the copy is taken and 5 is not.
    assert method.order(x, scores).tolist() == [2, 6, 9]
    assert not {2, 6, 9} & set(method.order(x, -scores).tolist())


def test_equal_scores_leave_nothing_undefined() -> None:
    assert min_max(torch.full((5,), 3.0)).tolist() == [0.0] * 5
    order = IDPruner(keep_tokens=5).order(torch.ones(5, 3), torch.ones(5))
    assert order.tolist() == [0, 1, 2, 3, 4]


def test_half_precision_tokens_are_compared_in_float32() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    scores = torch.rand(30, generator=torch.Generator().manual_seed(3))
    method = IDPruner(keep_tokens=9)
    assert method.order(x, scores).tolist() == method.order(x.float(), scores).tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_given_scorer_decides_on_every_architecture(name: str) -> None:
    loaded = load(name)
    data = loaded.processor(text=["<image> What?"], images=[picture(1)], return_tensors="pt")
    seen: list[torch.Tensor] = []

    def scorer(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return torch.arange(len(tokens)).float()

    method = zoo.method("idpruner", keep_ratio=0.3, mmr_lambda=1.0, scorer=scorer)
    assert "scorer" not in method.parameters()
    with method.apply(loaded) as applied, torch.no_grad():
        applied(**data)
        kept = applied.kept[-1][0]
    visual = (data["input_ids"][0] == loaded.model.config.image_token_id).nonzero().squeeze(-1)
    assert kept.tolist() == visual[-round(0.3 * len(visual)) :].tolist()
    assert seen[0].shape == (len(visual), loaded.anatomy.decoder.hidden_size)


def test_a_scorer_of_the_wrong_length_is_refused() -> None:
    loaded = load("tiny-llava")
    data = loaded.processor(text=["<image> What?"], images=[picture(1)], return_tensors="pt")
    with (
        zoo.method("idpruner", scorer=lambda tokens: tokens[:3, 0]).apply(loaded) as applied,
        pytest.raises(BadInput, match="one score for each of 36 tokens; it returned 3"),
    ):
        applied(**data)


def test_importance_is_class_attention_where_there_is_a_class_token() -> None:
    loaded = load("tiny-llava")
    data = loaded.processor(text=["<image> What?"], images=[picture(1)], return_tensors="pt")
    with zoo.method("idpruner", keep_tokens=5, mmr_lambda=1.0).apply(loaded) as applied, torch.no_grad():
        applied(**data)
        kept = applied.kept[-1][0]
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        tower = loaded.model.model.vision_tower(data["pixel_values"], output_attentions=True)
    row = tower.attentions[-2][0].mean(0)[0, 1:]
    start = int((data["input_ids"][0] == loaded.model.config.image_token_id).nonzero()[0])
    assert (kept - start).tolist() == sorted(row.topk(5).indices.tolist())
