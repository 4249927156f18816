"""Prefill with visual-token methods beside the dense one: see ``benchmarks/visual_tokens.py``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from visual_tokens_arms import Arm, Entry
from visual_tokens_model import AFTER, BEFORE, VISUAL, build, picture_and_question
from visual_tokens_rows import BY_HAND, HEAD, Row, fill, print_row

from zoo.bench.timing import Version, alternate
from zoo.errors import ZooError
from zoo.families.visual_tokens import VisualTokenReducer
from zoo.interface import method, method_class
from zoo.models import LoadedModel

CPU = torch.device("cpu")
TOGETHER = 6
"""Methods that share the dense runs of a round: fewer are steadier, more are quicker."""


def measure_prefill(arguments: argparse.Namespace) -> list[Row]:
    """One row per method and budget."""
    bench = PrefillBench(build(arguments), picture_and_question(), arguments.repeats)
    print(
        f"dense prefill: {bench.full.flops / 1e9:.0f} GFLOP, {bench.llm / 1e9:.0f} of them in the LLM "
        f"({BEFORE + AFTER} text and {VISUAL} visual tokens)\n\n{HEAD}"
    )
    rows: list[Row] = []
    for keep in arguments.keep:
        # Methods without a budget are measured once.
        done = {row.method for row in rows if row.keep_ratio is None}
        slugs = [slug for slug in arguments.methods if slug not in done]
        for start in range(0, len(slugs), TOGETHER):
            made = [bench.prepare(slug, keep) for slug in slugs[start : start + TOGETHER]]
            pairs = [(row, arm) for row, arm in made if arm is not None]
            if start == 0 and keep != 1:
                pairs.insert(0, bench.shorter_prompt(keep))
            bench.time(pairs)
            fresh = [row for row, arm in made if arm is None] + [row for row, _ in pairs]
            for row in fresh:
                print_row(row)
            rows += fresh
        print(flush=True)
    return rows


class PrefillBench:
    """All methods on one model and one input."""

    def __init__(self, loaded: LoadedModel, inputs: Mapping[str, torch.Tensor], repeats: int) -> None:
        self.arm = partial(Arm, loaded, Entry(loaded), inputs)
        self.repeats = repeats
        self.dense: Arm = self.arm()
        self.full = self.dense.look()
        self.encoder = self.full.flops_before or 0
        self.llm = self.full.flops - self.encoder

    def shorter_prompt(self, keep: float) -> tuple[Row, Arm]:
        """The language model alone, see ``BY_HAND``."""
        tokens = round(keep * VISUAL)
        arm: Arm = self.arm(cut=BEFORE + AFTER + tokens)
        flops = arm.look().flops
        row = Row(BY_HAND, keep, "before", tokens / VISUAL, flops=(flops / 1e9, 0.0), bound=self.llm / flops)
        return row, arm

    def prepare(self, slug: str, keep: float) -> tuple[Row, Arm | None]:
        """What the method does to the input; no arm when there is nothing to time."""
        row = Row(slug, keep)
        try:
            rule, budgeted = rule_of(slug, keep)
            row.keep_ratio = keep if budgeted else None
            arm: Arm = self.arm(rule=rule)
            seen = arm.look()
        except ZooError as error:
            row.skipped = str(error)
            return row, None
        row.kept, row.place = seen.kept, seen.place
        if keep == 1 and budgeted:
            row.bit_equal = torch.equal(seen.logits, self.full.logits)
        elif row.kept == 1:
            row.skipped = "leaves all visual tokens of this picture"
            return row, None
        before = self.encoder if seen.flops_before is None else seen.flops_before
        row.flops = seen.flops / 1e9, before / 1e9
        row.bound, row.whole_bound = self.llm / (seen.flops - before), self.full.flops / seen.flops
        return row, arm

    def time(self, pairs: Sequence[tuple[Row, Arm]]) -> None:
        """Time these arms and the dense one in turns, and fill in the rows."""
        versions: dict[str, Version] = {"dense": self.dense.forward}
        versions |= {row.method: arm.forward for row, arm in pairs}
        for arm in (self.dense, *(arm for _, arm in pairs)):
            arm.runs.clear()
        alternate(versions, CPU, repeats=self.repeats, warmup=0)  # counting FLOPs has warmed up
        for row, arm in pairs:
            fill(row, self.dense.runs, arm.runs)


def rule_of(slug: str, keep: float) -> tuple[VisualTokenReducer, bool]:
    """The method at this budget, and whether it takes one."""
    fields = method_class(slug).model_fields
    if "keep_ratio" in fields:
        made, budgeted = method(slug, keep_ratio=keep), True
    elif "host_parameters" in fields:
        made, budgeted = method(slug, host_parameters={"keep_ratio": keep}), True
    else:
        made, budgeted = method(slug), False
    assert isinstance(made, VisualTokenReducer)
    return made, budgeted
