"""Encoder-token methods on the vision tower of a vision-language model.

Where every patch becomes one visual token (LLaVA), what the encoder merged or dropped need not come back: encoder,
projector and language model all run on fewer tokens. Where the projector folds neighbouring patches into one token
(InternVL) it needs the full grid, and ``restore`` brings it back behind the last block that is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from zoo.engines.blocks import BlockReducer
from zoo.engines.reductions import Join
from zoo.engines.short_encoder import ShortEncoder
from zoo.engines.tokens import Stage, TokenReducer, View
from zoo.errors import Refused
from zoo.families.visual_tokens import AppliedTokens
from zoo.interface import Method
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy
from zoo.report import Report


def check_short_tower(method: Method, anatomy: Anatomy, *, whole_patches: bool) -> None:
    """Refuse, when nothing is restored, what needs every patch behind the encoder.

    Args:
        method: for the message.
        anatomy: of a vision-language model.
        whole_patches: the method never shares a patch out among several tokens.
    """
    encoder, projector = anatomy.encoder, anatomy.projector
    assert encoder is not None
    linear = (
        next((part for part in projector.modules() if isinstance(part, nn.Linear)), None)
        if projector
        else None
    )
    if not whole_patches:
        reason = "shares patches out among several tokens, which leaves no token its own place in the prompt"
    elif linear is None or linear.in_features != encoder.hidden_size:
        reason = "would leave holes in the patches that this model's projector folds together"
    elif encoder.prefix and not anatomy.drops_cls:
        reason = "needs a model that does not project [CLS]"
    else:
        return
    raise Refused(f"{method.slug} {reason}: set restore=true")


class AppliedTower(AppliedTokens):
    """An encoder method at work that shortens encoder, projector and language model alike.

    Args:
        method, loaded: as for any applied method.
        tower: the encoder, shortened already; closed with this.
        facts: what the method says of its own in the report.
    """

    def __init__(
        self,
        method: Method,
        loaded: LoadedModel,
        tower: ShortEncoder,
        facts: Callable[[BlockReducer], dict[str, float | int | str]],
    ) -> None:
        try:
            stage = Stage(-1, one_per_token)
            reducer = TokenReducer(loaded.anatomy, [stage], "keep", method.slug, encoder=tower)
        except BaseException:
            tower.close()
            raise
        super().__init__(method, loaded, reducer)
        self._tower, self._facts = tower, facts

    @property
    def report(self) -> Report:
        """Visual tokens per decoder layer, encoder tokens per block, and the method's own figures."""
        report = super().report
        return report.model_copy(update={"facts": {**report.facts, **self._facts(self._tower.blocks)}})


def one_per_token(view: View) -> Join:
    """One visual token for each token that the encoder left, in the place of the first patch it holds.

    Patches of one encoder token have equal features, so their mean is that token. Newline tokens stay.
    """
    names = torch.arange(len(view.tokens), device=view.index.device)  # a newline is itself
    start = len(names)
    for image in view.images:
        slots = view.encoder_slots(image)
        crops = torch.arange(len(slots), device=slots.device).unsqueeze(1)
        held = torch.where(slots < 0, -1, start + slots + crops * slots.shape[1]).flatten()
        start += held.numel()
        made = image.crop >= 0
        names[image.tokens[made]] = held[image.patches[made, 0].clamp(min=0)]
    there = (names >= 0).nonzero().squeeze(-1)
    _, group = names[there].unique(return_inverse=True)
    first = there.new_zeros(int(group.max()) + 1)
    first = first.scatter_reduce(0, group, there, "amin", include_self=False)
    anchor = first.sort().values
    rank = first.argsort().argsort()
    joins = first[group] != there
    return Join(
        anchor.unsqueeze(0), there[joins].unsqueeze(0), rank[group[joins]].unsqueeze(0), len(view.tokens)
    )
