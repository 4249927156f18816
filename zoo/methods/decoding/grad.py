"""GRAD: a graph of what the model expects after each token of trusted texts backs up its next-token logits.

"GRAD: Graph-Retrieved Adaptive Decoding for Hallucination Mitigation" (2511.03900). One forward pass over every text
adds the logit of each token that really follows to the edge from the token before it. While generating, the edges that
leave the last token are evidence for what comes next, the more the less sure the model is. Nothing gets faster.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from transformers import LogitsProcessor

from zoo.engines.drafting import Drafter
from zoo.errors import BadInput
from zoo.families.decoding import AppliedDecoder, Decoder
from zoo.interface import register

if TYPE_CHECKING:
    from zoo.engines.decoding import Step
    from zoo.models import LoadedModel

TOP = 50
"""Likeliest tokens by which the scale of logits and the entropy are measured."""


class TokenGraph:
    """Directed, weighted edges between tokens, kept sparse."""

    def __init__(self) -> None:
        self._weights: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._edges: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Add a text: the logit of every token that follows goes to its edge, negative ones as 0.

        Args:
            tokens: ``[n]``.
            logits: behind each of them, ``[n, V]``.
        """
        said = logits[:-1].float().gather(-1, tokens[1:].unsqueeze(-1)).squeeze(-1).clamp(min=0)
        for token, following, weight in zip(
            tokens[:-1].tolist(), tokens[1:].tolist(), said.tolist(), strict=True
        ):
            self._weights[token][following] += weight
        self._edges = {}

    def after(self, token: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Successors ``[m]`` and the weights of their edges, the largest being 1; ``None`` without any."""
        if token not in self._weights:
            return None
        if token not in self._edges:
            following = self._weights[token]
            weights = torch.tensor(list(following.values()), device=device)
            most = weights.max().clamp(min=torch.finfo(weights.dtype).tiny)
            self._edges[token] = torch.tensor(list(following), device=device), weights / most
        return self._edges[token]


@torch.no_grad()
def graph_of(model: Any, texts: Iterable[Sequence[int]]) -> TokenGraph:
    """The graph of some texts, token ids each; those of a single token have no edge."""
    graph = TokenGraph()
    for ids in texts:
        if len(ids) > 1:
            tokens = torch.tensor(ids, device=model.device)
            graph.add(tokens, model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0])
    return graph


class Evidence(LogitsProcessor):
    """Adds the evidence of a graph to the scores.

    Args:
        graph: the texts'.
        method: how.
    """

    def __init__(self, graph: TokenGraph, method: Grad) -> None:
        self.graph = graph
        self.method = method

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        """``input_ids [B, n]`` and ``scores [B, V]``; returns new scores."""
        fused = scores.clone()
        for row, token in enumerate(input_ids[:, -1].tolist()):
            edges = self.graph.after(token, scores.device)
            if edges is not None:
                self._fuse(fused[row], *edges)
        return fused

    def _fuse(self, scores: torch.Tensor, following: torch.Tensor, weights: torch.Tensor) -> None:
        """In place, ``scores [V]``."""
        method = self.method
        p = scores.softmax(-1)
        best = scores.topk(min(TOP, len(scores))).values
        best = best[best.isfinite()]
        if method.trust == "confidence":
            doubt = 1 - float(p.max())
        else:
            among = best.softmax(-1)
            doubt = float(-(among * among.log()).sum()) / math.log(max(2, len(among)))
        alpha = method.alpha * doubt
        plausible = p[following] >= method.plausible * p.max()
        following, weights = following[plausible], weights[plausible]
        if method.fusion == "interpolate":
            most = scores.max()
            scores[scores.isfinite()] *= 1 - alpha
            scores[following] += alpha * most * weights
        else:
            scale = best.max() - best.mean() if method.fusion == "scaled" else 1.0
            scores[following] += alpha * scale * weights


class AppliedGrad(AppliedDecoder):
    """Generation with evidence: every step is a plain one, its scores are not."""

    method: Grad

    def __init__(
        self,
        method: Grad,
        loaded: LoadedModel,
        graph: TokenGraph,
        on_step: Callable[[Step], None] | None = None,
        synchronise: bool = False,
    ) -> None:
        super().__init__(method, loaded, Drafter(), on_step, synchronise)
        self.graph = graph

    def generate(self, **inputs: Any) -> Any:
        """As ``model.generate``, with the evidence behind the logits processors of the caller."""
        processors = [*(inputs.pop("logits_processor", None) or []), Evidence(self.graph, self.method)]
        return super().generate(**inputs, logits_processor=processors)


@register("grad")
class Grad(Decoder):
    """Backs up next-token logits by a graph of trusted texts; for factuality, not for speed."""

    corpus: str = Field("news", description="Trusted texts: a packaged name, a file, or hub:OWNER/NAME.")
    texts: int = Field(32, ge=1, description="Texts read, the first ones.")
    text_tokens: int = Field(512, ge=2, description="Tokens read of each text.")
    alpha: float = Field(0.5, ge=0, le=1, description="Weight of the evidence where the model knows nothing.")
    fusion: Literal["scaled", "additive", "interpolate"] = Field(
        "scaled",
        description="Evidence times the spread of the best logits is added; as it is; or mixed with the logits.",
    )
    trust: Literal["confidence", "entropy"] = Field(
        "confidence", description="What tells how sure the model is: its highest probability, or the entropy."
    )
    plausible: float = Field(
        0.1, ge=0, le=1, description="Tokens below this share of the highest probability get no evidence."
    )

    def drafter(self, loaded: LoadedModel, **resources: Any) -> Drafter:
        """None: it does not draft."""
        return Drafter()

    def apply(
        self,
        loaded: LoadedModel,
        *,
        on_step: Callable[[Step], None] | None = None,
        synchronise: bool = False,
        corpus: Sequence[str] | None = None,
        **resources: Any,
    ) -> AppliedGrad:
        """Read the texts and wrap generation. The model itself is not touched.

        Args:
            corpus: texts in place of those of the parameter, the ones that were retrieved for a question, say.

        Raises:
            BadInput: no tokenizer, or no such texts.
        """
        self.check(loaded)
        if loaded.tokenizer is None:
            raise BadInput(f"grad reads text, and {loaded.ref} has no tokenizer")
        if corpus is None:
            from zoo.data import TEXTS, load_texts

            corpus = load_texts(self.corpus, "calibration" if self.corpus in TEXTS else None)
        read = (loaded.tokenizer(text).input_ids[: self.text_tokens] for text in corpus[: self.texts])
        return AppliedGrad(self, loaded, graph_of(loaded.model, read), on_step, synchronise)
