"""Self-speculation: the model drafts for itself with some of its layers left out, and the whole model verifies.

Three papers, one idea. Zhang et al., "Draft & Verify" (2309.08168), search the attention and feed-forward blocks to
skip beforehand and let the draft's confidence end it. Xia et al., "SWIFT" (2410.06916), find them while generating and
verify a tree. Elhoushi et al., "LayerSkip" (2404.16710), leave the model early; that takes a model trained for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from zoo.engines.drafting import Draft, Row
from zoo.engines.sampling import draw
from zoo.engines.self_drafting import SelfDrafter, halves
from zoo.engines.surgery import Block
from zoo.errors import BadParameter
from zoo.families.decoding import BudgetedDecoder
from zoo.interface import refuse, register
from zoo.methods.decoding._draft_and_verify import DraftAndVerifyDrafter, quickest_blocks
from zoo.methods.decoding._swift import SearchSettings, SwiftDrafter
from zoo.models import anatomy

if TYPE_CHECKING:
    from zoo.models import LoadedModel

LENGTHS = {"draft-and-verify": 8, "swift": 25, "layer-skip": 6}
"""Longest drafts in the official codes."""


class EarlyExitDrafter(SelfDrafter):
    """Drafts with the first layers, the final norm and the head; when sampling it draws."""

    def __init__(self, decoder: anatomy.Decoder, exit_layer: int, draft_tokens: int) -> None:
        super().__init__(decoder, halves(range(exit_layer, len(decoder.layers))), draft_tokens)
        self._laws: dict[int, list[torch.Tensor]] = {}

    def propose(self, rows: Sequence[Row]) -> list[Draft]:
        """Draft, and remember what was drawn from when sampling."""
        self._laws = {row.index: [] for row in rows}
        return super().propose(rows)

    def choose(self, row: Row, draft: list[int], logits: torch.Tensor) -> tuple[int, bool]:
        """The likeliest token, or one drawn; drafts have a fixed length."""
        scores = self.scores(row, draft, logits)
        assert self.context is not None
        if not self.context.sample:
            return int(scores.argmax()), True
        law = scores.softmax(-1)
        self._laws[row.index].append(law)
        return draw(law), True

    def draft(self, row: Row, tokens: list[int]) -> Draft:
        """The chain, with the laws of what was drawn."""
        laws = self._laws[row.index]
        return Draft(tokens, laws=torch.stack(laws) if laws else None)


@register("layer-skip-self-speculation")
class LayerSkipSelfSpeculation(BudgetedDecoder):
    """Drafts with the model itself, some of its layers left out; no second model and no training is needed."""

    variant: Literal["draft-and-verify", "swift", "layer-skip"] = Field(
        "swift",
        description="Which paper: blocks to skip searched beforehand, found while generating, or an early exit.",
    )
    draft_tokens: int | None = Field(
        None, ge=1, le=256, description="Longest draft; default 8, 25 and 6 in the order of the variants."
    )
    threshold: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Confidence below which a draft ends (not for layer-skip; draft-and-verify adapts it).",
    )
    skip_attention: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="draft-and-verify: layers whose attention is skipped; default every odd layer but the last.",
    )
    skip_mlp: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="draft-and-verify: layers whose feed-forward block is skipped; the same default."
    )
    exit_layer: int | None = Field(
        None, ge=1, description="layer-skip: layers that draft; default a quarter of them."
    )
    skip_ratio: float = Field(
        0.45, ge=0, le=1, description="swift: share of the blocks skipped, first and last layer not counted."
    )
    context_window: int = Field(50, ge=1, description="swift: generated tokens on which sets are judged.")
    bayes_interval: int = Field(
        25, ge=1, description="swift: one set in so many is proposed by Bayesian optimisation."
    )
    search_iterations: int = Field(1000, ge=0, description="swift: sets tried at most.")
    search_patience: int = Field(300, ge=1, description="swift: sets tried without an improvement.")
    search_target: float = Field(
        0.93, ge=0, le=1, description="swift: agreement above which the search ends."
    )

    def check(self, loaded: LoadedModel) -> None:
        """Refuse what has no layers to skip, or a cache that cannot take drafts back in some layers only."""
        super().check(loaded)
        decoder = loaded.anatomy.decoder
        if decoder is None or loaded.anatomy.kind != "decoder":
            raise refuse(self, "a text-only decoder", loaded.anatomy.description)
        if len(decoder.layers) < 3:
            raise refuse(self, "3 layers or more", str(len(decoder.layers)))
        types = getattr(decoder.config, "layer_types", None) or []
        window = None if types else getattr(decoder.config, "sliding_window", None)
        if window or any(kind != "full_attention" for kind in types):
            raise refuse(self, "full attention in every layer", "layers with a sliding window")

    def drafter(self, loaded: LoadedModel, **resources: Any) -> SelfDrafter:
        """The drafter of the variant.

        Raises:
            BadParameter: a layer that the model does not have.
        """
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        layers = len(decoder.layers)
        length = self.draft_tokens or LENGTHS[self.variant]
        if self.variant == "swift":
            names = SearchSettings.__dataclass_fields__
            settings = SearchSettings(**{name: getattr(self, name) for name in names})
            return SwiftDrafter(decoder, length, self.threshold, settings)
        if self.variant == "layer-skip":
            exit_layer = self.exit_layer or max(1, layers // 4)
            if exit_layer >= layers:
                raise BadParameter(f"{self.slug}: exit_layer must be below the model's {layers} layers")
            return EarlyExitDrafter(decoder, exit_layer, length)
        every_other = tuple(range(1, layers - 1, 2))
        attention = every_other if self.skip_attention is None else self.skip_attention
        mlp = every_other if self.skip_mlp is None else self.skip_mlp
        if max((*attention, *mlp), default=0) >= layers:
            raise BadParameter(f"{self.slug}: layers to skip must be below the model's {layers} layers")
        skipped = {
            *(Block(index, "attention") for index in attention),
            *(Block(index, "mlp") for index in mlp),
        }
        return DraftAndVerifyDrafter(decoder, skipped, length, self.threshold)

    @classmethod
    def fit(
        cls,
        loaded: LoadedModel,
        samples: Iterable[Mapping[str, Any]],
        *,
        calls: int = 200,
        initial: int = 20,
        new_tokens: int = 32,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **parameters: Any,
    ) -> LayerSkipSelfSpeculation:
        """Draft & Verify's search: the blocks without which generation takes the least time per token.

        Args:
            loaded: the model, on the device it is meant for.
            samples: inputs of one prompt each.
            calls: sets tried, each on all samples (1000 in the paper).
            initial: how many of them are random.
            new_tokens: generated per prompt.
            seed: of the search. Times are measured, so that two searches may still differ.
            progress: called with the sets tried and their number.
            parameters: other fields of the method.

        Raises:
            BadInput: no sample.
        """

        def method(**skip: tuple[int, ...]) -> LayerSkipSelfSpeculation:
            return cls(**{**parameters, **skip, "variant": "draft-and-verify"})

        best = quickest_blocks(
            loaded,
            list(samples),
            method,
            calls=calls,
            initial=initial,
            new_tokens=new_tokens,
            seed=seed,
            progress=progress,
        )
        return method(**best)
