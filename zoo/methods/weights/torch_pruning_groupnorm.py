"""DepGraph's group norms: what must leave together is scored by the norm of all its weights, without any data.

Fang et al.: DepGraph: Towards Any Structural Pruning, CVPR 2023 (arXiv 2301.12900), and its library Torch-Pruning. The
weights that a channel consists of, over all coupled layers, are summed as ``|w|^p`` per layer, reduced over the layers,
and normalised over the channels of the group, so that groups can be compared; heads score the mean of their channels.
Groups are those of a decoder (heads, FFN channels, the residual stream), read off its anatomy rather than traced.

Sparse training (Sec. 3.3; ``zoo train torch-pruning-groupnorm``): with ``I_c`` the norm of channel ``c``, every weight
of it decays with ``gamma_c = alpha^((max I - I_c) / (max I - min I))``, the weak ones fastest; then the model is
pruned. Training the result once more fine-tunes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from zoo.engines.coupling import Group, Reduction, layer_groups, residual_group
from zoo.engines.language_modelling import causal_lm_loss
from zoo.engines.residual_width import keep_residual_channels
from zoo.engines.shapes import highest
from zoo.engines.surgery import share_parameters
from zoo.engines.training import Loss, Recipe
from zoo.errors import BadParameter, Refused
from zoo.families.group_pruning import GroupPruner, Size
from zoo.families.retraining import Retraining
from zoo.families.weights import AppliedPruning, Facts, Work
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder
from zoo.report import Report
from zoo.training import Setting

Normaliser = Literal["mean", "sum", "max", "standardise", "gaussian", "lamp", "none"]


@register("torch-pruning-groupnorm")
class GroupNorm(Retraining, GroupPruner):
    """Structured pruning by group norms, with sparse training before it and fine-tuning after it."""

    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-4, warmup=0.05, batch=8)

    p: float = Field(2.0, gt=0, description="Exponent of the norm.")
    reduction: Reduction = Field("mean", description="How the norms of coupled layers become one.")
    normaliser: Normaliser = Field(
        "mean", description="What makes the scores of different groups comparable."
    )
    residual_ratio: float = Field(
        0.0, ge=0, lt=1, description="Fraction of the residual stream's channels to remove as well."
    )
    regularisation: float = Field(1e-4, ge=0, description="Sparse training: strength of the decay.")
    alpha: float = Field(
        16.0, ge=1, description="Sparse training: the weakest channel decays so much faster."
    )

    @property
    def removes_nothing(self) -> bool:
        """True when both budgets are zero."""
        return super().removes_nothing and self.residual_ratio == 0

    def check(self, loaded: LoadedModel) -> None:
        """As all weight methods; and the residual stream can be cut, if it shall be.

        Raises:
            Refused: it is something else.
        """
        super().check(loaded)
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        sliced = any(layer.attention_shortcut is not None for layer in decoder.layers)
        if self.residual_ratio and (sliced or loaded.anatomy.kind != "decoder"):
            raise Refused(
                f"{self.slug} can narrow the residual stream of a plain decoder LLM only: set residual_ratio=0 for "
                f"this {loaded.anatomy.description}"
            )

    def channel_scores(self, group: Group) -> torch.Tensor:
        """Normalised norms ``[channels]`` float32."""
        norms = group.scores(
            lambda member: member.per_channel(member.weight.detach().float().abs().pow(self.p)),
            self.reduction,
        )
        return normalise(norms, self.normaliser)

    def score(self, work: Work, groups: Sequence[Group]) -> list[torch.Tensor]:
        """Mean over the channels of each unit."""
        return [self.channel_scores(group).view(group.units, group.block).mean(1) for group in groups]

    def units_removed(self, size: Size, ratio: float) -> int:
        """All but ``int(units (1 - ratio))``."""
        return size.units - int(size.units * (1 - ratio))

    def residual_kept(self, decoder: Decoder) -> int:
        """Channels of the residual stream that stay, at least one."""
        return max(1, int(decoder.hidden_size * (1 - self.residual_ratio)))

    def due(self, decoder: Decoder) -> float:
        """What a narrower residual stream, which every matrix has on one side, leaves of the budget.

        Raises:
            BadParameter: nothing.
        """
        kept = self.residual_kept(decoder) / decoder.hidden_size
        if kept < 1 - self.sparsity:
            raise BadParameter(
                f"{self.slug}: the residual stream alone takes {1 - kept:.1%} of the weights, more than sparsity "
                f"{self.sparsity}; lower residual_ratio"
            )
        return 1 - (1 - self.sparsity) / kept

    def transform(self, work: Work) -> Facts:
        """Heads and channels; then the residual stream, by scores of the uncut model too."""
        if not self.residual_ratio:
            return super().transform(work)
        with torch.no_grad():
            scores = self.channel_scores(residual_group(work.decoder))
        kept = highest(scores, self.residual_kept(work.decoder))
        facts = super().transform(work)
        keep_residual_channels(work.decoder, kept)
        return {**facts, "residual channels removed": int((~kept).sum())}

    def penalty(self, decoder: Decoder) -> torch.Tensor:
        """Half the decayed squares, 0-d: its gradient by a weight of channel ``c`` is ``reg * gamma_c * w``."""
        groups = layer_groups(decoder)
        if self.residual_ratio:
            groups.append(residual_group(decoder))
        total = torch.zeros((), device=decoder.embed.weight.device)
        for group in groups:
            squares = group.scores(lambda member: member.per_channel(member.weight.float().square()), "sum")
            norm = squares.detach().sqrt()
            span = (norm.max() - norm.min()).clamp(min=torch.finfo(norm.dtype).tiny)
            total = total + (self.alpha ** ((norm.max() - norm) / span) * squares).sum()
        return self.regularisation / 2 * total

    def batch_loss(self, given: LoadedModel, learning: LoadedModel, batch: dict[str, torch.Tensor]) -> Loss:
        """Next tokens; and the penalty, as long as the model is not pruned."""
        text = causal_lm_loss(learning.model, batch)
        if _record(given) is not None:
            return text
        decoder = learning.anatomy.decoder
        assert decoder is not None
        penalty = self.penalty(decoder) * text.terms  # the loop divides by the terms
        return Loss(text.total + penalty, text.terms, {"text": text.total, "group norms": penalty})

    def begin(
        self, loaded: LoadedModel, setting: Setting
    ) -> tuple[LoadedModel, Callable[[], AppliedPruning]]:
        """A copy; it is pruned in the end, unless it was at first.

        Raises:
            Refused: another method has pruned the model.
        """
        model = share_parameters(loaded.model)
        learning = LoadedModel(model, loaded.processor, loaded.ref, loaded.revision, dict(loaded.facts))
        record = _record(loaded)
        if record is None:
            return learning, lambda: self.apply(learning, seed=setting.seed, inplace=True)
        if record.get("method") != self.slug:
            raise Refused(
                f"{self.slug} trains dense models, and those that it pruned itself; {loaded.ref} was pruned by "
                f"{record.get('method')}"
            )
        report = Report.model_validate(record["report"])
        return learning, lambda: AppliedPruning(self, learning, report)


def _record(loaded: LoadedModel) -> dict[str, object] | None:
    """What pruned the model before, if it was loaded pruned."""
    record: dict[str, object] | None = loaded.facts.get("pruning")
    return record


def normalise(scores: torch.Tensor, normaliser: Normaliser) -> torch.Tensor:
    """``scores [n]`` of one group on a scale that groups have in common.

    ``standardise`` maps them to 0 to 1, ``gaussian`` to zero mean and unit deviation; ``lamp`` divides each by the sum
    of those that are not lower (Lee et al., arXiv 2010.07611).
    """
    match normaliser:
        case "mean":
            return scores / scores.mean()
        case "sum":
            return scores / scores.sum()
        case "max":
            return scores / scores.max()
        case "standardise":
            return (scores - scores.min()) / (scores.max() - scores.min() + 1e-8)
        case "gaussian":
            return (scores - scores.mean()) / (scores.std() + 1e-8)
        case "lamp":
            ranked, order = scores.sort(descending=True)
            return torch.empty_like(scores).index_put_((order,), ranked / ranked.cumsum(0))
        case "none":
            return scores
