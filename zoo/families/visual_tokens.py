"""Family base of methods that shorten the visual part of a vision-language model's sequence."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field

from zoo.engines.reductions import Keep
from zoo.engines.tokens import Positions, Stage, TokenReducer
from zoo.errors import BadInput, Refused
from zoo.interface import Applied, Method, refuse
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy
from zoo.report import Bar, Report


class KeepsShare(BaseModel):
    """Budget of methods that keep a share, or a number, of the visual tokens."""

    keep_ratio: float = Field(0.5, gt=0, le=1, description="Fraction of the visual tokens that stays.")
    keep_tokens: int | None = Field(
        None, ge=1, description="Number of visual tokens that stay; replaces keep_ratio."
    )

    def count(self, tokens: int) -> int:
        """Tokens kept of ``tokens``: ``round(keep_ratio * tokens)`` (half to even), at least 1.

        Raises:
            BadInput: ``keep_tokens`` is more than there are.
        """
        if self.keep_tokens is None:
            return max(1, round(self.keep_ratio * tokens))
        if self.keep_tokens > tokens:
            raise BadInput(f"keep_tokens={self.keep_tokens}, but this input has only {tokens} visual tokens")
        return self.keep_tokens

    @property
    def keeps_all(self) -> bool:
        """True when nothing can leave, so that the method costs nothing."""
        return self.keep_ratio == 1 and self.keep_tokens is None


def keep(index: torch.Tensor) -> Keep:
    """A reduction that keeps the visual tokens ``index [K]`` of one sample, in sequence order."""
    return Keep(index.sort().values.unsqueeze(0))


class VisualTokenReducer(Method):
    """A method that declares stages; see ``zoo.engines.tokens``."""

    phase = "visual-tokens"
    positions: ClassVar[Positions] = "keep"
    """What happens to the position ids of survivors: ``keep`` (gaps stay) or ``renumber``."""

    @abstractmethod
    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """Where tokens leave, and by which rule. An empty list leaves the model as it is."""

    def check(self, loaded: LoadedModel) -> None:
        """Refuse models without visual tokens."""
        anatomy = loaded.anatomy
        if anatomy.kind != "vlm":
            raise refuse(self, "a vision-language model", f"the architecture {anatomy.description}")

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedTokens:
        """Hook ``loaded``; every input that follows is shortened until ``close``."""
        self.check(loaded)
        anatomy = loaded.anatomy
        return AppliedTokens(
            self, loaded, TokenReducer(anatomy, self.stages(anatomy), self.positions, self.slug)
        )


class AppliedTokens(Applied):
    """A token method at work. ``report`` and ``kept`` speak of the latest input."""

    def __init__(self, method: VisualTokenReducer, loaded: LoadedModel, reducer: TokenReducer) -> None:
        super().__init__(method, loaded, reducer.close)
        self.reducer = reducer

    def generate(self, **inputs: Any) -> Any:
        """As ``model.generate``.

        Raises:
            Refused: beam search or a fixed-size cache, which layers of different lengths do not allow.
        """
        config = inputs.get("generation_config") or self.model.generation_config
        if inputs.get("num_beams", config.num_beams) not in (None, 1):
            raise Refused(f"{self.method.name} does not support beam search (num_beams must be 1)")
        return self.model.generate(**inputs)

    @property
    def kept(self) -> dict[int, list[torch.Tensor]]:
        """Original places of surviving visual tokens, per stage layer (-1 = before the LLM) and sample."""
        return self.reducer.kept

    @property
    def report(self) -> Report:
        """Visual tokens per decoder layer of the latest input, averaged over its samples."""
        reducer = self.reducer
        if reducer.visual_per_layer is None or reducer.visual_total is None:
            raise BadInput(f"{self.method.name} has nothing to report: no input has run yet")
        total = reducer.visual_total.float().mean().item()
        layers = reducer.visual_per_layer.float().mean(0).tolist()
        facts: dict[str, float | int | str] = {
            "position ids": "kept" if reducer.positions == "keep" else "renumbered"
        }
        for layer, kept in reducer.kept.items():
            place = "before the LLM" if layer < 0 else f"before layer {layer}"
            facts[f"visual tokens kept {place}"] = round(sum(len(rows) for rows in kept) / len(kept), 2)
        return Report(
            method=self.method.name,
            parameters=self.method.parameters(),
            unit="visual tokens (mean over decoder layers)",
            kept=sum(layers) / len(layers),
            total=total,
            bars={
                "visual tokens": [
                    Bar(label=str(layer), kept=kept, total=total) for layer, kept in enumerate(layers)
                ]
            },
            facts=facts,
        )
