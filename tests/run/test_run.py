"""``zoo run`` from end to end, in this process and through its command line."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from offline_data import replace_data
from rich.console import Console
from typer.testing import CliRunner

import zoo
from taxonomy.runs import results
from zoo.bench.record import Piece, RunRecord
from zoo.bench.scenarios.decoding import pieces_of
from zoo.bench.settings import Settings
from zoo.cli import main
from zoo.engines.decoding import Step
from zoo.errors import BadInput, BadParameter
from zoo.html_report import render
from zoo.models.names import KNOWN
from zoo.models.tiny import byte_tokenizer
from zoo.panels import clean, draw
from zoo.runner import Request, RunInterrupted, parse_assignments, run

QUICK = Settings(repeats=1, new_tokens=6, windows=2, window=32, prompt=16)
SMALL = {"calibration_windows": 4}
PER_FAMILY = {
    "flap": ("tiny-llama", {}),
    "prompt-lookup": ("tiny-llama", {}),
    "divprune": ("tiny-llava", {}),
    "fastv": ("tiny-llava", {}),
    "tome": ("tiny-vit", {"r": 4}),
    "evit": ("tiny-dinov2", {"layers": [1, 2]}),
}


def quick(spec: str, model: str, **more: Any) -> RunRecord:
    return run(spec, model, Request(**{**SMALL, **more}), settings=QUICK)


def values(record: RunRecord, quantity: str) -> tuple[float | None, float | None]:
    (row,) = [row for row in record.comparisons if row.quantity == quantity]
    return row.dense and row.dense.median, row.method and row.method.median


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


FAST = ("--repeats", "1", "--max-new-tokens", "6", "--calibration-windows", "4")


# --- every family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", PER_FAMILY)
def test_each_family_runs_and_is_recorded(slug: str) -> None:
    model, parameters = PER_FAMILY[slug]
    record = quick(slug, model, parameters=parameters)
    assert record.status == "done"
    assert len(record.reports) == 1
    assert record.reports[0].method == slug
    assert any(row.bound is not None and row.efficiency for row in record.comparisons)
    (stored,) = results(reference=False)
    assert (stored.key, stored.method, stored.model, stored.status) == (record.key, slug, model, "done")
    assert len(stored.measurements) == len(list(record.measurements()))


def test_pruning_figures_are_those_of_the_pruned_model(tmp_path: Path) -> None:
    record = quick("flap", "tiny-llama", parameters={"sparsity": 0.3}, save=tmp_path / "pruned")
    again = zoo.load_model(str(tmp_path / "pruned"))
    dense, method = values(record, "parameters")
    assert method == pytest.approx(sum(p.numel() for p in again.model.parameters()) / 1e6)
    assert dense is not None
    assert method is not None
    assert method < dense
    flops = values(record, "flops")
    (prefill,) = [row for row in record.comparisons if row.quantity == "prefill-time"]
    assert prefill.bound == pytest.approx(flops[0] / flops[1])


def test_nothing_removed_is_nothing_lost() -> None:
    record = quick("flap", "tiny-llama", parameters={"sparsity": 0})
    assert values(record, "agreement")[1] == 1
    assert values(record, "kl")[1] == pytest.approx(0, abs=1e-6)
    assert values(record, "perplexity")[0] == values(record, "perplexity")[1]
    assert record.outputs is not None
    assert record.outputs.identical


def test_decoding_is_lossless_and_its_text_is_put_together_again() -> None:
    record = quick("prompt-lookup", "tiny-llama", prompt="one two one two one two")
    outputs = record.outputs
    assert outputs is not None
    assert outputs.identical
    assert "".join(piece.text for piece in outputs.pieces) == outputs.method.rstrip("\ufffd")
    stats = record.reports[0].decoding
    assert stats is not None
    assert values(record, "tokens-per-step")[1] == pytest.approx(sum(stats.committed) / stats.steps)


def test_a_model_may_have_a_usual_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dataclasses.replace(KNOWN["tiny-llama"], draft="tiny-llama-mha")
    monkeypatch.setitem(KNOWN, "tiny-llama", known)
    record = quick("speculative-sampling", "tiny-llama")
    assert "--draft tiny-llama-mha" in record.command
    assert sum(record.reports[0].decoding.drafted) > 0
    assert "--draft" not in quick("prompt-lookup", "tiny-llama").command
    named = quick("speculative-sampling", "tiny-llama", draft="flap:sparsity=0.1")
    assert "--draft flap:sparsity=0.1" in named.command


def test_draft_model_can_be_a_pruned_copy() -> None:
    record = quick("speculative-sampling", "tiny-llama", draft="flap:sparsity=0.1")
    assert record.outputs is not None
    assert record.outputs.identical
    assert sum(record.reports[0].decoding.drafted) > 0


def test_visual_tokens_shrink_the_cache_as_reported() -> None:
    record = quick("divprune", "tiny-llava", parameters={"keep_ratio": 0.25})
    assert record.reports[0].kept == 9
    own, full = record.bars["KV cache (kB)"][0]
    tokens = record.inputs["prompt tokens"]
    assert own / full == pytest.approx((tokens - 27) / tokens)
    assert any("random" in note for note in record.notes)
    assert values(record, "selection-time")[1] is not None


def test_encoder_with_everything_kept_has_equal_features() -> None:
    record = quick("tome", "tiny-vit", parameters={"r": 0})
    assert values(record, "cosine-cls")[1] == pytest.approx(1, abs=1e-6)
    assert values(record, "cosine-mean")[1] == pytest.approx(1, abs=1e-6)


def test_a_stack_measures_both_ideas() -> None:
    record = quick("prompt-lookup+flap", "tiny-llama", parameters={"sparsity": 0.2})
    assert record.method == "flap+prompt-lookup"
    assert [report.method for report in record.reports] == ["flap", "prompt-lookup"]
    quantities = [row.quantity for row in record.comparisons]
    assert "perplexity" in quantities
    assert "tokens-per-step" in quantities


def test_a_stack_of_visual_token_methods_reports_each_of_them() -> None:
    record = quick("divprune+fastv", "tiny-llava", parameters={"divprune.keep_ratio": 0.5, "fastv.layer": 2})
    assert [report.method for report in record.reports] == ["divprune", "fastv"]
    gone = [report.total - report.bars["visual tokens"][-1].kept for report in record.reports]
    own, full = record.bars["KV cache (kB)"][-1]
    tokens = record.inputs["prompt tokens"]
    assert min(gone) > 0
    assert own / full == pytest.approx((tokens - sum(gone)) / tokens)


def test_bfloat16_and_a_loaded_model() -> None:
    loaded = zoo.load_model("tiny-llama", dtype="bfloat16")
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    record = run("flap", loaded, Request(**SMALL), settings=QUICK)
    assert record.dtype == "bfloat16"
    assert all(torch.equal(parameter, before[name]) for name, parameter in loaded.model.named_parameters())


def test_the_same_seed_gives_the_same_figures() -> None:
    first, second = (quick("flap", "tiny-llama", seed=3) for _ in range(2))
    for quantity in ("perplexity", "kl", "parameters", "flops"):
        assert values(first, quantity) == values(second, quantity)


def test_global_state_is_left_alone() -> None:
    torch.manual_seed(5)
    threads, expected = torch.get_num_threads(), torch.random.get_rng_state()
    quick("prompt-lookup", "tiny-llama")
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert torch.get_num_threads() == threads


# --- interruption and failure -------------------------------------------------------------------------------------


def test_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what == "timing the decoding" and done == 0:
            raise KeyboardInterrupt

    target = tmp_path / "pruned"
    request = Request(**SMALL, save=target, report=tmp_path / "report")
    with pytest.raises(RunInterrupted) as caught:
        run("flap", "tiny-llama", request, settings=QUICK, progress=progress)
    record = caught.value.record
    assert record.status == "interrupted"
    assert values(record, "prefill-time")[1] is not None
    assert (target / "config.json").is_file()
    assert (tmp_path / "report" / "report.html").is_file()
    assert [stored.status for stored in results(reference=False)] == ["interrupted"]


def test_interrupt_exits_130_and_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import zoo.bench.scenarios.weights as scenario

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenario, "_decode", interrupted)
    code, out, err = command(capsys, "run", "flap", "-m", "tiny-llama", "--json", *FAST)
    assert code == 130
    assert json.loads(out)["status"] == "interrupted"
    assert "interrupted" in err


def test_failure_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo.bench.scenarios.weights as scenario

    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(scenario, "_decode", broken)
    with pytest.raises(zoo.ZooError, match="out of memory"):
        quick("flap", "tiny-llama")
    (stored,) = results(reference=False)
    assert stored.status == "failed"
    assert "memory" in (stored.error or "")


def test_a_catalogue_that_cannot_be_written_costs_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign.sqlite"
    foreign.write_text("this is no database, but some text that is long enough to be seen as damaged " * 9)
    monkeypatch.setenv("ZOO_CATALOG", str(foreign))
    record = quick("prompt-lookup", "tiny-llama")
    assert record.status == "done"
    assert any("could not be stored" in note for note in record.notes)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["flop"], "did you mean flap"),
        (["flap", "-s", "sparsty=0.1"], "did you mean sparsity"),
        (["flap", "-s", "sparsity"], "NAME=VALUE"),
        (["flap", "-s", "sparsity=1", "-s", "sparsity=2"], "given twice"),
        (["flap", "-s", "sparsity=much"], "number"),
        (["flap", "-m", "tiny-lama"], "tiny-llama"),
        (["flap", "-m", "tiny-vit"], "vision encoder"),
        (["divprune", "-m", "tiny-llama"], "vision-language"),
        (["flap", "--image", "china"], "leave out the image"),
        (["tome", "--prompt", "hello"], "leave out the prompt"),
        (["flap", "--prompt", " "], "empty"),
        (["flap", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["flap", "--calibration", "nowhere.txt"], "nowhere.txt"),
        (["tome", "--calibration", "nowhere.txt"], "no calibration"),
        (["prompt-lookup", "--save", "somewhere"], "nothing to save"),
        (["flap", "--draft", "tiny-llama"], "drafts nothing"),
        (["speculative-sampling"], "--draft"),
        (["medusa"], "zoo train medusa"),
        (["eagle"], "zoo train eagle"),
        (["medusa", "-m", "tiny-llama", "--heads", "nowhere"], "no heads that can be read"),
        (["goose", "--heads", "nowhere"], "no parameter 'heads'"),
        (["speculative-sampling", "-m", "tiny-llama", "--draft", "tome"], "prunes no weights"),
        (["flap+cfsp"], "one method per stage"),
        (["flap", "--save", "{file}"], "is a file"),
        (["flap", "--save", "{full}"], "not empty"),
        (["flap", "--report", "{file}/below"], "cannot be written"),
        (["flap", "-m", "tiny-llama", "--device", "abacus"], "abacus"),
        (["flap", "-m", "tiny-llama", "--dtype", "int3"], "int3"),
        (["prompt-lookup", "-m", "tiny-llama", "--prompt", "word " * 2000], "shorten it"),
        (["tome", "-m", "tiny-vit", "--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    words = [word.format(file=tmp_path / "file", full=tmp_path / "full") for word in words]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(capsys, "run", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_refusals_do_not_load_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom zoo.cli import main\n"
        "try:\n    main(['run', 'flop'])\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=_environment(tmp_path)
    )
    assert done.stdout.split() == ["2", "False"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.3", 0.3), ("12", 12), ("true", True), ("null", None), ("3,6,9", [3, 6, 9]), ("[3, 6]", [3, 6]),
        ("WIFV", "WIFV"), ("a,b", ["a", "b"]), ('"0.3"', "0.3"), ("", ""), ("x=y", "x=y"),
    ],
)  # fmt: skip
def test_assignments(text: str, value: object) -> None:
    assert parse_assignments([f"name={text}"]) == {"name": value}


def test_dashes_in_parameter_names_are_underscores() -> None:
    assert parse_assignments(["max-ngram=2", "prompt-lookup.rule=official"]) == {
        "max_ngram": 2,
        "prompt-lookup.rule": "official",
    }
    with pytest.raises(BadParameter):
        parse_assignments(["=3"])


def test_request_or_fields_but_not_both() -> None:
    with pytest.raises(TypeError):
        run("flap", "tiny-llama", Request(), seed=1)
    with pytest.raises(BadInput):
        run("flap", "tiny-llama", images=("china",))


# --- what is printed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records() -> dict[str, RunRecord]:
    """One record per family, made once."""
    patch = pytest.MonkeyPatch()
    replace_data(patch)
    try:
        made = {
            slug: run(slug, model, Request(**SMALL, parameters=parameters, store=False), settings=QUICK)
            for slug, (model, parameters) in PER_FAMILY.items()
        }
    finally:
        patch.undo()
    return made


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("slug", PER_FAMILY)
def test_panel_fits(records: dict[str, RunRecord], slug: str, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=False)
    draw(records[slug], console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    assert slug in text
    assert "bound" in text
    assert "\x1b" not in text
    for word in ("what", "speed"):
        assert word in text.lower()


def test_hostile_text_is_harmless(records: dict[str, RunRecord]) -> None:
    record = records["prompt-lookup"].model_copy(deep=True)
    assert record.outputs is not None
    hostile = "\x1b[2J<script>alert(1)</script>[bold]\x07"
    record.outputs.prompt = record.outputs.dense = record.outputs.method = hostile
    record.outputs.pieces = [Piece(text=hostile, accepted=True)]
    record.model.ref = hostile
    record.notes.append(hostile)
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    draw(record, console)
    shown = console.export_text()
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[bold]" in shown
    page = render(record)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


@pytest.mark.parametrize("slug", PER_FAMILY)
def test_html_is_valid_and_alone(records: dict[str, RunRecord], slug: str) -> None:
    html5lib = pytest.importorskip("html5lib")
    page = render(records[slug])
    html5lib.HTMLParser(strict=True).parse(page)
    assert "http://" not in page
    assert "https://" not in page
    for row in records[slug].comparisons:
        assert row.about.label in page


def test_clean_keeps_text_and_drops_controls() -> None:
    assert clean("a\tb\r\nc\x1b[0m\x00é漢🙂") == "a   b\nc\ufffd[0m\ufffdé漢🙂"


def test_pieces_wait_for_whole_characters() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("é!", add_special_tokens=False)["input_ids"]
    steps = [Step(0, (ids[0],), 0, 0), Step(0, tuple(ids[1:]), 2, 2)]
    assert pieces_of(tokenizer, steps) == [Piece(text="é!", accepted=True)]


# --- the command --------------------------------------------------------------------------------------------------


def test_json_is_the_record_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(
        capsys,
        "run",
        "flap",
        "-m",
        "tiny-llama",
        "-s",
        "sparsity=0.3",
        "--json",
        "--report",
        str(tmp_path / "r"),
        *FAST,
    )
    assert code == 0
    body = json.loads(out)
    measured = body.pop("measurements")
    record = RunRecord.model_validate(body)
    assert record.parameters["sparsity"] == 0.3
    assert [row["quantity"] for row in measured] == [row["quantity"] for row in record.measurements()]
    assert json.loads((tmp_path / "r" / "record.json").read_text())["key"] == record.key
    assert "--set sparsity=0.3" in record.command


def test_command_line_repeats_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    words = [
        "run",
        "evit",
        "-m",
        "tiny-dinov2",
        "-s",
        "layers=1,2",
        "--seed",
        "4",
        "--repeats",
        "1",
        "--json",
    ]
    _, out, _ = command(capsys, *words, "--no-record")
    first = json.loads(out)
    again = shlex.split(first["command"])
    assert again[0] == "zoo"
    _, out, _ = command(capsys, *again[1:], "--json", "--no-record")
    second = json.loads(out)
    assert second["command"] == first["command"]
    assert second["parameters"] == first["parameters"]
    assert results(reference=False) == []


def test_a_process_of_its_own(tmp_path: Path) -> None:
    picture = str(_picture(tmp_path))
    words = ["run", "tome", "-m", "tiny-deit", "-s", "r=4", "--repeats", "1", "--image", picture]
    done = subprocess.run(
        [sys.executable, "-m", "zoo", *words], capture_output=True, text=True, env=_environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert "tokens per block" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def _picture(folder: Path) -> Path:
    from PIL import Image

    path = folder / "picture.png"
    Image.linear_gradient("L").save(path)
    return path


def _environment(folder: Path) -> dict[str, str]:
    root = Path(zoo.__file__).parents[1]
    return {
        **os.environ,
        "PYTHONPATH": str(root),
        "ZOO_CATALOG": str(folder / "runs.sqlite"),
        "COLUMNS": "80",
    }


def test_models_lists_names_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "models", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["tiny-llava"]["random"] is True
    assert rows["smollm2-135m"]["licence"] == "Apache-2.0"
    code, out, _ = command(capsys, "models")
    assert "dinov2-small-saliency" in out


def test_doctor_reports_and_sets_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import zoo.doctor

    code, out, _ = command(capsys, "doctor", "--json")
    findings = {row["what"]: row["state"] for row in json.loads(out)}
    assert findings["torch"] == "fine"
    assert code == int("wrong" in findings.values())

    def broken() -> Any:
        raise RuntimeError("the disk is on fire")
        yield

    monkeypatch.setattr(zoo.doctor, "_cache", broken)
    code, out, _ = command(capsys, "doctor")
    assert code == 1
    assert "the disk is on fire" in out


def test_runner_shows_help() -> None:
    from typer.main import get_command

    from zoo.cli import app

    shown = CliRunner().invoke(app, ["run", "--help"])
    assert shown.exit_code == 0
    assert "--calibration-windows" in shown.output
    assert get_command(app) is not None
