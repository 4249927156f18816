"""VTW, Visual Tokens Withdrawal: rapid inference of multimodal LLMs (arXiv 2405.05803, AAAI 2025).

In front of one decoder layer K all visual tokens leave; deeper layers run on the text alone. Nothing is scored while
the model runs: K is chosen once per model and task, as the first layer whose withdrawal changes the next-token
distribution by less than a KL threshold, over a few samples (``VTW.fit``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch.nn import functional as F

from zoo.engines.branching import Branches
from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, View
from zoo.errors import BadInput
from zoo.families.visual_tokens import VisualTokenReducer
from zoo.interface import register
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy

FIRST_CANDIDATE = 5
"""First layer that the search tries (the release's own)."""
ETA = 0.003
"""Largest mean KL divergence of a layer that is chosen. The release sets 0.003 for LLaVA-1.5-7B, 0.0005 for its 13B
and 0.0001 for LLaVA-NeXT-7B."""


@register("vtw")
class VTW(VisualTokenReducer):
    """Withdraws all visual tokens in front of one layer."""

    layer: int | None = Field(
        None,
        ge=1,
        description="First decoder layer without visual tokens (the paper's K), counted from 0. None = half of the "
        "depth: 16 of 32 and 20 of 40, as in the release; VTW.fit finds it on samples.",
    )
    position_ids: Positions = Field(
        "keep",
        description="What happens to the positions of the text from `layer` on: keep (a gap stays) or renumber.",
    )

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """One stage in front of layer K."""
        assert anatomy.decoder is not None
        layer = max(1, len(anatomy.decoder.layers) // 2) if self.layer is None else self.layer
        return [Stage(layer, self.select, positions=self.position_ids)]

    def select(self, view: View) -> Keep:
        """No token of the sample."""
        return Keep(view.index.new_empty(1, 0))

    @classmethod
    def fit(
        cls,
        loaded: LoadedModel,
        samples: Iterable[Mapping[str, Any]],
        *,
        eta: float = ETA,
        first: int = FIRST_CANDIDATE,
    ) -> VTW:
        """The method at the first layer whose withdrawal changes the next-token distribution by at most ``eta``.

        Each prompt runs once; every candidate continues from what entered its layer, on the text alone.

        Args:
            loaded: a vision-language model, without hooks of other methods.
            samples: inputs of one sample each, as the processor makes them; the paper uses 20.
            eta: threshold on the mean KL divergence, in nats.
            first: first candidate; later ones follow up to the last layer.

        Raises:
            BadInput: no sample, no candidate, or no layer meets ``eta``.
        """
        rows = []
        for sample in samples:
            branches = Branches(loaded, sample, cls.slug)
            if not 1 <= first < branches.depth:
                raise BadInput(
                    f"vtw: first={first}, but this model has layers 1..{branches.depth - 1} to withdraw at"
                )
            text = branches.text.unsqueeze(0)
            withdrawn = [branches.logits_from(layer, text) for layer in range(first, branches.depth)]
            rows.append(withdrawal_divergence(branches.logits, torch.cat(withdrawn)))
        if not rows:
            raise BadInput("vtw: fitting needs at least one sample")
        return cls(layer=first_below(torch.stack(rows), eta, first))


def withdrawal_divergence(full: torch.Tensor, withdrawn: torch.Tensor) -> torch.Tensor:
    """``KL(withdrawn || full)`` between next-token distributions, in nats, ``[C]`` float32.

    Args:
        full: logits of the whole prompt, ``[V]``.
        withdrawn: logits when the visual tokens leave in front of each candidate layer, ``[C, V]``.
    """
    log_full = full.float().log_softmax(-1).expand(withdrawn.shape)
    return F.kl_div(log_full, withdrawn.float().softmax(-1), reduction="none").sum(-1)


def first_below(divergence: torch.Tensor, eta: float, first: int) -> int:
    """First candidate layer whose mean ``divergence [samples, C]`` is at most ``eta``; column 0 is layer ``first``.

    Raises:
        BadInput: there is none.
    """
    mean = divergence.double().mean(0)
    fitting = (mean <= eta).nonzero()
    if not len(fitting):
        best = int(mean.argmin())
        raise BadInput(
            f"vtw: no layer has a mean KL divergence of {eta:g} or less; the smallest is {float(mean[best]):.3g} at "
            f"layer {first + best}: raise eta"
        )
    return first + int(fitting[0])
