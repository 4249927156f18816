"""Speed of the drafters against plain greedy decoding, and against what transformers ships; and that nothing is lost.

Run: ``python benchmarks/decoding.py [--methods goose eagle] [--tasks chat rag] [--budget fixed] [--quick]``,
``python benchmarks/decoding.py --sources`` or ``python benchmarks/decoding.py --lossless``.

**speed**: the six task types of Spec-Bench in miniature (``decoding_tasks.py``) on one real small model. For every
prompt all methods take turns between two plain runs, on the steady clock (processor time of one thread on a CPU). Speed
is the sum of tokens over the sum of time, prompts read included. ``tau`` is the mean number of tokens per pass;
``draft``, ``verify`` and ``rest`` are the shares of the time behind the prompt; ``bound`` is ``tau / (v + c)`` with the
verification ``v`` and the drafting ``c`` of a step in plain steps, and ``of bound`` how much of it was realised;
``rest / pass`` is what the loop takes beside the forward passes. In the same turns run transformers' own
``prompt_lookup_num_tokens`` and ``assistant_model``, the latter with the draft model of ``speculative-sampling``.

**sources**: tokens per pass of ``goose`` and of each of its two sources alone, at the same number of nodes.

**lossless**: see ``decoding_lossless.py``.

Rows are appended to FILE as they finish, one JSON line per method and task in the form of ``taxonomy/measurements``;
those already in it with the same settings are not run again. ``--table`` only prints what FILE holds.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from decoding_heads import described, draft_model, resources
from decoding_lossless import prove
from decoding_tasks import tasks
from result_rows import append, finished
from rich.console import Console
from rich.table import Table

import zoo
from taxonomy.runs import Measurement, Run
from zoo.bench.environment import environment
from zoo.bench.session import greedy
from zoo.bench.timing import alternate, ready
from zoo.engines.language_modelling import prompt_ids
from zoo.engines.verification_cost import verification_cost
from zoo.families.decoding import AppliedDecoder
from zoo.models import LoadedModel, load_model
from zoo.models.quiet import quiet_transformers

MODEL = "smollm2-135m"
METHODS = (
    "prompt-lookup", "token-recycling", "sam-decoding", "rest", "goose", "speculative-sampling",
    "layer-skip-self-speculation", "medusa", "eagle", "jacobi", "lookahead",
)  # fmt: skip
"""Those whose cards say that they are lossless."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "medusa": {"tree": "measured"},
    "eagle": {"depth": 2, "top_k": 4, "nodes": 12},
}
"""Other than the defaults. EAGLE reads the target's output layer once per level, which is a fifth of a pass here."""
PEERS: dict[str, dict[str, Any]] = {
    "prompt-lookup": {"prompt_lookup_num_tokens": 10},
    "speculative-sampling": {"assistant_model": None},
}
"""What transformers ships, by the method that it stands beside."""
SOURCES = {"both": "spine", "copies alone": "copies", "successors alone": "isotropic"}
"""Goose and its two sources by the value of ``tree``."""
PLAIN = ("plain", "plain again")


@dataclass
class Sums:
    """Sums over the prompts of a task. Times are on the steady clock; ``*_part`` are wall times of the loop."""

    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    prefill: float = 0.0
    same: int = 0
    steps: int = 0
    committed: int = 0
    draft_part: float = 0.0
    verify_part: float = 0.0
    rest_part: float = 0.0
    speeds: list[float] = field(default_factory=list)

    @property
    def decode(self) -> float:
        """Seconds behind the prompts."""
        return self.seconds - self.prefill

    def part(self, name: str) -> float:
        """Share of ``draft``, ``verify`` or ``rest`` in the time behind the prompts."""
        whole = self.draft_part + self.verify_part + self.rest_part
        return float(getattr(self, f"{name}_part")) / whole if whole else 0.0


class FirstToken:
    """A streamer that takes the time at which the first token arrives (the prompt comes before it)."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.stamps: list[float] = []

    def put(self, value: Any) -> None:
        if len(self.stamps) < 2:
            self.stamps.append(self.clock())

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class Contender:
    """``generate``, the counters of its latest run, and what the method was given."""

    generate: Callable[..., Any]
    applied: AppliedDecoder | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


def contenders(
    loaded: LoadedModel, methods: Iterable[str], budget: str, console: Console, undo: ExitStack
) -> dict[str, Contender]:
    """Everything that takes turns, by name; drafters live through all prompts, as they would in a server."""
    model = loaded.model
    found = {PLAIN[0]: Contender(model.generate)}
    draft = draft_model(loaded) if "speculative-sampling" in methods else None
    for slug in methods:
        extra = resources(slug, loaded, draft, console.print)
        method = zoo.method(slug, budget=budget, **PARAMETERS.get(slug, {}))
        applied = undo.enter_context(method.apply(loaded, **extra))
        assert isinstance(applied, AppliedDecoder)
        found[slug] = Contender(applied.generate, applied, described(extra))
        if slug in PEERS:
            options = {
                name: value if value is not None else draft.model for name, value in PEERS[slug].items()
            }
            found[f"transformers beside {slug}"] = Contender(_with(model.generate, options))
    return {**found, PLAIN[1]: Contender(model.generate)}


def _with(generate: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda **inputs: generate(**inputs, **options)


def measure(
    loaded: LoadedModel, arms: Mapping[str, Contender], prompts: Sequence[str], new_tokens: int
) -> dict[str, Sums]:
    """All prompts of a task, all contenders in turns."""
    sums = {name: Sums() for name in arms}
    clock = time.perf_counter if loaded.device.type == "cuda" else time.process_time
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(loaded.tokenizer, prompt)], device=loaded.device)
        options = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options |= greedy(loaded.tokenizer, new_tokens)

        def work(arm: Contender, options: Mapping[str, Any] = options) -> Callable[[], Any]:
            def generate() -> tuple[Any, float]:
                begun, streamer = clock(), FirstToken(clock)
                with torch.no_grad():
                    out = arm.generate(**options, streamer=streamer)
                return out[0], streamer.stamps[-1] - begun

            return generate

        timed = alternate(
            {name: ready(work(arm)) for name, arm in arms.items()}, loaded.device, repeats=1, warmup=0
        )
        expected = timed[PLAIN[0]].result[0]
        for name, sample in timed.items():
            out, prefill = sample.result
            add(sums[name], arms[name], len(out) - ids.shape[1], sample.seconds[0], prefill)
            sums[name].same += int(torch.equal(out, expected))
    return sums


def add(sums: Sums, arm: Contender, tokens: int, seconds: float, prefill: float) -> None:
    """One generation."""
    sums.prompts += 1
    sums.tokens += tokens
    sums.seconds += seconds
    sums.prefill += prefill
    sums.speeds.append(tokens / seconds)
    stats = None if arm.applied is None else arm.applied.report.decoding
    if stats is None:
        return
    sums.steps += stats.steps
    sums.committed += sum(stats.committed)
    sums.draft_part += stats.draft_seconds
    sums.verify_part += stats.verify_seconds
    sums.rest_part += stats.overhead_seconds


def figures(task: str, slug: str, sums: Mapping[str, Sums]) -> Iterator[Measurement]:
    """What the catalogue keeps of one method on one task."""
    own = sums[slug]
    plain = [sums[name] for name in PLAIN]
    seconds = sum(one.seconds for one in plain) / len(plain)
    decode = sum(one.decode for one in plain) / len(plain)
    tokens, count = plain[0].tokens, own.prompts
    after = tokens - count  # the first token of each comes from the prompt's own pass

    def row(quantity: str, arm: Any, unit: str, value: float) -> Measurement:
        return Measurement(quantity, arm, unit, round(value, 5), None, count, task)

    yield row("tokens", "dense", "tokens", tokens)
    yield row("tokens", "method", "tokens", own.tokens)
    yield row("generation-time", "dense", "s", seconds)
    yield row("generation-time", "method", "s", own.seconds)
    yield row("generation-speed", "dense", "tokens/s", tokens / seconds)
    yield row("generation-speed", "method", "tokens/s", own.tokens / own.seconds)
    yield row("generation-speed", "ratio", "times", own.tokens / own.seconds / (tokens / seconds))
    yield row(
        "noise", "dense", "1", abs(plain[0].seconds - plain[1].seconds) / max(one.seconds for one in plain)
    )
    yield row("identical-outputs", "method", "1", own.same / count)
    if own.steps and after and own.tokens > count:
        step, speed = decode / after, (own.tokens - count) / own.decode
        tau = own.committed / own.steps
        busy = own.decode / own.steps / step  # a step of the method, in plain ones
        yield row("decode-speed", "dense", "tokens/s", 1 / step)
        yield row("decode-speed", "method", "tokens/s", speed)
        yield row("decode-speed", "ratio", "times", speed * step)
        bound = tau / (busy * (own.part("verify") + own.part("draft")))
        yield row("decode-speed-bound", "ratio", "times", bound)
        yield row("tokens-per-step", "method", "1", tau)
        for name in ("draft", "verify", "rest"):
            yield row(f"{name}-share", "method", "1", own.part(name))
        yield row("rest-per-pass", "method", "1", own.rest_part / own.verify_part)
    peer = sums.get(f"transformers beside {slug}")
    if peer is not None:
        yield row("transformers-time", "method", "s", peer.seconds)
        yield row("transformers-tokens", "method", "tokens", peer.tokens)
        against = (own.tokens / own.seconds) / (peer.tokens / peer.seconds)
        yield row("generation-speed-against-transformers", "ratio", "times", against)


def as_run(
    loaded: LoadedModel,
    slug: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Any],
    measured: Iterable[Measurement],
    seconds: float,
) -> dict[str, Any]:
    """A row in the catalogue's form."""
    device = str(loaded.device)
    facts = {name: value for name, value in loaded.facts.items() if isinstance(value, str | int | float)}
    run = Run(
        method=slug,
        model=loaded.ref,
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        environment=environment(device, loaded.model.config._attn_implementation),
        parameters=parameters,
        measurements=tuple(measured),
        model_revision=loaded.revision or "",
        model_facts={"architecture": loaded.model.config.model_type, **facts},
        inputs=inputs,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=device,
        key=uuid.uuid4().hex,
    )
    row = run.to_json()
    Run.from_json(row)  # what is kept must be fit for the catalogue
    return row


def speed(console: Console, loaded: LoadedModel, options: argparse.Namespace) -> None:
    """Run what is missing from the file, task by task."""
    asked = {"budget": options.budget, "prompts": options.prompts, "new_tokens": options.new_tokens}
    done = {
        (row["method"], row["inputs"]["task"])
        for row in finished(options.out)
        if row["inputs"].get("asked") == asked
    }
    chosen = {name: found[: options.prompts] for name, found in tasks().items() if name in options.tasks}
    with ExitStack() as undo:
        missing = [slug for slug in options.methods if any((slug, task) not in done for task in chosen)]
        if not missing:
            return
        verification_cost(loaded.model, refresh=True)  # as the machine is now
        arms = contenders(loaded, missing, options.budget, console, undo)
        console.print("warming up", style="dim")
        measure(loaded, arms, ["What is the sea?"], 16)
        for task, prompts in chosen.items():
            here = [slug for slug in missing if (slug, task) not in done]
            turns = {name: arm for name, arm in arms.items() if name in PLAIN or name.split()[-1] in here}
            begun = time.perf_counter()
            sums = measure(loaded, turns, prompts, options.new_tokens)
            took = time.perf_counter() - begun
            inputs = {"task": task, "asked": asked, "prompts": list(prompts)}
            rows = [
                as_run(
                    loaded,
                    slug,
                    _applied(arms[slug]).method.parameters(),
                    {**inputs, **arms[slug].given},
                    figures(task, slug, sums),
                    took / len(here),
                )
                for slug in here
            ]
            append(options.out, rows)
            gains = ", ".join(
                f"{row['method']} {value(row, 'generation-speed', 'ratio'):.2f}" for row in rows
            )
            console.print(f"{task}: {took:.0f} s; {gains}", highlight=False)


def _applied(arm: Contender) -> AppliedDecoder:
    assert arm.applied is not None
    return arm.applied


def value(row: Mapping[str, Any], quantity: str, arm: str = "method") -> float | None:
    """A figure of a row, or ``None``."""
    for measured in row["measurements"]:
        if measured["quantity"] == quantity and measured["arm"] == arm:
            return float(measured["median"])
    return None


def total(rows: Iterable[Mapping[str, Any]], quantity: str, arm: str = "method") -> float:
    """Sum over tasks."""
    return sum(value(row, quantity, arm) or 0.0 for row in rows)


def gain(rows: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second over several tasks, against plain decoding."""
    own = total(rows, "tokens") / total(rows, "generation-time")
    return own / (total(rows, "tokens", "dense") / total(rows, "generation-time", "dense"))


def speed_tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """One table per setting: speed by task, then where the time goes over all tasks."""
    for asked in dict.fromkeys(json.dumps(row["inputs"]["asked"], sort_keys=True) for row in rows):
        group = [row for row in rows if json.dumps(row["inputs"]["asked"], sort_keys=True) == asked]
        names = list(dict.fromkeys(row["inputs"]["task"] for row in group))
        settings = json.loads(asked)
        noise = max(value(row, "noise", "dense") or 0.0 for row in group)
        out = Table(
            title=f"{group[0]['model']} on {group[0]['environment']['hardware']}, budget {settings['budget']}, "
            f"{settings['prompts']} prompts a task, {settings['new_tokens']} tokens: speed against plain decoding "
            f"(two plain runs differ by up to {noise:.1%} on a task)"
        )
        columns = (
            *names,
            "all",
            "tau",
            "draft",
            "verify",
            "rest",
            "rest / pass",
            "bound",
            "of bound",
            "same",
        )
        out.add_column("method")
        for name in (*columns, "vs transformers"):
            out.add_column(name, justify="right")
        for slug in dict.fromkeys(row["method"] for row in group):
            out.add_row(slug, *_cells([row for row in group if row["method"] == slug], names))
        yield out


def _cells(own: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str]:
    by_task = {row["inputs"]["task"]: row for row in own}
    for name in names:
        yield f"{gain([by_task[name]]):.2f}" if name in by_task else "-"
    yield f"{gain(own):.2f}"

    def mean(quantity: str, arm: str = "method") -> float:
        weights = [value(row, "generation-time") or 0.0 for row in own]
        found = [value(row, quantity, arm) or 0.0 for row in own]
        return sum(map(float.__mul__, weights, found)) / sum(weights)

    yield f"{mean('tokens-per-step'):.2f}"
    for quantity in ("draft-share", "verify-share", "rest-share", "rest-per-pass"):
        yield f"{mean(quantity):.1%}"
    bound = mean("decode-speed-bound", "ratio")
    yield f"{bound:.2f}"
    yield f"{mean('decode-speed', 'ratio') / bound:.0%}" if bound else "-"
    yield f"{mean('identical-outputs'):.0%}"
    if not total(own, "transformers-time"):
        yield ""
        return
    theirs = total(own, "transformers-tokens") / total(own, "transformers-time")
    yield f"{total(own, 'tokens') / total(own, 'generation-time') / theirs:.2f}"


def sources(console: Console, loaded: LoadedModel, options: argparse.Namespace) -> None:
    """Tokens per pass of goose and its sources; nothing is timed, so they need not take turns."""
    chosen = {name: found[: options.prompts] for name, found in tasks().items() if name in options.tasks}
    for nodes in options.nodes:
        asked = {"nodes": nodes, "prompts": options.prompts, "new_tokens": options.new_tokens}
        done = {
            (row["inputs"]["source"], row["inputs"]["task"])
            for row in finished(options.out)
            if row["inputs"].get("asked") == asked
        }
        for name, tree in SOURCES.items():
            method = zoo.method("goose", tree=tree, node_budget=nodes, extended_budget=nodes)
            with method.apply(loaded) as applied:
                assert isinstance(applied, AppliedDecoder)
                for task, prompts in chosen.items():
                    if (name, task) in done:
                        continue
                    begun = time.perf_counter()
                    steps, committed = accepted(loaded, applied, prompts, options.new_tokens)
                    measured = [
                        Measurement("steps", "method", "passes", steps, None, len(prompts), task),
                        Measurement("tokens", "method", "tokens", committed, None, len(prompts), task),
                    ]
                    inputs = {"task": task, "source": name, "asked": asked, "prompts": list(prompts)}
                    row = as_run(
                        loaded,
                        "goose",
                        applied.method.parameters(),
                        inputs,
                        measured,
                        time.perf_counter() - begun,
                    )
                    append(options.out, [row])
                    console.print(f"{nodes} nodes, {name}, {task}: {committed / steps:.2f}", highlight=False)


def accepted(
    loaded: LoadedModel, applied: AppliedDecoder, prompts: Iterable[str], new_tokens: int
) -> tuple[int, int]:
    """Passes behind the prompts, and tokens that they committed."""
    steps = committed = 0
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(loaded.tokenizer, prompt)], device=loaded.device)
        options = greedy(loaded.tokenizer, new_tokens)
        with torch.no_grad():
            applied.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        stats = applied.report.decoding
        assert stats is not None
        steps += stats.steps
        committed += sum(stats.committed)
    return steps, committed


def source_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tokens per pass by source and number of nodes."""
    names = list(dict.fromkeys(row["inputs"]["task"] for row in rows))
    out = Table(title=f"Tokens per pass of {rows[0]['model']}: goose and its sources alone")
    for name in ("nodes", "source", *names, "all"):
        out.add_column(name, justify="left" if name == "source" else "right")
    for nodes in sorted({row["inputs"]["asked"]["nodes"] for row in rows}):
        for source in SOURCES:
            own = [row for row in rows if row["inputs"]["asked"]["nodes"] == nodes]
            own = [row for row in own if row["inputs"]["source"] == source]
            each = {row["inputs"]["task"]: total([row], "tokens") / total([row], "steps") for row in own}
            shown = [f"{each[name]:.2f}" if name in each else "-" for name in names]
            whole = f"{total(own, 'tokens') / total(own, 'steps'):.2f}" if own else "-"
            out.add_row(str(nodes), source, *shown, whole)
    return out


def lossless_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What the proofs found."""
    out = Table(title=f"Greedy output of {rows[0]['model']} against plain decoding")
    for name in ("method", "prompts", "tokens", "identical", "ties", "wrong", "tau"):
        out.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        counts = [value(row, name) for name in ("prompts", "tokens", "identical-outputs", "ties", "wrong")]
        tau = value(row, "tokens-per-step")
        out.add_row(row["method"], *(f"{count or 0:.0f}" for count in counts), f"{tau or 0:.2f}")
    return out


def report(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Everything a file holds."""
    proofs = [row for row in rows if row["inputs"].get("proof")]
    compared = [row for row in rows if "source" in row["inputs"]]
    timed = [row for row in rows if row not in proofs and row not in compared]
    for table in speed_tables(timed):
        console.print(table)
    if compared:
        console.print(source_table(compared))
    if proofs:
        console.print(lossless_table(proofs))


def lossless(console: Console, loaded: LoadedModel, options: argparse.Namespace) -> None:
    """Prove what is not proved yet in the file."""
    asked = {"proof": options.proof_prompts, "new_tokens": options.proof_tokens, "batch": options.batch}
    done = {row["method"] for row in finished(options.out) if row["inputs"].get("asked") == asked}
    left = [slug for slug in options.methods if slug not in done]
    draft = draft_model(loaded) if "speculative-sampling" in left else None
    for slug in left:
        begun = time.perf_counter()
        extra = resources(slug, loaded, draft, console.print)
        proof = prove(loaded, slug, extra, options.proof_prompts, options.proof_tokens, options.batch)
        took = time.perf_counter() - begun
        inputs = {"proof": "greedy output", "asked": asked, "differences": proof.differences}
        inputs |= described(extra)
        append(options.out, [as_run(loaded, slug, proof.parameters, inputs, proof.measurements(), took)])
        console.print(f"{slug}: {proof.summary}, {took:.0f} s", highlight=False)
        for line in proof.differences:
            console.print(f"  {line}", highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", default=list(tasks()), choices=list(tasks()), metavar="TASK")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--device", default=None, help="as in zoo run")
    parser.add_argument("--budget", choices=("auto", "fixed"), default="auto")
    parser.add_argument("--prompts", type=int, default=2, help="per task, at most 9")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="one prompt a task, 24 tokens")
    parser.add_argument("--sources", action="store_true", help="goose against its sources")
    parser.add_argument("--nodes", type=int, nargs="+", default=[16], help="with --sources")
    parser.add_argument("--lossless", action="store_true", help="compare outputs instead of times")
    parser.add_argument("--proof-prompts", type=int, default=50, help="with --lossless, at most 54")
    parser.add_argument("--proof-tokens", type=int, default=128, help="with --lossless")
    parser.add_argument("--batch", type=int, default=10, help="with --lossless: prompts at once")
    parser.add_argument("--out", type=Path, default=Path("decoding.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.new_tokens = 1, 24
    return options


def main() -> None:
    options = parse()
    console = Console(width=190)
    if not options.table:
        work = lossless if options.lossless else sources if options.sources else speed
        if options.device in (None, "cpu"):
            torch.set_num_threads(1)  # processor time is steady, and curves of verification cost fit, on one
        with quiet_transformers():
            work(console, load_model(options.model, device=options.device), options)
    report(console, finished(options.out))


if __name__ == "__main__":
    main()
