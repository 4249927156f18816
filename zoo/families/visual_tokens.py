"""Family base of methods that shorten the visual part of a vision-language model's sequence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field, PrivateAttr

from zoo.engines.blocks import BlockStage
from zoo.engines.reductions import Keep
from zoo.engines.scattering import Scatter
from zoo.engines.tokens import Positions, Stage, TokenReducer
from zoo.errors import BadInput, Refused
from zoo.interface import Applied, Method, refuse
from zoo.models import LoadedModel
from zoo.models.anatomy import Anatomy
from zoo.report import Bar, Report

CACHED = "visual tokens left in the cache"
"""Bars of a report, beside those of the tokens that each layer saw, when caches were cut after the prompt."""
ENCODED = "encoder tokens per crop"
"""Bars of a report, when the vision encoder ran short."""


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

    def share(self, tokens: int) -> float:
        """The budget as a fraction of ``tokens``, for methods whose count follows from their input.

        Raises:
            BadInput: ``keep_tokens`` is more than there are.
        """
        return self.keep_ratio if self.keep_tokens is None else self.count(tokens) / tokens

    @property
    def keeps_all(self) -> bool:
        """True when nothing can leave, so that the method costs nothing."""
        return self.keep_ratio == 1 and self.keep_tokens is None


def keep(index: torch.Tensor) -> Keep:
    """A reduction that keeps the visual tokens ``index [K]`` of one sample, in sequence order."""
    return Keep(index.sort().values.unsqueeze(0))


def in_proportion(layers: Sequence[int], depth: int, of: int = 32) -> tuple[int, ...]:
    """Layer numbers made for a decoder of ``of`` layers, moved in proportion to one of ``depth``; still ascending.

    Numbers stay as they are when the depths agree. A shallow decoder may run out of layers: the last numbers are then
    too large, and the reducer refuses them.
    """
    moved: list[int] = []
    for layer in layers:
        moved.append(max(round(layer * depth / of), moved[-1] + 1 if moved else 0))
    return tuple(moved)


class VisualTokenReducer(Method):
    """A method that declares stages; see ``zoo.engines.tokens``."""

    phase = "visual-tokens"
    positions: ClassVar[Positions] = "keep"
    """What happens to the position ids of survivors: ``keep`` (gaps stay) or ``renumber``."""
    engine: ClassVar[type[TokenReducer]] = TokenReducer
    """Runs the stages. A stack takes one method with an engine of its own."""

    @abstractmethod
    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """Where tokens leave, and by which rule. An empty list leaves the model as it is."""

    def encoder_stages(self, anatomy: Anatomy) -> list[BlockStage]:
        """Where patches leave inside the vision encoder; see ``zoo.families.visual_tokens_in_encoder``."""
        return []

    def check(self, loaded: LoadedModel) -> None:
        """Refuse models without visual tokens."""
        anatomy = loaded.anatomy
        if anatomy.kind != "vlm":
            raise refuse(self, "a vision-language model", f"the architecture {anatomy.description}")

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedTokens:
        """Hook ``loaded``; every input that follows is shortened until ``close``."""
        self.check(loaded)
        anatomy = loaded.anatomy
        stages, inside_encoder = self.stages(anatomy), self.encoder_stages(anatomy)
        reducer = self.engine(anatomy, stages, self.positions, self.slug, inside_encoder)
        return AppliedTokens(self, loaded, reducer)

    @classmethod
    def combine(cls, methods: Sequence[Method]) -> Method:
        """Their stages in one reducer: each method finds what those before it have left."""
        reducers = _modified([method for method in methods if isinstance(method, VisualTokenReducer)])
        if len(reducers) == 1:
            return reducers[0]
        joined = JoinedReducers()
        joined._methods = tuple(reducers)
        return joined


class VisualTokenModifier(VisualTokenReducer):
    """A method that changes how another one, its *host*, chooses: ``fastv+attention-debiasing``."""

    @abstractmethod
    def modify(self, host: VisualTokenReducer) -> VisualTokenReducer | None:
        """The host, modified; ``None`` when it is not of a kind that can be."""


def _modified(reducers: list[VisualTokenReducer]) -> list[VisualTokenReducer]:
    """The methods that are no modifiers, each as the modifiers that fit it make it.

    Raises:
        BadInput: a modifier finds no host.
    """
    hosts = [method for method in reducers if not isinstance(method, VisualTokenModifier)]
    for modifier in reducers:
        if not isinstance(modifier, VisualTokenModifier):
            continue
        changed = [modifier.modify(host) for host in hosts]
        if all(new is None for new in changed):
            raise BadInput(
                f"{modifier.slug} changes how another method chooses, and "
                f"{' and '.join(host.slug for host in hosts) or 'there is no other method that'} cannot be changed "
                "by it; stack it on one that ranks by text-to-vision attention, such as fastv"
            )
        hosts = [host if new is None else new for host, new in zip(hosts, changed, strict=True)]
    return hosts


class JoinedReducers(VisualTokenReducer):
    """Several visual-token methods whose stages stand at different places."""

    _methods: tuple[VisualTokenReducer, ...] = PrivateAttr(default=())

    @property
    def name(self) -> str:
        """Names joined by ``+``."""
        return "+".join(method.name for method in self._methods)

    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters of each method, by slug."""
        return {method.slug: method.parameters() for method in self._methods}

    def check(self, loaded: LoadedModel) -> None:
        """Ask every method; then refuse two that claim the same place, the encoder, or an engine of their own."""
        for method in self._methods:
            method.check(loaded)
        special = [method.slug for method in self._methods if method.engine is not TokenReducer]
        if len(special) > 1:
            raise Refused(f"{' and '.join(special)} both bring tokens back inside the LLM: take one of them")
        self.stages(loaded.anatomy)
        self.encoder_stages(loaded.anatomy)

    def stages(self, anatomy: Anatomy) -> list[Stage]:
        """All stages, in order of depth.

        Raises:
            Refused: two methods have a stage at the same place, one looks at a layer that another one's stage
                separates from its own, or one brings back what another one has removed.
        """
        found: list[Stage] = []
        for number in range(len(self._methods)):
            found += self.stages_of(number, anatomy)
        return sorted(found, key=lambda stage: stage.layer)

    def encoder_stages(self, anatomy: Anatomy) -> list[BlockStage]:
        """Those of the one method that shortens the encoder.

        Raises:
            Refused: two methods do, or another one looks at what the encoder computes.
        """
        shortening = [method for method in self._methods if method.encoder_stages(anatomy)]
        if not shortening:
            return []
        if len(shortening) > 1:
            raise Refused(
                f"{' and '.join(method.slug for method in shortening)} both shorten the encoder: take one of them"
            )
        (first,) = shortening
        for method in self._methods:
            if method is not first and any(stage.observes_encoder for stage in method.stages(anatomy)):
                raise Refused(
                    f"{method.slug} looks into the encoder, which {first.slug} shortens: take one of them"
                )
        return first.encoder_stages(anatomy)

    def stages_of(self, number: int, anatomy: Anatomy) -> list[Stage]:
        """Stages of one of the methods; see ``stages``."""
        method = self._methods[number]
        own = [_placed(stage, method.positions) for stage in method.stages(anatomy)]
        for other in self._methods[:number]:
            for theirs in (_placed(stage, other.positions) for stage in other.stages(anatomy)):
                for stage in own:
                    _refuse_clash(theirs, other.slug, stage, method.slug)
        return own

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedTokens:
        """Hook ``loaded`` once for all methods."""
        self.check(loaded)
        anatomy = loaded.anatomy
        engines = [method.engine for method in self._methods if method.engine is not TokenReducer]
        engine = engines[0] if engines else TokenReducer
        stages, inside_encoder = self.stages(anatomy), self.encoder_stages(anatomy)
        reducer = engine(anatomy, stages, self.positions, self.name, inside_encoder)
        return AppliedJoined(self, loaded, reducer)


def _refuse_clash(one: Stage, of_one: str, two: Stage, of_two: str) -> None:
    """Refuse stages of two methods that cannot both run; see ``JoinedReducers.stages``."""
    if one.layer == two.layer:
        raise Refused(f"{of_one} and {of_two} both prune {_place(one.layer)}: move one of them")
    if one.layer > two.layer:
        one, of_one, two, of_two = two, of_two, one, of_one
    if isinstance(two, Scatter):
        raise Refused(
            f"{of_two} brings all visual tokens back {_place(two.layer)}, also those that {of_one} removes "
            f"{_place(one.layer)}: move {of_one} behind it"
        )
    if any(layer < one.layer for layer in (*two.observes, *(layer for layer, _ in two.observes_hidden))):
        raise Refused(
            f"{of_two} prunes {_place(two.layer)} by what it saw before layer {one.layer}, where tokens leave "
            f"({of_one} and {of_two} are too close)"
        )


def _placed(stage: Stage, positions: Positions) -> Stage:
    """``stage`` with its method's policy written on it; layer 0 and -1 are the same place."""
    return replace(stage, layer=stage.layer or -1, positions=stage.positions or positions)


def _place(layer: int) -> str:
    return "before the LLM" if layer < 0 else f"before layer {layer}"


class AppliedTokens(Applied):
    """A token method at work. ``report`` and ``kept`` speak of the latest input."""

    def __init__(self, method: Method, loaded: LoadedModel, reducer: TokenReducer) -> None:
        super().__init__(method, loaded, reducer.close)
        self.reducer = reducer

    def generate(self, **inputs: Any) -> Any:
        """As ``model.generate``.

        Raises:
            Refused: beam search, a prompt read in chunks, or a fixed-size cache, which layers of different lengths
                do not allow.
        """
        config = inputs.get("generation_config") or self.model.generation_config
        if inputs.get("num_beams", config.num_beams) not in (None, 1):
            raise Refused(f"{self.method.name} does not support beam search (num_beams must be 1)")
        if inputs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)):
            raise Refused(
                f"{self.method.name} must see the whole prompt at once: leave prefill_chunk_size unset"
            )
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
        facts: dict[str, float | int | str] = {"position ids": "renumbered" if reducer.renumbered else "kept"}
        for layer, kept in reducer.kept.items():
            facts[f"visual tokens kept {_place(layer)}"] = round(
                sum(len(rows) for rows in kept) / len(kept), 2
            )
        bars = {"visual tokens": layers}
        if reducer.cached_per_layer is not None:
            bars[CACHED] = reducer.cached_per_layer.float().mean(0).tolist()
        drawn = {
            name: [Bar(label=str(layer), kept=kept, total=total) for layer, kept in enumerate(counts)]
            for name, counts in bars.items()
        }
        if reducer.encoder is not None:
            blocks = reducer.encoder.blocks
            drawn[ENCODED] = [
                Bar(label=str(block), kept=tokens, total=blocks.entered)
                for block, tokens in enumerate(blocks.tokens[:-1])
            ]
        return Report(
            method=self.method.name,
            parameters=self.method.parameters(),
            unit="visual tokens (mean over decoder layers)",
            kept=sum(layers) / len(layers),
            total=total,
            bars=drawn,
            facts=facts,
        )


class AppliedJoined(AppliedTokens):
    """Several token methods at work in one reducer."""

    @property
    def reports(self) -> list[Report]:
        """One report per method: what would be left if only its own removals counted.

        Their removals add up to those of ``report``.
        """
        joined, whole = self.method, self.report
        assert isinstance(joined, JoinedReducers)
        anatomy, reducer = self.loaded.anatomy, self.reducer
        depth = len(whole.bars["visual tokens"])
        reports = []
        for number, method in enumerate(joined._methods):
            gone = [0.0] * depth
            facts: dict[str, float | int | str] = {}
            for stage in joined.stages_of(number, anatomy):
                kept = reducer.kept[stage.layer]
                removed = sum(reducer.arriving[stage.layer]) - sum(len(rows) for rows in kept)
                for layer in range(max(stage.layer, 0), depth):
                    gone[layer] += removed / len(kept)
                facts[f"visual tokens that arrived {_place(stage.layer)}"] = round(
                    sum(reducer.arriving[stage.layer]) / len(kept), 2
                )
                facts[f"visual tokens kept {_place(stage.layer)}"] = round(
                    sum(len(rows) for rows in kept) / len(kept), 2
                )
            bars = {
                "visual tokens": [
                    Bar(label=str(layer), kept=whole.total - lost, total=whole.total)
                    for layer, lost in enumerate(gone)
                ]
            }
            if method.encoder_stages(anatomy):
                bars[ENCODED] = whole.bars[ENCODED]
            reports.append(
                Report(
                    method=method.name,
                    parameters=method.parameters(),
                    unit=whole.unit,
                    kept=whole.total - sum(gone) / depth,
                    total=whole.total,
                    bars=bars,
                    facts=facts,
                )
            )
        return reports
