"""``zoo eval``: a thin shell around ``zoo.evaluate`` and, with a suite, ``zoo.suites``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zoo.cli.output import Column, Json, complete_method, print_table
from zoo.errors import BadInput

if TYPE_CHECKING:
    from zoo.evaluation import Estimate, Evaluation


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder of a (pruned) model, short name (zoo models) or hub id.")
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "-t",
            help="Task, group, tag or pattern of the harness, or a task file (.yaml) or folder of such; separated by "
            "commas, repeatable. Task files can run Python of their folder. With --suite: some of its datasets.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="uniprunebench, effivlm-bench or a suite file (.toml), for a VLM."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="With --suite: ask with this method (or stack), too.",
            autocompletion=complete_method,
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="A parameter of the method; repeatable."),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option("--budget", help="Share of visual tokens that stays; repeatable. Default: the suite's."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="A second model, such as the dense one: same questions, differences."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="At most so many questions per task. Default: all."),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=0, help="Solved examples per question. Default: the task's own."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Sequences per forward pass. Default: 8, of a suite 1."),
    ] = None,
    timed: Annotated[
        int | None,
        typer.Option(
            "--timed", min=0, help="With --suite: questions per dataset on which speed is measured."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, help="Of everything random. Default: the harness's, as in published scores."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write everything here as JSON; of a suite, append each result as a line (JSONL).",
        ),
    ] = None,
    as_json: Json = False,
    no_record: Annotated[
        bool, typer.Option("--no-record", help="With --suite: do not store results in your catalogue.")
    ] = False,
) -> None:
    """Score a language model on standard tasks, or a vision-language model on a suite.

    Tasks are those of lm-evaluation-harness (pip install 'efficiency-zoo[eval]'). Folders that zoo run --save wrote
    are taken as they are, without remote code.

    --suite follows UniPruneBench or EffiVLM-Bench on their public datasets (pip install 'efficiency-zoo[datasets]'),
    with a method beside the unmodified model; datasets that need a judge are left out. Results are kept as they come.
    """
    from zoo.evaluation import BATCH, check_scores_target, write_scores
    from zoo.evaluation import evaluate as score

    if output is not None:
        check_scores_target(output)
    names = [name.strip() for part in tasks or () for name in part.split(",") if name.strip()]
    if suite is not None:
        from zoo.cli.suites import evaluate_suite

        if against is not None or shots is not None:
            raise BadInput("--against and --shots are for tasks of the harness; a suite takes --method")
        evaluate_suite(
            model, suite, names, method=method, assignments=assignments or [], budgets=budget, limit=limit,
            batch=batch or 1, timed=timed, device=device, dtype=dtype, seed=seed or 0, output=output,
            as_json=as_json, store=not no_record,
        )  # fmt: skip
        return
    if method is not None or assignments or budget or timed is not None or no_record:
        raise BadInput("--method, --set, --budget, --timed and --no-record go with --suite")
    found = score(
        model,
        names,
        against=against,
        limit=limit,
        shots=shots,
        batch=batch or BATCH,
        device=device,
        dtype=dtype,
        seed=seed,
        bars=sys.stderr.isatty(),
    )
    if output is not None:
        write_scores(found, output)
    if as_json:
        sys.stdout.write(found.to_json() + "\n")
    else:
        _draw(found)


def _draw(found: Evaluation) -> None:
    """The scores as a table; with a second model its scores and the differences beside them."""
    compared = found.against is not None
    columns = [
        Column("task", "bold cyan"),
        Column("metric"),
        Column("shots", "dim", "right"),
        Column("n", "dim", "right"),
        Column("score", "bold", "right"),
        Column("± stderr", "dim", "right"),
    ]
    if compared:
        columns += [
            Column("against", "", "right"),
            Column("± stderr", "dim", "right"),
            Column("difference", "bold", "right"),
            Column("± stderr", "dim", "right"),
        ]
    arrows = {True: " ↑", False: " ↓", None: ""}
    rows = []
    for score in found.scores:
        filtering = "" if score.filter == "none" else f" ({score.filter})"
        row = [
            score.task,
            f"{score.metric}{filtering}{arrows[score.higher_is_better]}",
            "" if score.shots is None else str(score.shots),
            str(score.n),
            *_cells(score.model),
        ]
        rows.append([*row, *_cells(score.against), *_cells(score.difference, "+")] if compared else row)
    models = found.model.ref + (f" against {found.against.ref}" if found.against is not None else "")
    part = f", at most {found.limit} questions per task" if found.limit is not None else ""
    print_table(columns, rows, foot=f"{models}: {found.dtype}, lm-evaluation-harness {found.harness}{part}")


def _cells(estimate: Estimate | None, sign: str = "") -> tuple[str, str]:
    if estimate is None:
        return "", ""
    return f"{estimate.value:{sign}.4f}", "" if estimate.stderr is None else f"{estimate.stderr:.4f}"
