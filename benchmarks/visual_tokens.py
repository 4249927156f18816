"""How much of the prefill that visual-token methods save in theory they save in fact, and what choosing costs.

Run: ``python benchmarks/visual_tokens.py [--quick] [--methods divprune fastv] [--keep 0.5 0.25 0.11 1]
[--repeats 5] [--part prefill selection] [--json FILE]``.

**prefill**: a LLaVA-shaped model with random weights (CLIP-L-shaped encoder, 576 visual tokens, decoder of 16 layers x
1024; options shrink it) reads one picture and a question, dense and with each method in turns (dense A B C, dense A B
C ...), in processor time on one thread. Two spans of the same runs are timed: *LLM* begins where the language model is
entered, behind encoder and projector, and holds what the methods do (except where they shorten the encoder itself);
*whole* is everything. ``gain`` is dense / reduced, ``bound`` the same ratio of FLOPs counted while they ran,
``eff`` = gain / bound, each with half its interquartile distance. Selection is the time inside the methods' own rules;
``share`` is what it makes of the time that the method saves. With ``--keep 1`` the logits must equal the dense ones bit
by bit, and ``gain`` shows the cost (1 = none). The row ``(shorter prompt)`` is the language model alone on so many
tokens less: what is missing from 1 there, no before-LLM method can reach on this machine.

All methods get the same ``keep_ratio``, whatever they make of it: ``kept`` is what was left, mean over decoder layers.
Methods without that parameter run once, with their defaults.

**selection**: the greedy rules alone, 64 of 2880 vectors of width 1024, beside plain translations of their definitions
(the full matrix, then a loop over slices of it). Picks that differ are an error.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zoo.bench.environment import environment
from zoo.bench.flops import count_flops
from zoo.bench.record import Figure
from zoo.bench.timing import Version, alternate, ready, summarise
from zoo.engines import selection as rules
from zoo.engines.reductions import Reduction
from zoo.engines.views import Select, View
from zoo.errors import ZooError
from zoo.families.visual_tokens import AppliedTokens, VisualTokenReducer
from zoo.interface import implemented, method, method_class
from zoo.methods.visual_tokens.todre import grow
from zoo.models import LoadedModel

CPU = torch.device("cpu")
IMAGE_ID = 5
VOCABULARY = 4096
VISUAL = 576
BEFORE, AFTER = 35, 29
"""Text tokens in front of the picture and behind it, as in a LLaVA-1.5 prompt with a short question."""
TOGETHER = 6
"""Methods that share the dense runs of a round: fewer are steadier, more are quicker."""
BY_HAND = "(shorter prompt)"
"""The row that says which part of the bound this machine reaches at all: a dense run on a prompt so much shorter."""
EFFICIENCY = {"before": 0.85, "inside": 0.8}
SHARE = 0.05
SPEED = 5.0


# --- the model ------------------------------------------------------------------------------------------------


def build(arguments: argparse.Namespace) -> LoadedModel:
    """A LLaVA-1.5-shaped model with lively random weights: matrices of standard deviation ``fan_in ** -0.5``."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    width, seen = arguments.width, arguments.encoder_width
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=seen,
            intermediate_size=4 * seen,
            num_hidden_layers=arguments.encoder_layers,
            num_attention_heads=seen // 64,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=2048,
        ),
        image_token_id=IMAGE_ID,
        image_seq_length=VISUAL,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                inputs = 1 if "position_embedding" in name else parameter[0].numel()
                parameter.normal_(0, inputs**-0.5, generator=generator)
    return LoadedModel(model, ref="random LLaVA")


def picture_and_question() -> dict[str, torch.Tensor]:
    """One sample: ids and mask ``[1, L]``, pixels ``[1, 3, 336, 336]`` with smooth areas and noise."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(IMAGE_ID + 1, VOCABULARY, (BEFORE + AFTER,), generator=generator)
    ids = torch.cat((words[:BEFORE], torch.full((VISUAL,), IMAGE_ID), words[BEFORE:])).unsqueeze(0)
    coarse = torch.randn(1, 3, 12, 12, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(336, 336), mode="bicubic")
    pixels += 0.1 * torch.randn(pixels.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


# --- the prefill ----------------------------------------------------------------------------------------------


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


@dataclass
class Row:
    """What one method did at one budget. Times in milliseconds; ``flops`` in 10^9 (whole, and before the LLM)."""

    method: str
    keep_ratio: float | None
    place: str = ""
    kept: float | None = None
    skipped: str | None = None
    flops: tuple[float, float] | None = None
    gain: Figure | None = None
    bound: float | None = None
    whole_gain: Figure | None = None
    whole_bound: float | None = None
    dense_ms: Figure | None = None
    llm_ms: Figure | None = None
    selection_ms: Figure | None = None
    bit_equal: bool | None = None

    @property
    def efficiency(self) -> float | None:
        """Realised over possible gain: of the whole prefill where tokens leave in the encoder, else of the LLM."""
        gain, bound = (
            (self.whole_gain, self.whole_bound) if self.place == "encoder" else (self.gain, self.bound)
        )
        return None if gain is None or not bound else gain.median / bound

    @property
    def share(self) -> float | None:
        """Selection time over the time that the method saves in the LLM; ``None`` when it saves none."""
        if (
            self.kept == 1
            or self.method == BY_HAND
            or self.dense_ms is None
            or self.llm_ms is None
            or self.selection_ms is None
        ):
            return None
        saved = self.dense_ms.median - self.llm_ms.median
        return self.selection_ms.median / saved if saved > 0 else None

    def misses(self) -> list[str]:
        """Aims that are missed, in words."""
        if self.bit_equal is False:
            return ["logits differ from the dense ones"]
        if self.kept is None or self.kept == 1 or self.method == BY_HAND:
            return []
        found = []
        aim = EFFICIENCY["inside" if self.place == "inside" else "before"]
        if self.efficiency is not None and self.efficiency < aim:
            found.append(f"efficiency {self.efficiency:.2f} < {aim}")
        if self.share is not None and self.share > SHARE:
            found.append(f"selection is {self.share:.1%} of what is saved")
        return found


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


def fill(row: Row, dense: Sequence[Run], own: Sequence[Run]) -> None:
    """Times of paired rounds into ``row``."""
    pairs = list(zip(dense, own, strict=True))
    row.gain = summarise([a.llm / b.llm for a, b in pairs])
    if row.whole_bound is not None:
        row.whole_gain = summarise([a.whole / b.whole for a, b in pairs])
    row.dense_ms = summarise([1000 * run.llm for run in dense])
    row.llm_ms = summarise([1000 * run.llm for run in own])
    row.selection_ms = summarise([1000 * run.selection for run in own])


HEAD = (
    f"{'method':22}{'where':>8}{'keep':>6}{'kept':>7}{'LLM ms':>9}{'gain':>14}{'bound':>7}{'eff':>6}"
    f"{'whole':>7}{'bound':>7}{'sel. ms':>9}{'share':>7}  misses"
)


def print_row(row: Row) -> None:
    keep = "own" if row.keep_ratio is None else f"{row.keep_ratio:g}"
    if row.skipped is not None:
        print(f"{row.method:22}{'':>8}{keep:>6}  skipped: {row.skipped}", flush=True)
        return
    assert row.gain is not None
    assert row.llm_ms is not None
    assert row.selection_ms is not None
    assert row.kept is not None
    eff = "" if row.efficiency is None else f"{row.efficiency:.2f}"
    share = "" if row.share is None else f"{row.share:.1%}"
    equal = "" if row.bit_equal is None else "bit-equal" if row.bit_equal else "NOT BIT-EQUAL"
    whole = "" if row.whole_gain is None else f"{row.whole_gain.median:7.2f}{row.whole_bound:7.2f}"
    gain = f"{row.gain.median:.2f} ±{row.gain.spread or 0:.2f}"
    print(
        f"{row.method:22}{row.place:>8}{keep:>6}{row.kept:7.1%}{row.llm_ms.median:9.0f}{gain:>14}{row.bound:7.2f}"
        f"{eff:>6}{whole:14}{row.selection_ms.median:9.2f}{share:>7}  "
        f"{'; '.join([equal, *row.misses()]).strip('; ')}",
        flush=True,
    )


# --- the greedy rules -----------------------------------------------------------------------------------------


def _cosines(x: torch.Tensor) -> torch.Tensor:
    unit = x / x.norm(dim=-1, keepdim=True)
    return unit @ unit.T


def plain_max_min(x: torch.Tensor, count: int) -> list[int]:
    """DivPrune: first the row with the farthest nearest neighbour, then the one farthest from the picked rows."""
    distances = 1 - _cosines(x)
    picked = [int(distances.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(picked) < count:
        picked.append(int(distances[picked].min(dim=0).values.argmax()))
    return picked


def plain_from_first(x: torch.Tensor, count: int) -> list[int]:
    """Farthest-point sampling, which is greedy k-centre, from row 0."""
    distances = 1 - _cosines(x)
    picked = [0]
    while len(picked) < count:
        picked.append(int(distances[picked].min(dim=0).values.argmax()))
    return picked


def plain_max_sum(x: torch.Tensor, count: int) -> list[int]:
    """The row whose cosines to the picked ones sum to the least, from row 0."""
    cosines = _cosines(x)
    picked = [0]
    while len(picked) < count:
        total = cosines[picked].sum(dim=0)
        total[picked] = math.inf
        picked.append(int(total.argmin()))
    return picked


def plain_relevance(x: torch.Tensor, importance: torch.Tensor, count: int) -> list[int]:
    """Maximal marginal relevance, importance and novelty of equal weight."""
    cosines = _cosines(x)
    picked = [int(importance.argmax())]
    while len(picked) < count:
        score = 0.5 * importance - 0.5 * cosines[:, picked].max(dim=1).values
        score[picked] = -math.inf
        picked.append(int(score.argmax()))
    return picked


def plain_weighted(x: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    """The largest weight times distance to the nearest picked row."""
    distances = 1 - _cosines(x)
    picked = [int(weight.argmax())]
    while len(picked) < count:
        score = weight * distances[picked].min(dim=0).values
        score[picked] = -math.inf
        picked.append(int(score.argmax()))
    return picked


def plain_determinant(x: torch.Tensor, quality: torch.Tensor, count: int) -> list[int]:
    """Greedy MAP of a DPP: the row that adds most to the log-determinant, by the Schur complement of the kernel."""
    kernel = quality[:, None] * _cosines(x) * quality
    picked = [int(kernel.diagonal().argmax())]
    while len(picked) < count:
        rows = kernel[picked]
        gain = kernel.diagonal() - (rows * torch.linalg.solve(rows[:, picked], rows)).sum(dim=0)
        gain[picked] = -math.inf
        picked.append(int(gain.argmax()))
    return picked


def plain_coverage(x: torch.Tensor, weight: torch.Tensor, count: int) -> list[int]:
    """Facility location: the gain in coverage of every candidate, times its weight, anew for each pick."""
    cosines = _cosines(x)
    covered = torch.zeros(len(x))
    picked: list[int] = []
    for _ in range(count):
        score = (cosines - covered).clamp(min=0).sum(dim=1) * weight
        score[picked] = -math.inf
        picked.append(int(score.argmax()))
        covered = torch.maximum(covered, cosines[picked[-1]])
    return picked


@dataclass
class Speed:
    """One greedy rule beside its plain translation; milliseconds of processor time."""

    rule: str
    used_by: str
    plain_ms: Figure
    own_ms: Figure
    speed_up: Figure
    of_it_matrix_ms: float | None


def measure_rules(repeats: int, tokens: int, count: int, width: int) -> list[Speed]:
    """Own rules against plain ones, on vectors that form loose clusters.

    Raises:
        SystemExit: they pick differently.
    """
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(40, width, generator=generator)
    member = torch.randint(len(centres), (tokens,), generator=generator)
    x = centres[member] + torch.randn(tokens, width, generator=generator)
    weight = torch.rand(tokens, generator=generator) + 0.01

    cases: list[tuple[str, str, Callable[[], list[int]], Callable[[], torch.Tensor], bool]] = [
        (
            "max-min diversity", "divprune", partial(plain_max_min, x, count),
            lambda: rules.farthest_points(x, count), False,
        ),
        (
            "farthest points", "segpruner", partial(plain_from_first, x, count),
            lambda: rules.farthest_from(rules.Cosines(x).distances, torch.tensor(0), tokens, count),
            False,
        ),
        (
            "k-centre", "todre (version 1)", partial(plain_from_first, x, count),
            lambda: grow(x, 0, count, torch.maximum), False,
        ),
        (
            "max-sum diversity", "todre", partial(plain_max_sum, x, count),
            lambda: grow(x, 0, count, torch.add), False,
        ),
        (
            "marginal relevance", "idpruner", partial(plain_relevance, x, weight, count),
            lambda: rules.marginal_relevance(x, weight, count, 0.5), False,
        ),
        (
            "weighted farthest", "zoo-prune", partial(plain_weighted, x, weight, count),
            lambda: rules.weighted_farthest_points(x, weight, count), False,
        ),
        (
            "DPP", "cdpruner", partial(plain_determinant, x, weight, count),
            lambda: rules.dpp_map(x, weight, count), False,
        ),
        (
            "coverage", "scope", partial(plain_coverage, x, weight, count),
            lambda: rules.most_covering(x, weight, count), True,
        ),
    ]  # fmt: skip
    whole = {"matrix": ready(partial(rules.cosine_matrix, x))}
    matrix = alternate(whole, CPU, repeats=repeats)["matrix"].figure(1000).median
    print(
        f"{count} of {tokens} vectors of width {width}; their cosine matrix alone, one half of it computed, takes "
        f"{matrix:.0f} ms\n"
    )
    print(f"{'rule':20}{'of':>19}{'plain ms':>11}{'here ms':>10}{'speed-up':>16}  picks")
    found = []
    for name, used_by, plain, own, needs_matrix in cases:
        samples = alternate({"plain": ready(plain), "own": ready(own)}, CPU, repeats=repeats)
        if samples["plain"].result != samples["own"].result.tolist():
            raise SystemExit(f"{name}: the picks differ from those of the plain translation")
        pairs = zip(samples["plain"].seconds, samples["own"].seconds, strict=True)
        speed_up = summarise([a / b for a, b in pairs])
        plain_ms, own_ms = (samples[arm].figure(1000) for arm in ("plain", "own"))
        found.append(Speed(name, used_by, plain_ms, own_ms, speed_up, matrix if needs_matrix else None))
        ratio = f"{speed_up.median:.1f}x ±{speed_up.spread or 0:.1f}"
        below = "" if speed_up.median >= SPEED else f" (aim: {SPEED:g}x)"
        print(
            f"{name:20}{used_by:>19}{plain_ms.median:11.1f}{own_ms.median:10.1f}{ratio:>16}  same{below}",
            flush=True,
        )
    return found


# --- the command ----------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", help="slugs (default: all visual-token methods)")
    parser.add_argument(
        "--keep", nargs="+", type=float, default=[0.5, 0.25, 0.11, 1], help="values of keep_ratio"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument(
        "--part", nargs="+", choices=["prefill", "selection"], default=["prefill", "selection"]
    )
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--width", type=int, default=1024, help="decoder width, in steps of 64")
    parser.add_argument("--encoder-layers", type=int, default=24)
    parser.add_argument("--encoder-width", type=int, default=1024, help="in steps of 64")
    parser.add_argument("--quick", action="store_true", help="encoder 8 x 256, decoder 16 x 512, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.encoder_layers, arguments.encoder_width, arguments.width = 8, 256, 512
        arguments.repeats = 3
    try:
        arguments.methods = [
            slug
            for slug in dict.fromkeys(arguments.methods or implemented())
            if issubclass(method_class(slug), VisualTokenReducer)
        ]
    except ZooError as error:
        parser.error(str(error))
    if not arguments.methods or not all(0 < keep <= 1 for keep in arguments.keep):
        parser.error("--methods takes visual-token methods, --keep numbers above 0 and at most 1")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"environment": environment("cpu", "sdpa")}
    missed: list[str] = []
    if "prefill" in arguments.part:
        rows = measure_prefill(arguments)
        found["prefill"] = [
            {**as_json(row), "efficiency": row.efficiency, "share": row.share} for row in rows
        ]
        missed += [
            f"{row.method} at {row.keep_ratio or 'own'}: {miss}" for row in rows for miss in row.misses()
        ]
    if "selection" in arguments.part:
        speeds = measure_rules(arguments.repeats, tokens=2880, count=64, width=1024)
        found["selection"] = [as_json(speed) for speed in speeds]
        missed += [
            f"{speed.rule}: {speed.speed_up.median:.1f}x < {SPEED:g}x"
            for speed in speeds
            if speed.speed_up.median < SPEED
        ]
    print("\nAims missed:" if missed else "\nAll aims are met.")
    print("".join(f"  {miss}\n" for miss in missed), end="")
    if arguments.json is not None:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        text = json.dumps({"settings": settings, **found}, indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")


def as_json(record: Any) -> dict[str, Any]:
    """A dataclass of figures as JSON values."""
    return {
        name: value.model_dump() if isinstance(value, Figure) else value
        for name, value in vars(record).items()
    }


if __name__ == "__main__":
    main()
