"""GAPrune: an embedding model loses the single weights that matter least to one domain, and to text in general.

GAPrune: Gradient-Alignment Pruning for Domain-Aware Embeddings (arXiv 2509.10844). A contrastive loss is differentiated
on domain text and on general text. With ``F`` the diagonal Fisher information on either, ``m = |w|``, and ``a`` the
agreement of the two gradients around a weight, its Domain Alignment Importance is

    softplus((F_dom m - beta F_gen m) * clamp(1 + 0.2 a, 0.8, 1.2) + c sqrt(m))

and the lowest weights of all selected matrices become zero.

In the authors' code Fisher information and agreement are stored in half precision, where they vanish, so that its
scores are nearly magnitudes; here they are float32 (``half_precision`` restores it). The agreement of two unit vectors
with millions of entries is tiny in any precision, and its factor close to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch.nn import functional

from zoo.data import calibration_windows, load_texts
from zoo.engines.contrastive import contrastive_loss, triplets_of
from zoo.engines.gradients import GradientSums, sum_gradients
from zoo.engines.surgery import replace_weights
from zoo.errors import BadInput, BadParameter
from zoo.families.weight_sparsity import nonzero_weights
from zoo.families.weights import Facts, WeightMethod, Work
from zoo.interface import register
from zoo.methods.weights._gradient_alignment import alignment, shared_out, without_lowest
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, DecoderLayer, LinearPart

SPORT = ("cricket", "tennis", "football", "match", "champion", "wicket", "coach", "tournament", "team")
"""A domain that the packaged news has enough of to try the method out."""


@register("gaprune")
class GAPrune(WeightMethod):
    """Zeroes by Domain Alignment Importance.

    The published ratio counts the weights of the selected matrices; ``sparsity`` counts all linear layers.
    """

    unit: ClassVar[str] = "non-zero decoder weights"
    least_sequences: ClassVar[int] = 4

    sparsity: float = Field(
        0.33, ge=0, lt=1, description="Fraction of the weights of all linear layers to set to zero."
    )
    ratio: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="The published ratio, of the selected matrices' weights; in place of sparsity.",
    )
    matrices: Literal["mlp", "attention", "all"] = Field(
        "mlp", description="Which linear layers lose weights."
    )
    strategy: Literal["global", "uniform"] = Field(
        "global", description="Rank all weights together, or each matrix's on its own."
    )
    domain: str | None = Field(
        None,
        description="Text of the domain: a file, or another source of texts; none: calibration windows on the topic.",
    )
    topic: tuple[str, ...] = Field(
        SPORT, min_length=1, description="Calibration windows with one of these words are the domain's."
    )
    beta: float = Field(1.0, ge=0, description="Weight of the general Fisher information.")
    compression_weight: float = Field(0.5, ge=0, description="Weight c of the magnitude term.")
    postprocess: Literal["none", "zscore_sigmoid", "minmax", "rank"] = Field(
        "none", description="How the scores of each matrix are rescaled before all are ranked together."
    )
    temperature: float = Field(1.0, gt=0, description="Divisor of the z-scores in zscore_sigmoid.")
    batch: int = Field(4, ge=2, description="Triplets per gradient; the others of a batch are negatives too.")
    half_precision: bool = Field(
        False, description="Round Fisher information and agreement to float16, as released."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> GAPrune:
        if self.ratio is not None and "sparsity" in self.model_fields_set:
            raise ValueError("give sparsity (of all linear layers) or ratio (of the selected ones), not both")
        return self

    @property
    def removes_nothing(self) -> bool:
        """True when the budget is zero."""
        return (self.sparsity if self.ratio is None else self.ratio) == 0

    def check(self, loaded: LoadedModel) -> None:
        """A decoder LLM as for all weight methods, or a bidirectional encoder of text.

        Raises:
            Refused: it is something else.
        """
        if loaded.anatomy.text_encoder is None:
            super().check(loaded)

    def remaining(self, decoder: Decoder) -> int:
        """Weights of the linear layers that are not zero."""
        return sum(nonzero_weights(layer) for layer in decoder.layers)

    def widths(self, layer: DecoderLayer) -> dict[str, int]:
        """One bar per layer."""
        return {"non-zero weights": nonzero_weights(layer)}

    def selected(self, decoder: Decoder) -> list[LinearPart]:
        """The linears that lose weights."""
        wanted = {"mlp": ("mlp", "down"), "attention": ("attention", "output")}.get(self.matrices)
        return [
            part
            for layer in decoder.layers
            for name, parts in layer.by_input.items()
            if wanted is None or name in wanted
            for part in parts
        ]

    def count(self, decoder: Decoder) -> int:
        """How many weights become zero.

        Raises:
            BadParameter: the selected matrices have no more than that.
        """
        chosen = sum(part.weight.numel() for part in self.selected(decoder))
        if self.ratio is not None:
            return int(chosen * self.ratio)
        total = decoder.prunable_parameters()
        if self.sparsity * total >= chosen:
            raise BadParameter(
                f"{self.slug}: the matrices '{self.matrices}' hold {chosen / total:.0%} of the weights: sparsity must "
                f"be below {chosen / total:.4f} (given: {self.sparsity})"
            )
        return int(total * self.sparsity)

    def domain_and_general(self, work: Work) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows of domain and of general text.

        Raises:
            BadInput: there are fewer than two of either.
        """
        windows, tokenizer = work.windows, work.loaded.tokenizer
        if tokenizer is None:
            raise BadInput(
                f"{work.loaded.ref} has no tokenizer, so {self.slug} cannot tell domain text from other text"
            )
        if self.domain is not None:
            texts = load_texts(self.domain)
            samples, length = windows.shape
            return calibration_windows(tokenizer, texts, samples, length, work.seed), windows
        on_topic = torch.tensor(
            [any(word in text.lower() for word in self.topic) for text in tokenizer.batch_decode(windows)]
        )
        if min(int(on_topic.sum()), int((~on_topic).sum())) < 2:
            raise BadInput(
                f"{int(on_topic.sum())} of {len(windows)} calibration windows are on the topic, and {self.slug} needs "
                "two that are and two that are not: use more windows, other words for topic, or a file for domain"
            )
        return windows[on_topic], windows[~on_topic]

    @torch.no_grad()
    def transform(self, work: Work) -> Facts:
        """Differentiate on both texts, score, zero."""
        decoder, anatomy = work.decoder, work.loaded.anatomy
        parts, count = self.selected(decoder), self.count(decoder)
        if work.windows.shape[1] < 4:
            raise BadInput(f"{self.slug} cuts calibration windows in half: they need at least 4 tokens")
        texts = self.domain_and_general(work)
        domain, general = (
            sum_gradients(
                work.model,
                parts,
                triplets_of(windows, work.loaded.tokenizer).batches(self.batch),
                lambda triplets: contrastive_loss(anatomy, triplets),
                squares=True,
            )
            for windows in texts
        )
        scores = [self.score(part, domain, general) for part in parts]
        kept = self.keep(scores, count)
        replace_weights((part, part.weight * mask) for part, mask in zip(parts, kept, strict=True))
        chosen = sum(score.numel() for score in scores)
        return {
            "zeros among the selected weights": round(count / chosen, 6),
            "domain windows": len(texts[0]),
            "general windows": len(texts[1]),
        }

    def score(self, part: LinearPart, domain: GradientSums, general: GradientSums) -> torch.Tensor:
        """Importance ``[out, in]`` of the weights of one matrix."""
        fisher = [sums.mean_square(part) + 1e-8 for sums in (domain, general)]
        agreement = alignment(general.mean(part), domain.mean(part))
        if self.half_precision:
            agreement, *fisher = (value.half().float() for value in (agreement, *fisher))
        return self.importance(part.weight, fisher[0], fisher[1], agreement)

    def importance(
        self, weight: torch.Tensor, domain: torch.Tensor, general: torch.Tensor, agreement: torch.Tensor
    ) -> torch.Tensor:
        """Domain Alignment Importance; all ``[out, in]``.

        Args:
            weight: of the matrix.
            domain, general: Fisher information on either text.
            agreement: as from ``alignment``.
        """
        size = weight.detach().float().abs()
        benefit = domain * size - self.beta * general * size
        raw = benefit * (1 + 0.2 * agreement).clamp(0.8, 1.2)
        score = functional.softplus(raw + self.compression_weight * (size + 1e-8).sqrt())
        if float(score.std()) < 1e-6:  # so that equal scores do not leave the choice to chance
            score = score * (0.5 + 0.5 * size / (size.mean() + 1e-8))
        match self.postprocess:
            case "zscore_sigmoid":
                return ((score - score.mean()) / (score.std() + 1e-8) / self.temperature).sigmoid()
            case "minmax":
                return (score - score.min()) / (score.max() - score.min() + 1e-8)
            case "rank":
                flat = torch.empty_like(score).flatten()
                flat[score.flatten().argsort()] = torch.arange(1, len(flat) + 1, device=flat.device) / len(
                    flat
                )
                return flat.view_as(score)
        return score

    def keep(self, scores: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
        """Masks of the shapes of ``scores``: all but the ``count`` lowest, in all or shared out by size."""
        if self.strategy == "global":
            flat = torch.cat([score.flatten() for score in scores])
            masks = without_lowest(flat, count).split([score.numel() for score in scores])
        else:
            shares = shared_out([score.numel() for score in scores], count)
            masks = [
                without_lowest(score.flatten(), share) for score, share in zip(scores, shares, strict=True)
            ]
        return [mask.view_as(score) for mask, score in zip(masks, scores, strict=True)]
