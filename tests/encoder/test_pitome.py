"""PiToMe against literal loops over tokens."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from encoders import features, pixels, tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.testing import assert_close

import zoo
from zoo.errors import BadParameter
from zoo.methods.encoder_tokens.pitome import PiToMe, Rule, energy_matching


def energy_of(cosines: list[float], margin: float, rule: Rule) -> float:
    total = 0.0
    for cosine in cosines:
        if rule == "text":
            width = 1 - margin
            total += math.exp(-0.5 * ((1 - cosine) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        else:
            total += cosine - margin if cosine > margin else math.exp(cosine - margin) - 1
    return total / len(cosines)


def slow_matching(
    metric: torch.Tensor, r: int, margin: float, rule: Rule, prefix: int
) -> tuple[list[int], dict[int, int]]:
    """Output order of positions and ``moved -> partner`` of one sample."""
    feature = normalize(metric[prefix:], dim=-1)
    cosine = (feature @ feature.T).tolist()
    energy = [energy_of(row, margin, rule) for row in cosine]
    ranked = sorted(range(len(cosine)), key=lambda i: -energy[i])
    # Float32 does not tell such tokens apart.
    assume(all(energy[i] - energy[j] > 1e-5 * abs(energy[i]) for i, j in pairwise(ranked)))
    protected: list[int] = []
    if rule == "bipartite":
        goes, partners = ranked[::2], ranked[1::2]
        goes = sorted(goes, key=lambda i: -max(cosine[i][j] for j in partners))
        goes, protected = goes[:r], goes[r:]
    else:
        goes, partners = (
            (ranked[: 2 * r : 2], ranked[1 : 2 * r : 2])
            if rule == "ordered"
            else (ranked[:r], ranked[r : 2 * r])
        )
        protected = ranked[2 * r :]
    moved = {i + prefix: max(partners, key=lambda j: cosine[i][j]) + prefix for i in goes}
    return [*range(prefix), *(i + prefix for i in (*protected, *partners))], moved


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(4, 21),
    share=st.floats(0.05, 0.5),
    margin=st.floats(0.1, 0.9),
    rule=st.sampled_from(["ordered", "bipartite", "text"]),
    prefix=st.integers(0, 5),
    seed=st.integers(0, 2**20),
)
def test_matching_equals_the_loop(
    tokens: int, share: float, margin: float, rule: Rule, prefix: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, tokens + prefix, 8, generator=generator)
    x = torch.randn(2, tokens + prefix, 5, generator=generator)
    weight = torch.rand(2, tokens + prefix, generator=generator) + 0.5
    r = max(1, int(share * tokens))
    join = energy_matching(metric, r, margin, rule, prefix, weight)
    out, sizes = join.apply(x), join.sizes()
    assert join.length == tokens + prefix - r
    for sample in range(2):
        order, moved = slow_matching(metric[sample], r, margin, rule, prefix)
        assert join.anchor[sample].tolist() == order
        for slot, position in enumerate(order):
            members = [position, *(i for i, partner in moved.items() if partner == position)]
            total = weight[sample, members].sum()
            mean = (weight[sample, members, None] * x[sample, members]).sum(0) / total
            assert_close(sizes[sample, slot], total)
            assert_close(out[sample, slot], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["ordered", "text"])
def test_isolated_tokens_are_protected(rule: Rule) -> None:
    """Ten tokens of one kind and four lonely ones: only the crowd merges."""
    generator = torch.Generator().manual_seed(0)
    crowd = torch.ones(10, 16) + 0.05 * torch.randn(10, 16, generator=generator)
    metric = torch.cat((crowd, 3 * torch.randn(4, 16, generator=generator))).unsqueeze(0)
    join = energy_matching(metric, 5, 0.9, rule)
    assert set(join.anchor[0].tolist()) >= {10, 11, 12, 13}
    assert_close(join.sizes()[join.anchor >= 10], torch.ones(4))


def test_padding_matches_nothing() -> None:
    metric = torch.randn(1, 13, 8, generator=torch.Generator().manual_seed(5))
    valid = torch.ones(1, 13, dtype=torch.bool)
    valid[0, 9:] = False
    for rule in ("ordered", "bipartite"):
        join = energy_matching(metric, 3, 0.5, rule, 1, None, valid)
        assert int(join.moved.max()) < 9
        assert int(join.anchor[0, join.target[0]].max()) < 9
        alone = energy_matching(metric[:, :9], 3, 0.5, rule, 1)
        assert join.moved.tolist() == alone.moved.tolist()


@pytest.mark.parametrize(("kind", "start"), [("deit", 0.75), ("vit", 0.9), ("clip", 0.95)])
def test_margins_fall_and_rules_change_at_half_depth(kind: str, start: float) -> None:
    encoder = tiny(kind, num_hidden_layers=5).anatomy.encoder
    assert encoder is not None
    given = []
    for stage in PiToMe().stages(encoder):
        assert isinstance(stage.reduce, partial)
        given.append((round(stage.reduce.keywords["margin"], 6), stage.reduce.keywords["rule"]))
    margins = [round(start * (1 - block / 5), 6) for block in range(5)]
    assert given == list(zip(margins, ["bipartite"] * 3 + ["ordered"] * 2, strict=True))


def test_attention_is_not_told_about_sizes() -> None:
    """As in the release: no mask reaches the kernel."""
    loaded = tiny("vit")
    encoder = loaded.anatomy.encoder
    assert encoder is not None
    masks = []
    hook = encoder.blocks[3].attention.module.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with zoo.method("pitome", keep_ratio=0.6).apply(loaded) as applied:
        features(loaded.model, pixels())
    hook.remove()
    assert masks == [None]
    assert float(applied.sources.sum(-1).max()) > 1


def test_less_than_half_is_refused() -> None:
    with pytest.raises(BadParameter, match="keep_ratio"):
        zoo.method("pitome", keep_ratio=0.4)
