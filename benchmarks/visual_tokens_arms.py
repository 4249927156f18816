"""The sides that ``benchmarks/visual_tokens.py`` times: one prefill each, with a stopwatch in three places.

The whole prefill, what lies behind the entry of the language model, and the methods' own rules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from zoo.bench.flops import count_flops
from zoo.engines.reductions import Reduction
from zoo.engines.views import Select, View
from zoo.families.visual_tokens import AppliedTokens, VisualTokenReducer
from zoo.models import LoadedModel


class _Entered(Exception):
    """The language model was entered, and nothing behind that is wanted."""


class Entry:
    """Notes when the language model is entered: in front of the methods' hooks, as it is there before them."""

    def __init__(self, loaded: LoadedModel) -> None:
        decoder = loaded.anatomy.decoder
        assert decoder is not None
        self.at = math.nan
        self.go_on = True
        decoder.module.register_forward_pre_hook(self._note)

    def _note(self, module: torch.nn.Module, args: Any) -> None:
        self.at = time.process_time()
        if not self.go_on:
            raise _Entered

    @contextmanager
    def only_before(self) -> Iterator[None]:
        """Forward passes end here."""
        self.go_on = False
        try:
            yield
        except _Entered:
            pass
        finally:
            self.go_on = True


@dataclass
class Run:
    """Seconds of one prefill."""

    whole: float
    llm: float
    selection: float


@dataclass
class Look:
    """One prefill: FLOPs of all and of what lies before the LLM (``None`` = as in the dense model), and its outcome.

    ``kept`` is the mean fraction of visual tokens in decoder layers, ``place`` where they leave.
    """

    flops: int
    flops_before: int | None
    logits: torch.Tensor
    kept: float = 1.0
    place: str = ""


@dataclass
class Arm:
    """The dense model, or one with a method (``rule``), or the language model alone on a prompt of ``cut`` tokens."""

    loaded: LoadedModel
    entry: Entry
    inputs: Mapping[str, torch.Tensor]
    rule: VisualTokenReducer | None = None
    cut: int | None = None
    runs: list[Run] = field(default_factory=list)

    @contextmanager
    def forward(self) -> Iterator[Callable[[], Any]]:
        """A version for ``alternate``: one prefill, whose times are added to ``runs``."""
        with torch.no_grad():
            if self.rule is None:
                model = self.loaded.model if self.cut is None else self._short_prompt(self.cut)
                yield partial(self._timed, model, [0.0])
                return
            applied = self.rule.apply(self.loaded)
            with applied:
                spent = [0.0]
                _time_rules(applied, spent)
                yield partial(self._timed, applied, spent)

    def _short_prompt(self, length: int) -> Callable[..., Any]:
        """What no method can beat that shortens the prompt as much: a shorter prompt, and nothing else."""
        decoder = self.loaded.anatomy.decoder
        assert decoder is not None
        inner, head = decoder.module, self.loaded.model.get_output_embeddings()
        embeds = torch.randn(
            1, length, decoder.config.hidden_size, generator=torch.Generator().manual_seed(3)
        )
        mask = torch.ones(1, length, dtype=torch.long)

        def forward(**_: Any) -> Any:
            output = inner(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
            output.logits = head(output.last_hidden_state[:, -1:])
            return output

        return forward

    def _timed(self, model: Any, spent: list[float]) -> torch.Tensor:
        begun = time.process_time()
        logits = model(**self.inputs, use_cache=True, logits_to_keep=1).logits
        ended = time.process_time()
        self.runs.append(Run(ended - begun, ended - self.entry.at, spent[0]))
        spent[0] = 0.0
        return logits

    def look(self) -> Look:
        """Count FLOPs in one prefill (which also warms up), and see what it did."""
        made: list[torch.Tensor] = []
        rule = self.rule
        if rule is None:
            with self.forward() as work:
                total = count_flops(lambda: made.append(work()))
                encoder = 0 if self.cut is not None else count_flops(partial(self._encode, work))
            self.runs.clear()
            return Look(total, encoder, made[0])
        applied = rule.apply(self.loaded)
        with torch.no_grad(), applied:
            work = partial(self._timed, applied, [0.0])
            total = count_flops(lambda: made.append(work()))
            report = applied.report
            stages = applied.reducer.stages
            place = "before" if stages else "nowhere"
            before: int | None = None
            if "encoder tokens per crop" in report.bars:
                place, before = "encoder", count_flops(partial(self._encode, work))
            elif any(stage.layer >= 0 for stage in stages):
                place = "inside"
        self.runs.clear()
        return Look(total, before, made[0], report.kept_ratio, place)

    def _encode(self, work: Callable[[], Any]) -> None:
        with self.entry.only_before():
            work()


def _time_rules(applied: AppliedTokens, spent: list[float]) -> None:
    """Add the time inside the rules of the stages to ``spent``.

    Stages are frozen for methods; a stopwatch may write on those of one application, which end with it.
    """
    for stage in applied.reducer.stages:
        object.__setattr__(stage, "reduce", partial(_timed_rule, stage.reduce, spent))


def _timed_rule(rule: Select, spent: list[float], view: View) -> Reduction:
    begun = time.process_time()
    reduction = rule(view)
    spent[0] += time.process_time() - begun
    return reduction
