"""The acceptance rules as pure functions: the output law is the target's, and a broken rule is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from zoo.engines import sampling
from zoo.engines.sampling import accept_chain, accept_siblings, longest_match, residual

DRAWS = 20_000
V = 8


def p_value(observed: torch.Tensor, law: torch.Tensor) -> float:
    """Of Pearson's chi-square test: counts ``[k]`` against probabilities ``[k]`` (all positive)."""
    expected = law.double() * observed.sum()
    statistic = ((observed.double() - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(law) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def laws(n: int, seed: int) -> torch.Tensor:
    return (1.2 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def speculate(
    p: torch.Tensor,
    draft: torch.Tensor,
    q: torch.Tensor | None,
    seed: int,
    accept: Callable[..., tuple[torch.Tensor, torch.Tensor]] = accept_chain,
) -> torch.Tensor:
    """First two tokens of many independent steps ``[N, 2]``; -1 where a step committed only one."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(draft.shape, generator=generator)
    spread = p.expand(len(draft), -1, -1)
    accepted, rest = accept(spread, draft, uniforms, None if q is None else q.expand(len(draft), -1, -1))
    following = torch.multinomial(rest, 1, generator=generator)
    committed = torch.cat((draft, following), dim=1)
    committed = committed.scatter(1, accepted.unsqueeze(1), following)
    second = torch.where(accepted > 0, committed[:, 1], -1)
    return torch.stack((committed[:, 0], second), dim=1)


def drawn_drafts(q: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(q, DRAWS, replacement=True, generator=generator).T


def worst(tokens: torch.Tensor, p: torch.Tensor) -> float:
    """The smaller p-value of the laws of the first and of the second token."""
    second = tokens[tokens[:, 1] >= 0, 1]
    return min(
        p_value(torch.bincount(tokens[:, 0], minlength=V), p[0]),
        p_value(torch.bincount(second, minlength=V), p[1]),
    )


def test_drawn_drafts_leave_the_law_unchanged() -> None:
    p, q = laws(4, 1), laws(3, 2)
    assert worst(speculate(p, drawn_drafts(q, 3), q, 4), p) > 1e-3


def test_chosen_drafts_leave_the_law_unchanged() -> None:
    p = laws(4, 1)
    draft = torch.tensor([2, 5, 1]).expand(DRAWS, -1)
    assert worst(speculate(p, draft, None, 4), p) > 1e-3


def test_the_test_notices_a_residual_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = laws(4, 1), laws(3, 2)
    monkeypatch.setattr(sampling, "residual", lambda p, q: p)
    assert worst(speculate(p, drawn_drafts(q, 3), q, 4), p) < 1e-6


def test_the_test_notices_soft_probabilities_of_chosen_drafts() -> None:
    p, q = laws(4, 1), laws(3, 2)
    chosen = q.argmax(-1).expand(DRAWS, -1)
    assert worst(speculate(p, chosen, q, 4), p) < 1e-6


def test_the_test_notices_a_rule_that_accepts_too_much() -> None:
    p, q = laws(4, 1), laws(3, 2)

    def generous(
        p: torch.Tensor, draft: torch.Tensor, uniforms: torch.Tensor, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return accept_chain(p, draft, uniforms * 0.8, q)

    assert worst(speculate(p, drawn_drafts(q, 3), q, 4, generous), p) < 1e-6


def siblings(
    p: torch.Tensor, q: torch.Tensor | None, replacement: bool, claim: bool, draws: int
) -> torch.Tensor:
    """Tokens that come out of three siblings; ``claim`` is what the rule is told about replacement."""
    generator = torch.Generator().manual_seed(9)
    uniforms = torch.rand(draws, 3, generator=generator)
    if q is None:
        candidates = torch.tensor([4, 0, 6]).expand(draws, -1)
    else:
        candidates = torch.multinomial(q.expand(draws, -1), 3, replacement=replacement, generator=generator)
    counts = torch.zeros(V, dtype=torch.int64)
    for row in range(draws):
        tokens = candidates[row].tolist()
        found, rest = accept_siblings(p, tokens, uniforms[row], q, replacement=claim)
        counts[
            tokens[found] if found is not None else int(torch.multinomial(rest, 1, generator=generator))
        ] += 1
    return counts


@pytest.mark.parametrize(("drawn", "replacement"), [(False, True), (True, True), (True, False)])
def test_siblings_leave_the_law_unchanged(drawn: bool, replacement: bool) -> None:
    p, q = laws(2, 5)
    counts = siblings(p, q if drawn else None, replacement, replacement, 6000)
    assert p_value(counts, p) > 1e-3


def test_the_test_notices_siblings_without_replacement_taken_for_independent() -> None:
    p = torch.full((V,), 1 / V)
    q = torch.tensor([0.5, 0.25, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01])
    assert p_value(siblings(p, q, False, False, 6000), p) > 1e-3
    assert p_value(siblings(p, q, False, True, 6000), p) < 1e-6


def test_one_candidate_is_the_chain_of_length_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(50):
        p, q = laws(2, seed)
        token = int(torch.multinomial(q, 1, generator=generator))
        uniform = torch.rand(1, generator=generator)
        for law in (q, None):
            count, rest = accept_chain(
                torch.stack((p, p)), torch.tensor([token]), uniform, None if law is None else law.unsqueeze(0)
            )
            found, left = accept_siblings(p, [token], uniform, law)
            assert (found == 0) == bool(count)
            torch.testing.assert_close(left, rest)


def test_equal_laws_leave_no_residual() -> None:
    p = laws(1, 3)[0]
    assert torch.equal(residual(p, p), p)
    assert not residual(p, torch.zeros(V).index_fill(0, torch.tensor([2]), 1.0))[2]


def test_a_forbidden_token_is_refused_even_by_the_uniform_zero() -> None:
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    accepted, rest = accept_chain(p, torch.tensor([0]), torch.zeros(1))
    assert int(accepted) == 0
    assert rest.tolist() == [0.0, 1.0]
    assert accept_siblings(p[0], [0], torch.zeros(1))[0] is None


def test_an_empty_draft_is_a_plain_draw() -> None:
    p = laws(1, 3)
    accepted, rest = accept_chain(p, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert int(accepted) == 0
    assert torch.equal(rest, p[0])


def test_longest_match() -> None:
    assert longest_match([], [4]) == 0
    assert longest_match([4, 5, 6], [4, 5, 7, 6]) == 2
    assert longest_match([4, 5], [4, 5, 9]) == 2
