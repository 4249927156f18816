"""Next-token distributions and the rules that accept drafted tokens.

The rules are pure functions of probabilities and injected uniforms, so they can be tested to the last digit. Exact
rejection sampling: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2211.17192),
algorithm 1; Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling" (2302.01318),
algorithm 2 and theorem 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zoo.engines.trees import DETACHED, ROOT, path_to

SCORE_ONLY = frozenset(
    {
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "SuppressTokensLogitsProcessor",
    }
)
"""Processors of transformers that read the scores alone, so that all positions can go through them at once."""


class Warper:
    """Scores as ``generate`` sees them: float32, after the very same logits processors.

    Args:
        processors: transformers' ``LogitsProcessorList``; it already holds temperature, top-k, top-p ... when sampling.
        ids: buffer ``[rows, capacity]`` (int64) whose row ``b`` begins with the prompt as ``generate`` got it (padding
            included) and has room for every token that may follow.
    """

    def __init__(self, processors: Any, ids: torch.Tensor) -> None:
        self.processors = processors
        self.ids = ids
        self.plain = len(processors) == 0
        self.contextual = not all(
            type(item).__name__ in SCORE_ONLY and type(item).__module__.startswith("transformers.")
            for item in processors
        )
        """Whether scores depend on the tokens before (repetition penalty, minimum length, anything of the user's)."""

    def write(self, row: int, start: int, tokens: Sequence[int]) -> None:
        """Put ``tokens`` at column ``start`` of a row; what stood there is overwritten."""
        if tokens:
            self.ids[row, start : start + len(tokens)] = torch.tensor(tokens, device=self.ids.device)

    def after(self, row: int, length: int, path: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Scores ``[V]`` of the token that follows ``ids[row, :length]`` and ``path``, from ``logits [V]``."""
        scores = logits.to(self.ids.device, torch.float32, copy=True).unsqueeze(0)
        if self.contextual:
            self.write(row, length, path)
        return self.processors(self.ids[row : row + 1, : length + len(path)], scores)[0]

    def along(self, row: int, length: int, chain: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Scores ``[n + 1, V]`` before, between and after the ``n`` tokens of ``chain``, from ``logits [n + 1, V]``."""
        if self.contextual:
            return torch.stack([self.after(row, length, chain[:i], logits[i]) for i in range(len(chain) + 1)])
        scores = logits.to(self.ids.device, torch.float32, copy=True)
        return self.processors(self.ids[row : row + 1, :length].expand(len(scores), -1), scores)

    def throughout(
        self, row: int, length: int, tokens: Sequence[int], parents: Sequence[int], logits: torch.Tensor
    ) -> torch.Tensor:
        """Scores ``[n + 1, V]`` after the root and after each of the ``n`` nodes of a tree, from ``logits`` alike."""
        if not self.contextual:
            return self.along(row, length, tokens, logits)
        paths = [path_to(node, parents) for node in range(ROOT, len(tokens))]
        return torch.stack(
            [
                self.after(row, length, [tokens[node] for node in path], logits[place])
                for place, path in enumerate(paths)
            ]
        )


def longest_match(draft: Sequence[int], choices: Sequence[int]) -> int:
    """Greedy rule for a chain: how many leading tokens of ``draft`` equal the target's own choice at their place.

    Args:
        draft: ``n`` tokens.
        choices: the target's argmax at those places (more may follow, such as the one after the last).
    """
    count = 0
    for token, choice in zip(draft, choices, strict=False):
        if token != choice:
            break
        count += 1
    return count


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``max(p - q, 0)`` normalised over the last dimension; ``p`` itself where the two are equal.

    What is left of ``p`` once a token drawn from ``q`` was rejected (2211.17192, section 2.3). Shapes ``[..., V]``.
    """
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)


def accept_chain(
    p: torch.Tensor, draft: torch.Tensor, uniforms: torch.Tensor, q: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact rejection sampling along a chain of ``n`` drafted tokens.

    Token ``i`` is accepted while ``uniforms[i] <= p_i(x_i) / q_i(x_i)``. A drafter that does not draw its tokens
    (``q = None``) has the one-hot law, for which the ratio is ``p_i(x_i)`` and the residual is ``p`` without ``x_i``;
    using its soft probabilities instead would bias the output.

    Args:
        p: target distributions ``[..., n + 1, V]``, float32, fully warped.
        draft: drafted tokens ``[..., n]``, ``x_i`` drawn from ``q_i``.
        uniforms: independent draws from ``[0, 1)``, ``[..., n]``.
        q: drafter distributions ``[..., n, V]`` after the same warping, or ``None``.

    Returns:
        Number of tokens accepted ``[...]`` (int64), and the distribution ``[..., V]`` of the token that follows them:
        the residual after a rejection, ``p_n`` when all were accepted.
    """
    n = draft.shape[-1]
    if n == 0:
        return torch.zeros(draft.shape[:-1], dtype=torch.int64, device=p.device), p[..., 0, :]
    at = draft.unsqueeze(-1)
    p_draft = p[..., :n, :].gather(-1, at).squeeze(-1)
    ratio = p_draft if q is None else p_draft / q.gather(-1, at).squeeze(-1)
    # A uniform can be exactly 0: a token the target forbids must not pass even then.
    passed = (uniforms <= ratio) & (p_draft > 0)
    accepted = passed.long().cumprod(-1).sum(-1)

    def pick(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        index = place[..., None, None].expand(*place.shape, 1, rows.shape[-1])
        return rows.gather(-2, index).squeeze(-2)

    p_next = pick(p, accepted)
    rejected = accepted.clamp(max=n - 1)
    if q is None:
        refused = draft.gather(-1, rejected.unsqueeze(-1))
        q_next = torch.zeros_like(p_next).scatter_(-1, refused, 1.0)
    else:
        q_next = pick(q, rejected)
    return accepted, torch.where((accepted < n).unsqueeze(-1), residual(p_next, q_next), p_next)


def accept_siblings(
    p: torch.Tensor,
    candidates: Sequence[int],
    uniforms: torch.Tensor,
    q: torch.Tensor | None = None,
    *,
    replacement: bool = True,
) -> tuple[int | None, torch.Tensor]:
    """Exact rejection sampling among several candidates for one place (recursive rejection sampling).

    Each candidate is tried in turn against what is left of ``p``. The output law is ``p`` whatever the candidates,
    provided they were really drawn from ``q`` in this order, or are deterministic (``q = None``).

    Args:
        p: target distribution ``[V]``, float32.
        candidates: ``k`` tokens.
        uniforms: ``[k]``.
        q: the law ``[V]`` of the first draw.
        replacement: ``False`` when a token once drawn could not be drawn again, so that ``q`` shrinks too.

    Returns:
        Index of the accepted candidate or ``None``, and what is left of ``p`` (from which to draw when ``None``).
    """
    law = q
    for index, token in enumerate(candidates):
        p_token = float(p[token])
        q_token = 1.0 if law is None else float(law[token])
        if p_token > 0 and float(uniforms[index]) * q_token <= p_token:
            return index, p
        if law is None:
            one_hot = torch.zeros_like(p)
            one_hot[token] = 1.0
            p = residual(p, one_hot)
            continue
        p = residual(p, law)
        if not replacement:
            law = law.clone()
            law[token] = 0.0
            law = law / law.sum().clamp(min=torch.finfo(law.dtype).tiny)
    return None, p


def typical_path(
    tokens: Sequence[int], parents: Sequence[int], p: torch.Tensor, epsilon: float, alpha: float
) -> list[int]:
    """Typical acceptance in a tree: not exact, but the longer drafts survive the less certain the target is.

    A token passes when its probability is above ``min(epsilon, alpha * exp(-H))``, ``H`` being the entropy at its
    place (Medusa, 2401.10774, section 2.3.1). The deepest run of tokens that pass wins; among equally deep ones the
    likeliest.

    Args:
        tokens: token of each node ``[n]``.
        parents: ``[n]``, see ``zoo.engines.trees``.
        p: the target's distributions after the root and after each node, ``[n + 1, V]``, float32.
        epsilon: a probability that always suffices.
        alpha: factor of the threshold that falls with the entropy.

    Returns:
        Node indices from the root downwards.
    """
    if not tokens:
        return []
    # The small constant is the official code's; with it the entropies agree to the last digit.
    entropy = -(p * (p + 1e-5).log()).sum(-1)
    threshold = (alpha * (-entropy).exp()).clamp(max=epsilon)
    places = torch.tensor([max(parent, ROOT) + 1 for parent in parents], device=p.device)
    chances = p[places, torch.tensor(tokens, device=p.device)]
    passed = (chances > threshold[places]).tolist()
    logs = chances.log().tolist()
    runs: dict[int, tuple[int, float]] = {ROOT: (0, 0.0)}
    best = ROOT
    for node, parent in enumerate(parents):
        if parent == DETACHED or parent not in runs or not passed[node]:
            continue
        depth, score = runs[parent]
        runs[node] = (depth + 1, score + logs[node])
        if runs[node] > runs[best]:
            best = node
    return path_to(best, parents)


def draw(p: torch.Tensor) -> int:
    """One token from ``p [V]``, by torch's global generator of the device."""
    return int(torch.multinomial(p, 1))
