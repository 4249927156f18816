"""``zoo pareto | recommend | export | import``: what they print and write."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from catalog_fixtures import make_run, proof_of, timed_on
from test_reading_commands import Zoo, on_terminal, zoo

from taxonomy.catalog import Measurement as Figure
from taxonomy.catalog import open_runs
from taxonomy.charts import ticks
from zoo.cli.evidence_commands import PLOT_HEIGHT
from zoo.cli.plotting import scatter

__all__ = ["on_terminal", "zoo"]


@pytest.fixture
def measured(as_catalog: Path) -> None:
    """Two pruning runs on a model called small."""
    with open_runs() as store:
        for method, gain, kept in (("flap", 1.5, 0.9), ("cfsp", 1.2, 0.99)):
            figures = (
                Figure("prefill-time", "ratio", "times", gain, None, 1, "128 tokens"),
                Figure("perplexity", "ratio", "times", kept, None, 1, "news"),
            )
            store.record(make_run(method=method, model="small", measurements=figures))


@pytest.mark.usefixtures("measured")
def test_pareto_draws(on_terminal: Callable[..., list[str]]) -> None:
    lines = on_terminal(100, "pareto", "--model", "small", "--family", "weight-pruning")
    plot = "\n".join(lines)
    assert "○" in plot
    assert "perplexity, share kept" in plot
    drawn = [re.split("[│┤]", line)[-1] for line in lines[2 : 2 + PLOT_HEIGHT]]
    first, second = (next(n for n, line in enumerate(drawn) if mark in line) for mark in "21")
    assert first < second, "2 (cfsp) keeps more, so it stands above 1 (flap)"


@pytest.mark.usefixtures("measured")
def test_pareto_lists_in_a_pipe(zoo: Zoo) -> None:
    code, out, _ = zoo("pareto", "--model", "small")
    rows = list(csv.reader(io.StringIO(out), delimiter="\t"))
    assert code == 0
    assert [row[1:4] for row in rows[1:]] == [
        ["flap", "sparsity=0.3", "1.50×"],
        ["cfsp", "sparsity=0.3", "1.20×"],
    ]
    _, out, _ = zoo("pareto", "--model", "small", "--json")
    (front,) = json.loads(out)
    assert [point["best"] for point in front["points"]] == [True, True]
    code, out, err = zoo("pareto", "--model", "nobody")
    assert (code, out) == (0, "")
    assert "No finished run" in err


@pytest.fixture
def drafters(as_catalog: Path) -> None:
    with open_runs() as store:
        for method, gains in (("goose", (1.0, 1.5)), ("rest", (0.8, 1.01))):
            for task, gain in zip(("chat", "rag"), gains, strict=True):
                store.record(timed_on(task, gain, method=method))
        store.record(proof_of("goose", 50, 50))


@pytest.mark.usefixtures("drafters")
def test_pareto_of_lossless_methods_tells_the_tasks(zoo: Zoo, on_terminal: Callable[..., list[str]]) -> None:
    code, out, _ = zoo("pareto", "--family", "decoding")
    head, *rows = csv.reader(io.StringIO(out), delimiter="\t")
    assert code == 0
    assert head[1:8] == ["method", "setting", "decode-speed", "chat", "rag", "tokens/pass", "kept"]
    assert [row[1:8] for row in rows] == [
        ["goose", "", "1.20×", "1.00×", "1.50×*", "1.33", "50/50"],
        ["rest", "", "0.89×", "0.80×", "1.01×", "0.76", "100.0%"],
    ]
    shown = "\n".join(on_terminal(100, "pareto", "--family", "decoding"))
    assert "beyond the noise (5.0%)" in " ".join(shown.split())
    assert "┤" not in shown, "nothing is drawn where all points would lie at one height"


@pytest.mark.usefixtures("drafters")
def test_pareto_draws_methods_that_lose_something_and_tells_the_tasks(
    on_terminal: Callable[..., list[str]],
) -> None:
    with open_runs() as store:
        for task in ("chat", "rag"):
            store.record(timed_on(task, 2.0, method="medusa", same=0.5))
    shown = "\n".join(on_terminal(100, "pareto", "--family", "decoding"))
    assert "identical-outputs, share kept" in shown
    assert re.search(r"medusa +2.00× +2.00×\* +2.00×\* +50.0%", shown)


@pytest.mark.usefixtures("measured")
def test_recommend_answers_with_a_command(zoo: Zoo) -> None:
    code, out, _ = zoo("recommend", "--model", "small", "--for", "prefill", "--max-loss", "2%")
    assert code == 0
    assert "zoo run cfsp --model small --set sparsity=0.3" in out
    assert "flap" not in out
    _, out, _ = zoo("recommend", "--model", "unknown", "--for", "prefill", "--max-loss", "20%", "--json")
    answer = json.loads(out)
    assert {pick["basis"] for pick in answer["picks"]} == {"like"}
    code, _, err = zoo("recommend", "--model", "small", "--for", "fun")
    assert code == 2
    assert "prefill, decode, memory" in err


@pytest.mark.usefixtures("measured")
def test_export_formats_agree(zoo: Zoo, tmp_path: Path) -> None:
    _, out, _ = zoo("export", "measurements", "--own")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert {row["method"] for row in rows} == {"flap", "cfsp"}
    _, out, _ = zoo("export", "measurements", "--own", "-f", "json")
    assert [str(row["median"]) for row in json.loads(out)] == [row["median"] for row in rows]
    _, out, _ = zoo("export", "measurements", "--own", "-f", "latex")
    assert r"flap & sparsity=0.3 & small & 1.500 & 0.900 \\" in out
    _, out, _ = zoo("export", "measurements", "--own", "-f", "bibtex")
    assert out.count("@") == 2
    _, out, _ = zoo("export", "terms", "-f", "latex")
    assert r"visual-tokens" in out
    assert r"\&" in out or r"\_" in out


@pytest.mark.usefixtures("measured")
def test_export_of_parquet_reads_back(zoo: Zoo, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    target = tmp_path / "m.parquet"
    assert zoo("export", "measurements", "--own", "-o", str(target))[0] == 0
    table = parquet.read_table(target).to_pylist()
    assert sorted(row["median"] for row in table) == [0.9, 0.99, 1.2, 1.5]


@pytest.mark.usefixtures("measured")
def test_runs_go_out_and_come_in(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "runs.json"
    assert zoo("export", "runs", "--own", "-o", str(target))[0] == 0
    monkeypatch.setenv("ZOO_CATALOG", str(tmp_path / "fresh.sqlite"))
    assert "2 runs imported" in zoo("import", str(target))[1]
    assert json.loads(zoo("import", str(target), "--json")[1])["known"] == 2
    assert zoo("results", "--own")[1].count("imported") == 2


def test_what_no_format_can_hold_is_refused(zoo: Zoo) -> None:
    assert "written as JSON" in zoo("export", "runs", "-f", "csv")[2]
    assert "cannot be written as BibTeX" in zoo("export", "terms", "-f", "bibtex")[2]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.93, 1.87, 5) == [1.0, 1.2, 1.4, 1.6, 1.8]
    assert ticks(-0.06, 1.06, 4) == [0.0, 0.5, 1.0]
    for low, high, most in ((0, 1e-5, 4), (0.999, 1.0011, 3), (3, 9000, 6)):
        found = ticks(low, high, most)
        assert 1 <= len(found) <= most
        assert low <= found[0] <= found[-1] <= high


def test_scatter_keeps_to_its_size() -> None:
    lines = scatter([(1, 1, "○"), (2, 0, "a")], width=30, height=8, across="x", up="y")
    assert len(lines) == 1 + 8 + 3
    assert max(map(len, lines)) <= 30 + 16
    places = {mark: [n for n, line in enumerate(lines) if mark in line] for mark in "○a"}
    assert places["○"] < places["a"], "up is more"
