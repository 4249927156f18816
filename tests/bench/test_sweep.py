"""Sweeps: every cell is stored once, whatever happens to the others; stopping and going on lose nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_plans import Making, own_runs, stored

from taxonomy.runs import Run, results
from zoo.bench.cells import Workshop
from zoo.bench.plan import Cell, Plan, load_plan
from zoo.bench.sweep import Tally, earlier_like, settled, sweep
from zoo.bench.workers import Queue
from zoo.cli import main
from zoo.errors import BadInput

Planning = Callable[..., Plan]


def run(cells: list[Cell], **options: Any) -> Tally:
    tally = Tally(len(cells))
    sweep(cells, tally, **options)
    return tally


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


# --- in this process ----------------------------------------------------------------------------------------------


def test_every_cell_is_stored_with_its_figures(plan: Planning, text: Path, tmp_path: Path) -> None:
    quick = "repeats = 1, windows = 1, window = 8, prompt = 8, new_tokens = 2, calibration_windows = 2"
    cells = plan(tasks='["side-by-side"]', settings=f'{{ {quick}, calibration = "{text}" }}').cells()
    cells += plan().cells()
    lines = tmp_path / "out" / "runs.jsonl"
    tally = run([cells[0], *cells[3:]], output=lines)
    assert tally.said() == "4 of 4 cells: 4 done"
    assert stored() == {(cell.hash, "done"): 1 for cell in (cells[0], *cells[3:])}
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [Run.from_json(row).key for row in rows] == [row["key"] for _, row in tally.rows]
    quantities = {m.quantity for m in results("magnitude-sp", limit=None, reference=False)[-1].measurements}
    assert {"prefill-time", "perplexity", "weight-bytes"} <= quantities


def test_a_model_and_what_was_made_of_it_are_kept_between_cells(
    plan: Planning, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    prunings: list[str] = []
    import zoo.bench.cells as cells_module

    real = cells_module.load_model
    monkeypatch.setattr(cells_module, "load_model", lambda *a, **k: loads.append(a[0]) or real(*a, **k))
    few = f'length = 8, tokens = 16, text = "{text}"'
    cells = plan(
        methods='["magnitude-sp"]',
        models='["tiny-llama", "tiny-qwen2"]',
        tasks=f'[{{ name = "perplexity", {few} }}, {{ name = "agreement", {few} }}]',
    ).cells()

    def watch(cell: Cell, what: str, done: int, total: int) -> None:
        if what.startswith("pruning") and done == 0:
            prunings.append(cell.hash)

    tally = run(cells, watch=watch)
    assert loads == ["tiny-llama", "tiny-qwen2"]
    assert prunings == [cells[n].hash for n in (0, 2, 4, 6)]  # once per model and budget, not per task
    alone = Workshop().run(cells[1], lambda *_: None)  # and the figures are those of a fresh start
    assert alone["measurements"] == tally.rows[1][1]["measurements"]


def test_what_fails_is_marked_and_the_rest_goes_on(plan: Planning, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.methods.weights.magnitude_sp import MagnitudeSp

    def apply(self: Any, *_: object, **__: object) -> None:
        if self.sparsity == 0.2:
            raise ZeroDivisionError("a bug")
        raise MemoryError

    monkeypatch.setattr(MagnitudeSp, "apply", apply)
    cells = plan(methods='["magnitude-sp", "divprune", "prompt-lookup"]').cells()
    told = {cell.label.partition(",")[0]: row for cell, row in run(cells).rows}
    assert [row["status"] for row in told.values()] == ["failed", "failed", "refused", "refused", "done"]
    assert told["magnitude-sp sparsity=0.2"]["error"] == "ZeroDivisionError: a bug"
    assert "ran out of memory" in told["magnitude-sp sparsity=0.5"]["error"]
    assert "vision-language model" in told["divprune keep_ratio=0.2"]["error"]
    earlier = earlier_like(cells)
    assert set(settled(cells, earlier, None).values()) == {"refused", "done"}  # what failed is tried again


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a ring that came in a collection
def test_a_cell_that_takes_too_long_is_given_up(plan: Planning, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from zoo.methods.weights.magnitude_sp import MagnitudeSp

    monkeypatch.setattr(MagnitudeSp, "apply", lambda *_, **__: time.sleep(60))
    changed = plan(settings="{ timeout = 0.3 }", methods='["magnitude-sp"]', budgets="[0.2]").cells()
    ((_, row),) = run(changed).rows
    assert row["status"] == "failed"
    assert "longer than 0.3 s" in row["error"]


def test_a_row_that_cannot_be_stored_costs_its_cell(plan: Planning, monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo.bench.cells as cells_module

    real = cells_module.stored_form

    def stored_form(record: Any) -> dict[str, Any]:
        return real(record) | ({"report": {"kept": float("nan")}} if "+" not in record.method else {})

    monkeypatch.setattr(cells_module, "stored_form", stored_form)
    told = run(plan(methods='["prompt-lookup", "magnitude-sp+prompt-lookup"]', budgets="[0.2]").cells()).rows
    assert [row["status"] for _, row in told] == ["failed", "done"]
    assert "not storable as JSON" in told[0][1]["error"]


def test_nothing_is_kept_nowhere(plan: Planning, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing would be kept"):
        run(plan().cells(), store=False)
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match="cannot be written"):
        run(plan().cells(), output=tmp_path / "folder")


# --- stopping and going on ----------------------------------------------------------------------------------------


def test_ctrl_c_loses_nothing_and_resume_runs_the_rest(write_plan: Making) -> None:
    cells = load_plan(write_plan()).cells()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    tally = Tally(len(cells))
    with pytest.raises(KeyboardInterrupt):
        sweep(cells, tally, ended=stop)
    assert stored() == {(cells[0].hash, "done"): 1}
    left = [cell for cell in cells if cell.hash not in settled(cells, earlier_like(cells), None)]
    assert left == cells[1:]
    run(left)
    assert stored() == {(cell.hash, "done"): 1 for cell in cells}


def test_a_file_with_half_a_line_is_gone_on_with(plan: Planning, tmp_path: Path) -> None:
    cells = plan().cells()
    lines = tmp_path / "runs.jsonl"
    run(cells[:2], output=lines, store=False)
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-40])  # the machine went down while the second line was written
    assert settled(cells, [], lines) == {cells[0].hash: "done"}
    run(cells[1:], output=lines, store=False)
    assert settled(cells, [], lines) == {cell.hash: "done" for cell in cells}


def test_the_command_stops_and_goes_on(
    write_plan: Making, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_plan()
    code, out, err = command(capsys, "bench", str(path), "--dry-run", "--json")
    shown = json.loads(out)
    assert (code, len(shown["cells"])) == (0, 3)
    assert "unknown" in shown["estimate"]

    real, calls = Workshop.run, []

    def interrupted(self: Workshop, cell: Cell, progress: Any) -> Any:
        calls.append(cell.hash)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, cell, progress)

    monkeypatch.setattr(Workshop, "run", interrupted)
    code, _, err = command(capsys, "bench", str(path), "--timeout", "99")
    assert code == 130
    assert "1 of 3 cells: 1 done" in err
    assert f"go on with: zoo bench {path} --timeout 99.0 --resume" in err
    assert stored() == {(shown["cells"][0]["hash"], "done"): 1}

    code, out, err = command(capsys, "bench", str(path), "--resume", "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    assert "1 done before" in err
    assert "about" in err  # the estimate now has something to go by
    assert stored() == {(cell["hash"], "done"): 1 for cell in shown["cells"]}
    code, out, err = command(capsys, "bench", str(path), "--resume")
    assert (code, "nothing is left to run" in err) == (0, True)


def test_the_command_says_when_cells_failed(write_plan: Making, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_plan(models='["no-such-model"]', methods='["prompt-lookup"]')
    code, _, err = command(capsys, "bench", str(path))
    assert code == 1
    assert "1 of 1 cells: 1 failed" in err
    assert "run the failed cells again with" in err


def test_the_command_lists_tasks_and_needs_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "bench", "--tasks", "--json")
    names = [task["name"] for task in json.loads(out)]
    assert code == 0
    assert {"side-by-side", "perplexity", "agreement", "multiple-choice"} <= set(names)
    assert command(capsys, "bench")[0] == 2


# --- worker processes ---------------------------------------------------------------------------------------------


def test_workers_take_cells_of_their_own_group_first(plan: Planning) -> None:
    cells = plan(methods='["magnitude-sp"]', seeds="[0, 1]", tasks='["perplexity", "agreement"]').cells()
    groups = [cell.group for cell in cells]
    queue = Queue(cells)
    first = queue.take(None, set())
    second = queue.take(None, {first.group})
    assert (first, second) == (cells[0], cells[2])
    assert queue.take(groups[2], {groups[0]}) == cells[3]
    assert queue.take(groups[0], {groups[2]}) == cells[1]
    queue.put_back(cells[1])
    assert queue.take(None, set(groups)) == cells[1]


def test_a_killed_worker_costs_its_cell_and_nothing_else(plan: Planning) -> None:
    cells = plan(models='["tiny-llama", "tiny-qwen2"]').cells()
    killed: list[str] = []

    def watch(cell: Cell, *_: object) -> None:
        if not killed:
            (child,) = multiprocessing.active_children()
            os.kill(child.pid or 0, signal.SIGKILL)
            killed.append(cell.hash)

    tally = run(cells, workers=1, watch=watch)
    (failed,) = [row for _, row in tally.rows if row["status"] == "failed"]
    assert failed["inputs"]["cell"] == killed[0] == cells[0].hash
    assert "SIGKILL" in failed["error"]
    assert stored() == {(cell.hash, "failed" if cell == cells[0] else "done"): 1 for cell in cells}
    assert not multiprocessing.active_children()


def test_two_workers_give_what_one_process_gives(plan: Planning) -> None:
    cells = plan().cells()
    workshop = Workshop()
    here = {cell.hash: workshop.run(cell, lambda *_: None)["measurements"] for cell in cells}
    tally = run(cells, workers=2)
    assert {cell.hash: row["measurements"] for cell, row in tally.rows} == here
    assert len(own_runs()) == len(cells)


def test_a_worker_that_hangs_is_replaced(plan: Planning, text: Path) -> None:
    """The soft limit is Python's own; this one hangs where no signal handler runs."""
    slow = f'[{{ name = "perplexity", length = 16, tokens = 64, text = "{text}" }}]'
    cells = plan(methods='["prompt-lookup"]', tasks=slow, settings="{ timeout = 30 }").cells()
    stopped: list[int] = []

    def watch(*_: object) -> None:
        if not stopped:
            (child,) = multiprocessing.active_children()
            stopped.append(child.pid or 0)
            os.kill(child.pid or 0, signal.SIGSTOP)

    quick = [
        cell.model_copy(update={"settings": cell.settings.model_copy(update={"timeout": 0.5})})
        for cell in cells
    ]
    ((_, row),) = run(quick, workers=1, watch=watch).rows
    assert row["status"] == "failed"
    assert "longer than 0.5 s" in row["error"]
    assert not multiprocessing.active_children()
