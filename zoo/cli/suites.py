"""``zoo eval --suite``: results as they come, and the suite's own figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from zoo.cli.output import Column, counted, print_table, terminal

if TYPE_CHECKING:
    from zoo.suites.examination import Found, Trial
    from zoo.suites.scores import Summary
    from zoo.suites.tables import Dataset, Suite


def evaluate_suite(
    model: str,
    place: str,
    names: list[str],
    *,
    method: str | None,
    assignments: list[str],
    budgets: list[float] | None,
    output: Path | None,
    as_json: bool,
    store: bool,
    **options: Any,
) -> None:
    """Put a suite to a model; ``options`` are those of ``zoo.suites.examination.examine``."""
    from zoo.cli.running import progress_line
    from zoo.runner import parse_assignments
    from zoo.suites.examination import examine, record_summaries, summaries, trials_of
    from zoo.suites.tables import load_suite

    suite = load_suite(place)
    datasets = suite.chosen(names)
    trials = trials_of(method, parse_assignments(assignments), budgets, suite.budgets)
    found: list[Found] = []
    interrupted = False
    with progress_line() as progress:
        try:
            for one in examine(
                model,
                suite,
                trials,
                place=place,
                datasets=datasets,
                store=store,
                progress=progress,
                **options,
            ):
                found.append(one)
                if output is not None:
                    _append(output, _row(model, suite, one))
                with progress.pause():
                    typer.echo(_line(one), err=True)
        except KeyboardInterrupt:
            interrupted = True
    told = summaries(found)
    if as_json:
        _print_json(model, suite, datasets, found, told)
    else:
        for trial, summary in told:
            _draw(model, suite, trial, summary, [one for one in found if one.trial is trial])
        _draw_notes(suite, datasets, options.get("limit"))
    if store and not interrupted:
        record_summaries(suite, found)
    if interrupted:
        _say_interrupted([one.name for one in datasets], len(trials), found, store)
        raise typer.Exit(130)
    failed = sorted({one.dataset.name for one in found if one.error is not None})
    if failed:
        typer.echo(f"failed: {', '.join(failed)}; ask them again with --tasks {','.join(failed)}", err=True)
        raise typer.Exit(1)


def _say_interrupted(asked: Sequence[str], trials: int, found: Sequence[Found], stored: bool) -> None:
    done = [one.dataset.name for one in found]
    left = [name for name in asked if done.count(name) < trials]
    are = f"{counted(len(found), 'result')} {'is' if len(found) == 1 else 'are'} complete"
    kept = " and stored" if stored and found else ""
    typer.echo(f"interrupted: {are}{kept}; go on with --tasks {','.join(left)}", err=True)


# --- as they come -----------------------------------------------------------------------------------------------------


def _row(model: str, suite: Suite, one: Found) -> dict[str, Any]:
    """One result as JSON values."""
    return {
        "suite": suite.name,
        "model": model,
        "method": None if one.trial.method is None else one.trial.method.name,
        "parameters": None if one.trial.method is None else one.trial.method.parameters(),
        "dataset": one.dataset.name,
        "seconds": one.seconds,
        "error": one.error,
        "run": None if one.record is None else one.record.key,
        "kept": one.kept,
        "result": None if one.result is None else one.result.model_dump(),
    }


def _append(file: Path, row: dict[str, Any]) -> None:
    from zoo.errors import RunFailed

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunFailed(f"the result could not be written to {file}: {reason}") from None


def _line(one: Found) -> str:
    """What came of a dataset, in a line."""
    head = f"{one.dataset.name}, {one.trial.label}"
    if one.result is None:
        return f"!! {head}: {one.error}"
    result = one.result
    if result.method is None:
        return f"ok {head}: {_points(result.dense)}  {one.seconds:.1f} s"
    return (
        f"ok {head}: {_points(result.method)} (dense {_points(result.dense)}), loyalty {_points(result.loyalty)}"
        f"  {one.seconds:.1f} s"
    )


# --- at the end -------------------------------------------------------------------------------------------------------


def _draw(model: str, suite: Suite, trial: Trial, summary: Summary, found: Sequence[Found]) -> None:
    """A table of the datasets, ability by ability, and the suite's figures below it."""
    alone = summary.method is None
    columns = [Column("ability"), Column("dataset", "bold cyan"), Column("questions", "dim", "right")]
    columns += [Column("score" if alone else "dense", "", "right")]
    if not alone:
        columns += [
            Column("method", "bold", "right"),
            Column("retained", "", "right"),
            Column("loyalty", "", "right"),
        ]
    rows = []
    for name, ability in summary.abilities.items():
        own = [one.result for one in found if one.result is not None and one.result.ability == name]
        for result in own:
            cells = [name, result.dataset, str(result.questions), _points(result.dense)]
            rows.append(
                cells
                if alone
                else [*cells, _points(result.method), _share(result.ratio), _points(result.loyalty)]
            )
        if len(own) > 1:
            cells = [name, "mean", "", _points(ability.dense)]
            rows.append(cells if alone else [*cells, _points(ability.method), "", ""])
    console = terminal()
    console.print(f"{suite.title or suite.name}: {model}, {trial.label}", highlight=False, style="bold")
    print_table(columns, rows, console=console)
    for line in _figures(summary, found[-1] if found else None):
        console.print(line, highlight=False)
    console.print()


def _figures(summary: Summary, last: Found | None) -> list[str]:
    """The suite's own figures, in lines."""
    dense = _points(summary.dense)
    if summary.method is None:
        return [f"average: {dense} over {counted(len(summary.datasets), 'dataset')}"]
    lines = [
        f"average: {_points(summary.method)} of {dense}, over {counted(len(summary.datasets), 'dataset')}; "
        f"loyalty {_points(summary.loyalty)}"
    ]
    if summary.retained is not None:
        rest = summary.retained_without_lowest
        lines.append(
            f"retained: {_share(summary.retained)} on average, {_share(summary.retained_rms)} as root mean square; "
            f"least on {summary.lowest}: {_share(summary.lowest_ratio)}"
            + (f", {_share(rest)} on average without it" if rest is not None else "")
        )
    if summary.without_ratio:
        lines.append(f"no ratio: the unmodified model scores nothing on {', '.join(summary.without_ratio)}")
    if summary.unevenness is not None:
        lines.append(f"unevenness over datasets: {summary.unevenness:.2f}% (0 = all suffer alike)")
    if summary.prefill_gain is not None:
        decode = f", decoding {summary.decode_gain:.2f}x" if summary.decode_gain is not None else ""
        lines.append(f"speed: prefill {summary.prefill_gain:.2f}x{decode}")
    if last is not None and last.kept is not None:
        asked = f"{_share(last.trial.budget)} asked for, " if last.trial.budget is not None else ""
        mean, end = last.kept
        lines.append(
            f"visual tokens: {asked}{_share(mean)} left on average over the layers, {_share(end)} in the last one "
            f"(latest questions)"
        )
    return lines


def _draw_notes(suite: Suite, datasets: Sequence[Dataset], limit: int | None) -> None:
    """What the reader of the figures must know."""
    console = terminal()
    if limit is not None:
        console.print(
            f"At most {counted(limit, 'question')} of each dataset: not the benchmark's scores.", style="dim"
        )
    for one in suite.judged:
        console.print(f"left out: {one.name}, whose answers are judged by {one.judge}", style="dim")
    for one in datasets:
        if one.note is not None:
            console.print(f"{one.name}: {one.note}", style="dim", highlight=False)
    if suite.notes:
        console.print(f"reconstructed: {'; '.join(suite.notes)}", style="dim", highlight=False)


def _print_json(
    model: str,
    suite: Suite,
    datasets: Sequence[Dataset],
    found: Sequence[Found],
    told: Sequence[tuple[Trial, Summary]],
) -> None:
    body = {
        "suite": suite.name,
        "model": model,
        "results": [_row(model, suite, one) for one in found],
        "summaries": [
            {
                "method": None if trial.method is None else trial.method.name,
                "budget": trial.budget,
                **summary.model_dump(),
                "prefill_gain": summary.prefill_gain,
                "decode_gain": summary.decode_gain,
            }
            for trial, summary in told
        ],
        "left_out": {one.name: one.judge for one in suite.judged},
        "notes": [*suite.notes, *(f"{one.name}: {one.note}" for one in datasets if one.note is not None)],
    }
    sys.stdout.write(json.dumps(body, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def _points(value: float | None) -> str:
    """A score between 0 and 100."""
    return "" if value is None else f"{100 * value:.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"
