"""Attention Debiasing for Token Pruning in Vision-Language Models (arXiv 2508.17807).

A correction for methods that rank visual tokens by attention. Late tokens receive more attention than early ones,
whatever they show: that trend, an exponential in the token's place, is divided out. Tokens on padding attract
attention although they show nothing: their score is zero. The host then chooses as it always does. What the host sees
is a view whose attention rows are corrected, so it needs to know nothing of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr

from zoo.engines.correction import attention_read, corrected, fit_trend
from zoo.engines.padding import covers_padding, on_padding, touches_padding
from zoo.engines.reductions import Keep, Reduction
from zoo.engines.tokens import Select, Stage, View
from zoo.errors import BadInput, Refused
from zoo.families.visual_tokens import VisualTokenModifier, VisualTokenReducer
from zoo.interface import method, register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy

SIGMA = {"fastv": 0.89, "pyramiddrop": 2.304, "sparsevlm": 1.325}
"""Trends of the released weights: the exponential nearest to the curve for FastV; 576 tokens at a rate of 0.004 and
0.0023 each for PyramidDrop and SparseVLM (GQA)."""
MIDDLE = 1.1
"""Middle of the trends that the paper measures, 0.70 to 1.52; for other hosts."""
FASTV_CURVE = (1.0, 0.869, 0.828, 0.814, 0.787, 0.718, 0.606, 0.476, 0.358)
"""The weights that the authors release for FastV, no exponential, at equal steps from the first token to the last."""


@register("attention-debiasing")
class AttentionDebiasing(VisualTokenModifier):
    """Runs a host on attention without position trend and without padding."""

    sigma: float | None = Field(
        None,
        description="Strength of the trend: attention grows as exp(sigma * i / N) over the N visual tokens of an input "
        "(the release's rate per token, times N). None = as released for fastv, pyramiddrop and sparsevlm, 1.1 for "
        "others; AttentionDebiasing.fit finds it on samples.",
    )
    curve: tuple[float, ...] | None = Field(
        None,
        min_length=2,
        description="Weights of the scores at equal steps from the first token to the last, in place of the trend.",
    )
    padding: Literal["overlap", "coarse", "keep"] = Field(
        "overlap",
        description="Which tokens are padding: those whose patch overlaps it by more than `threshold`; those outside "
        "of a margin in whole patches (the release's baseline); or none.",
    )
    threshold: float = Field(
        0.5, ge=0, le=1, description="Share of padding above which a token counts as padding."
    )
    host: str = Field(
        "fastv", description="Method whose scores are corrected when this one runs alone (not in a stack)."
    )
    host_parameters: dict[str, Any] = Field(
        default_factory=dict, description="Parameters of that method, by name."
    )
    _given: VisualTokenReducer | None = PrivateAttr(None)

    @property
    def hosting(self) -> VisualTokenReducer:
        """The method whose scores are corrected."""
        if self._given is not None:
            return self._given
        host = method(self.host, **self.host_parameters)
        if not isinstance(host, VisualTokenReducer) or not _ranks_by_attention(host):
            raise BadInput(
                f"{self.slug} corrects methods that rank by text-to-vision attention, such as fastv; "
                f"{self.host} does not"
            )
        return host

    @property
    def name(self) -> str:
        """With the host's name in front, in a stack."""
        return self.slug if self._given is None else f"{self._given.name}+{self.slug}"

    def modify(self, host: VisualTokenReducer) -> VisualTokenReducer | None:
        """This method on ``host``; ``None`` for hosts that do not rank by the attention of text."""
        if not _ranks_by_attention(host):
            return None
        own = self.model_copy(update={"host": host.slug, "host_parameters": host.parameters()})
        own._given = host
        return own

    def check(self, loaded: LoadedModel) -> None:
        """Ask the host as well."""
        super().check(loaded)
        self.hosting.check(loaded)

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """Those of the host, on corrected views."""
        host = self.hosting
        return [
            replace(
                stage,
                reduce=partial(self.reduce, stage.reduce),
                positions=stage.positions or host.positions,
            )
            for stage in host.stages(anatomy)
        ]

    def reduce(self, choose: Select, view: View) -> Reduction:
        """What the host chooses for one sample, less the padding that it chose for want of better tokens."""
        if view.memory.get(self.slug) == "merged":  # tokens of several places have no place in the trend
            return choose(view)
        content = self.content(view)
        weight = self.weights(view.ordinal, view.total)
        asked = []

        def correct(attention: torch.Tensor) -> torch.Tensor:
            asked.append(True)
            columns = debiased(attention[..., view.index], weight, content)
            return attention.index_copy(-1, view.index, columns)

        reduction = choose(corrected(view, correct))
        if not asked and view.layer > 0:
            raise Refused(
                f"{self.hosting.slug} does not rank by rows of attention, which is what {self.slug} corrects"
            )
        if not isinstance(reduction, Keep):
            view.memory[self.slug] = "merged"
            return reduction
        shown = content[reduction.index[0]]
        return reduction if bool(shown.all()) else Keep(reduction.index[:, shown])

    def weights(self, ordinal: torch.Tensor, total: int) -> torch.Tensor:
        """What the scores of the tokens numbered ``ordinal [N]`` among ``total`` are multiplied by, ``[N]`` float32."""
        place = ordinal.double() / total
        if self.curve is None:
            sigma = SIGMA.get(self.hosting.slug, MIDDLE) if self.sigma is None else self.sigma
            return (-sigma * place).exp().float()
        curve = torch.tensor(self.curve, dtype=torch.float64, device=place.device)
        step = place * (len(curve) - 1)
        left = step.long()
        return curve[left].lerp(curve[left + 1], step - left).float()

    def content(self, view: View) -> torch.Tensor:
        """Tokens that show something, ``[N]`` bool; the others lie on the padding around a picture."""
        if self.padding == "keep":
            return torch.ones_like(view.index, dtype=torch.bool)
        return ~on_padding(view, self.padded)

    def padded(self, width: int, height: int, grid: int) -> torch.Tensor:
        """1 for the padding cells of a ``grid x grid`` over a picture padded to a square, ``[grid, grid]`` float32."""
        if self.padding == "coarse":
            return touches_padding(width, height, grid)
        return (covers_padding(width, height, grid) > self.threshold).float()

    @classmethod
    def fit(
        cls,
        loaded: LoadedModel,
        samples: Iterable[Mapping[str, Any]],
        *,
        host: str = "fastv",
        host_parameters: Mapping[str, Any] | None = None,
    ) -> AttentionDebiasing:
        """The method with the trend that the scores of ``host`` have on average over some samples.

        Args:
            loaded: a vision-language model, without hooks of other methods.
            samples: inputs as the processor makes them.
            host: method whose scores are to be corrected.
            host_parameters: its parameters.

        Raises:
            BadInput: no sample, or the host does not rank by the attention of text.
        """
        own = cls(host=host, host_parameters=dict(host_parameters or {}))
        seen = attention_read(cls.slug, loaded, own.hosting.stages(loaded.anatomy), samples)
        return own.model_copy(update={"sigma": fit_trend(*seen)})


def debiased(attention: torch.Tensor, weight: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """``weight * (attention * content)`` on the last dimension, in float32: ``[..., N]``."""
    return weight.to(attention.device) * (attention.float() * content)


def _ranks_by_attention(host: VisualTokenReducer) -> bool:
    if isinstance(host, AttentionDebiasing):
        return False
    return "text-to-vision-attention" in host.card().terms("signal")
