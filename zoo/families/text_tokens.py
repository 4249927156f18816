"""Family base of methods that make text models attend less: fewer tokens, heads and cache entries, chosen per input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.engines.key_eviction import KeyEviction
from zoo.errors import BadInput, Refused
from zoo.interface import Applied, Method, refuse
from zoo.models import LoadedModel
from zoo.models.anatomy import Decoder, TextEncoder
from zoo.report import Bar, Report


class TextTokenMethod(Method):
    """A method for models whose keys hold no rotary positions, one for each head: BERT and GPT-2."""

    phase = "cache"

    def check(self, loaded: LoadedModel) -> None:
        """Refuse all other models."""
        anatomy = loaded.anatomy
        needs = "a BERT- or GPT-2-like text model"
        if anatomy.kind not in ("decoder", "embedding"):
            raise refuse(self, needs, f"the architecture {anatomy.description}")
        body = text_body(loaded)
        if body.rotary is not None or any(layer.attention.group != 1 for layer in body.layers):
            raise refuse(self, needs, f"rotary positions or grouped key-value heads ({anatomy.description})")


def text_body(loaded: LoadedModel) -> Decoder | TextEncoder:
    """The layers of a text model.

    Raises:
        Refused: it has none.
    """
    body = loaded.anatomy.decoder or loaded.anatomy.text_encoder
    if body is None:
        raise Refused(f"{loaded.anatomy.description} has no text layers")
    return body


class AppliedText(Applied):
    """A method at work on a text model. ``report`` speaks of the latest input, also after ``close``.

    Args:
        method, loaded, undo: as in :class:`zoo.interface.Applied`.
        bars: what each layer had, by the name of the quantity, and how much it would have had; the first one is the
            canonical budget.
        facts: other figures.
    """

    def __init__(
        self,
        method: Method,
        loaded: LoadedModel,
        undo: Callable[[], None],
        bars: Callable[[], dict[str, tuple[list[float], float]]],
        facts: Callable[[], dict[str, float | int | str]],
    ) -> None:
        super().__init__(method, loaded, undo)
        self._bars = bars
        self._facts = facts

    def generate(self, **inputs: Any) -> Any:
        """As ``model.generate``.

        Raises:
            BadInput: the model writes no text.
            Refused: beam search, or a prompt read in chunks.
        """
        name = self.method.name
        if not hasattr(self.model, "generate") or self.loaded.anatomy.kind == "embedding":
            raise BadInput(f"{self.loaded.ref} writes no text: call it instead")
        config = inputs.get("generation_config") or self.model.generation_config
        if inputs.get("num_beams", config.num_beams) not in (None, 1):
            raise Refused(f"{name} does not support beam search (num_beams must be 1)")
        if inputs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)):
            raise Refused(f"{name} must see the whole prompt at once: leave prefill_chunk_size unset")
        return self.model.generate(**inputs)

    @property
    def report(self) -> Report:
        """What each layer had of the latest input, mean over its samples.

        Raises:
            BadInput: nothing has run yet.
        """
        bars = self._bars()
        unit, (kept, total) = next(iter(bars.items()))
        return Report(
            method=self.method.name,
            parameters=self.method.parameters(),
            unit=f"{unit} (mean over layers)",
            kept=sum(kept) / len(kept),
            total=total,
            bars={
                name: [Bar(label=str(layer), kept=count, total=of) for layer, count in enumerate(counts)]
                for name, (counts, of) in bars.items()
            },
            facts=self._facts(),
        )


class AppliedTurns(AppliedText):
    """A method that makes room in the cache between the turns of a chat."""

    def __init__(
        self,
        method: Method,
        loaded: LoadedModel,
        eviction: KeyEviction,
        bars: Callable[[], dict[str, tuple[list[float], float]]],
    ) -> None:
        super().__init__(method, loaded, eviction.close, bars, dict)
        self.eviction = eviction

    def generate(self, **inputs: Any) -> Any:
        """As ``model.generate``; a later turn gives the whole conversation as ``input_ids`` and its cache.

        Generation takes the length of a cache for the number of tokens it has read, which is no longer so.
        """
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        read = 0 if cache is None else self.eviction.read_into(cache)
        if ids is None or not 0 < read < ids.shape[1]:
            return super().generate(**inputs)
        # A mask longer than the ids says that they are the new ones alone.
        turn = {"input_ids": ids[:, read:], "attention_mask": torch.ones_like(ids)}
        found = super().generate(**{**inputs, **turn})
        if isinstance(found, torch.Tensor):
            return torch.cat((ids[:, :read], found), dim=1)
        found.sequences = torch.cat((ids[:, :read], found.sequences), dim=1)
        return found
