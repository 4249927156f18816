"""Reading commands: what they print on a terminal, in a pipe and as JSON, and how they fail."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from taxonomy import queries
from taxonomy.vocabulary import CORE_FACETS, FACETS, PROPERTIES
from zoo.cli import evidence_commands, main, method_card, output, taxonomy_commands
from zoo.cli.output import Column, print_table

Zoo = Callable[..., tuple[int, str, str]]

COMMANDS = [
    ("list",),
    ("find", "--where", "before-llm", "--training", "none", "--no-needs-attention-maps"),
    ("search", "cache"),
    ("show", "flap"),
    ("compare", "flap", "cfsp", "fastv"),
    ("papers", "token", "merging"),
    ("papers", "--topics"),
    ("taxonomy", "tree"),
    ("taxonomy", "tree", "--scheme", "generation-refinement"),
    ("taxonomy", "matrix"),
    ("taxonomy", "matrix", "family", "where"),
    ("taxonomy", "terms"),
    ("taxonomy", "gaps"),
    ("results",),
    ("recommend", "--model", "a-llama", "--for", "decode"),
]


@pytest.fixture
def zoo(as_catalog: Path, capsys: pytest.CaptureFixture[str]) -> Zoo:
    """Run a command: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        code = end.value.code
        assert isinstance(code, int) or code is None
        printed = capsys.readouterr()
        return code or 0, printed.out, printed.err

    return run


@pytest.fixture
def on_terminal(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Run a command on a terminal of so many columns: its lines."""

    def run(width: int, *arguments: str) -> list[str]:
        screen = StringIO()

        def terminal() -> Console:
            return Console(file=screen, width=width, force_terminal=True, no_color=True, highlight=False)

        for module in (output, method_card, taxonomy_commands, evidence_commands):
            monkeypatch.setattr(module, "terminal", terminal)
        assert zoo(*arguments)[0] == 0
        return re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("width", [80, 200])
def test_lines_fit_the_terminal(
    on_terminal: Callable[..., list[str]], command: tuple[str, ...], width: int
) -> None:
    lines = on_terminal(width, *command)
    assert lines
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("width", [80, 200])
def test_no_word_of_a_list_is_cut(on_terminal: Callable[..., list[str]], width: int) -> None:
    shown = on_terminal(width, "list")
    words = set(" ".join(shown).split())
    assert words >= {row.slug for row in queries.list_methods(queries.open_catalog())}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_pipes_are_plain_and_json_is_json(zoo: Zoo, command: tuple[str, ...]) -> None:
    code, out, err = zoo(*command)
    assert (code, err) == (0, "")
    assert out.endswith("\n")
    assert "\x1b" not in out
    assert "…" not in out
    code, out, err = zoo(*command, "--json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), list | dict)


def test_tables_in_a_pipe_are_tab_separated(zoo: Zoo) -> None:
    header, *rows = zoo("list")[1].splitlines()
    assert header.split("\t")[:4] == ["method", "year", "family", "runs"]
    assert {len(row.split("\t")) for row in rows} == {len(header.split("\t"))}
    assert any(row.startswith("flap\t2023\tWeight pruning\t✓\t") for row in rows)


def test_find_takes_every_facet_and_property(zoo: Zoo) -> None:
    code, out, _ = zoo("find", "--help")
    assert code == 0
    for name in FACETS:
        assert f"--{name.replace('_', '-')} " in out
    for name in PROPERTIES:
        assert f"--{name.replace('_', '-')}" in out
    for name in CORE_FACETS:
        term = FACETS[name].terms[0].id
        found = {row["slug"] for row in json.loads(zoo("find", f"--{name}", term, "--json")[1])}
        others = {row["slug"] for row in json.loads(zoo("find", f"--not-{name}", term, "--json")[1])}
        assert not found & others
        assert len(found | others) == len(queries.list_methods(queries.open_catalog()))


def test_comma_is_or_and_repeating_is_and(zoo: Zoo) -> None:
    def slugs(*options: str) -> set[str]:
        return {row["slug"] for row in json.loads(zoo("find", *options, "--json")[1])}

    before, inside = slugs("--where", "before-llm"), slugs("--where", "inside-llm")
    assert slugs("--where", "before-llm,inside-llm") == before | inside
    assert slugs("--where", "before-llm", "--where", "inside-llm") == before & inside
    assert slugs("--not-where", "before-llm,inside-llm", "--where", "before-llm") == set()
    assert slugs("--year", "2024..2025", "--name", "p") == {
        row.slug
        for row in queries.list_methods(queries.open_catalog())
        if 2024 <= row.year <= 2025 and ("p" in row.slug or "p" in row.name.lower())
    }
    assert slugs("--implemented") | slugs("--no-implemented") == slugs()
    assert slugs("--kind", "survey").isdisjoint(slugs())
    assert slugs("--kind", "all") > slugs()


def test_show_says_what_is_true(zoo: Zoo) -> None:
    out = zoo("show", "flap")[1]
    page = json.loads(zoo("show", "flap", "--json")[1])
    assert page["summary"].split()[0] in out
    assert "✓ verified on tiny-llama" in out  # the property that was executed
    assert "1 of 1 golden case" in out
    assert page["unverified_claims"]
    for claim in page["unverified_claims"]:
        assert claim["value"] not in out.split("Reported")[1].split("Fidelity")[0]
    assert f"{len(page['unverified_claims'])} recalled figures" in out
    assert all(claim["value"] in out for claim in page["claims"])
    assert "zoo run flap" in out
    assert "wanda-sp" in out


def test_show_of_a_card_without_implementation(zoo: Zoo) -> None:
    rows = queries.list_methods(queries.open_catalog(), implemented=False)
    out = zoo("show", rows[0].slug)[1]
    assert "not implemented yet" in out
    assert "zoo run" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "flpa"), "did you mean flap?"),
        (("compare", "flap"), "at least two"),
        (("compare", "flap", "csfp"), "did you mean cfsp?"),
        (("find", "--where", "befor-llm"), "did you mean before-llm?"),
        (("find", "--year", "soon"), "2023..2025"),
        (("list", "--kind", "methods"), "known: method"),
        (("taxonomy", "matrix", "where", "sgnal"), "did you mean signal?"),
        (("taxonomy", "tree", "--view", "x"), "known: core"),
        (("taxonomy", "terms", "wher"), "did you mean where or when?"),
        (("papers", "--topic", "pruning-stuff"), "pruning"),
        (("search", "***"), "at least one word"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(zoo: Zoo, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = zoo(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_unknown_commands_and_options(zoo: Zoo) -> None:
    code, _, err = zoo("shw")
    assert code == 2
    assert "there is no command 'shw'; did you mean show?" in err
    assert zoo("show", "flap", "--nonsense")[0] == 2
    assert zoo("show")[0] == 2


def test_help_everywhere(zoo: Zoo) -> None:
    code, out, _ = zoo("--help")
    assert code == 0
    for name in re.findall(r"^  (\w+) ", out.partition("Look things up")[2], re.MULTILINE):
        code, text, _ = zoo(name, "--help")
        assert code == 0, name
        assert text.startswith(f"Usage: zoo {name}")
    assert zoo("--version")[1].startswith("zoo ")


def test_a_catalogue_of_another_time_or_damaged_inside(
    zoo: Zoo, as_catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "catalog.sqlite"
    monkeypatch.setattr("taxonomy.paths.catalog_file", lambda: path)
    content = as_catalog.read_bytes()
    path.write_bytes(content)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE alembic_version SET version_num = '0000'")
    code, _, err = zoo("list")
    assert (code, err.count("\n")) == (2, 1)
    assert "older zoo (schema 0000)" in err
    page = 4096
    path.write_bytes(content[: 8 * page] + b"\xff" * (len(content) - 8 * page))
    code, _, err = zoo("papers", "pruning")
    assert (code, err.count("\n")) == (2, 1)
    assert "damaged" in err


def test_no_hit_is_no_failure(zoo: Zoo) -> None:
    code, out, err = zoo("search", "zzzzqqqq")
    assert (code, out) == (0, "")
    assert "No card mentions" in err
    assert json.loads(zoo("papers", "zzzzqqqq", "--json")[1]) == []


def test_markup_in_data_is_text() -> None:
    screen = StringIO()
    console = Console(file=screen, width=60, force_terminal=True, no_color=True)
    print_table([Column("[red]head")], [["[bold]cell[/bold] [CLS]"]], console=console)
    assert "[red]head" in screen.getvalue()
    assert "[bold]cell[/bold] [CLS]" in screen.getvalue()


@pytest.mark.parametrize("width", [5, 20, 80])
def test_tables_survive_narrow_terminals(width: int) -> None:
    screen = StringIO()
    console = Console(file=screen, width=width, force_terminal=True, no_color=True)
    print_table([Column("a"), Column("b")], [["x" * 50, "some words that wrap"]], console=console)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.count("x") for line in lines) == 50  # folded, not cut
