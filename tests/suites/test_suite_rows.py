"""Rows as questions, from files and from the hub (played by a made-up library)."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from suite_files import write_rows

from zoo.errors import BadInput, DownloadFailed, NeedsExtra
from zoo.suites.rows import Question, read_questions
from zoo.suites.tables import Dataset, Pictures, load_suite


def png(width: int = 9) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (width, 5), "red").save(stored, format="PNG")
    return stored.getvalue()


def dataset(**fields: Any) -> Dataset:
    return Dataset.model_validate({"name": "made-up", "ability": "any", "hub": "owner/name", **fields})


def question(row: dict[str, Any], **fields: Any) -> Question:
    return Question(dataset(**fields), row)


def test_lines_of_empty_columns_are_left_out(suite_file: Path) -> None:
    first, second = read_questions(load_suite(str(suite_file)).dataset("shapes"))
    assert first.text == "Context: It is one colour.\nWhich colour is it?\nA. red\nB. blue\nThe letter."
    assert second.text == "Which colour is it?\nA. red\nB. blue\nThe letter."
    assert (first.expected, second.expected) == (("A",), ("B",))
    assert first.pictures()[0].size == (40, 48)


def test_a_limit_takes_the_first_questions(suite_file: Path) -> None:
    colours = load_suite(str(suite_file)).dataset("colours")
    assert [one.text for one in read_questions(colours, 2)] == ["Is it red, 0?"] * 2
    assert len(read_questions(colours)) == 6
    assert [one.text for one in read_questions(colours)[3:5]] == ["Is it red, 1?", "Is it red, 2?"]


def test_choices_in_columns_and_written_as_lists() -> None:
    row = {"question": "?", "A": "x", "B": "y", "C": None, "D": "nan", "answer": "B"}
    columns = question(row, choices=["A", "B", "C", "D"], rule="letter")
    assert columns.choices == ("x", "y")
    fields = {
        "choices": "options",
        "rule": "letter",
        "otherwise": "open",
        "open_prompt": "{question} In a word.",
    }
    written = question({"question": "?", "options": "['x', 'y']", "answer": "A"}, **fields)
    assert (written.choices, written.rule, written.text) == (("x", "y"), "letter", "?")
    free = question({"question": "?", "options": "[]", "answer": "['a', 'b']"}, **fields)
    assert (free.rule, free.expected, free.text) == ("open", ("a", "b"), "? In a word.")
    by_text = question(
        {"question": "?", "options": ["x", "y"], "answer": "y"}, **{**fields, "answer_as": "text"}
    )
    assert by_text.expected == ("B",)
    with pytest.raises(BadInput, match="made-up: answer='z' cannot be understood"):
        _ = question({"options": ["x"], "answer": "z"}, **{**fields, "answer_as": "text"}).expected


def test_rows_that_lack_something() -> None:
    bare = question({"answer": "x"}, prompt="{hint}\n{name}: {question}")
    assert bare.text == ""
    assert question({"question": "{x}?", "name": None}, prompt="{name}: {question}").text == ": {x}?"
    with pytest.raises(BadInput, match="made-up: answer=None cannot be understood"):
        _ = question({}).expected
    with pytest.raises(BadInput, match="kind=None cannot be understood"):
        bare.key(("kind",))
    held = Pictures(config="pictures", split="test", key="picture")
    with pytest.raises(BadInput, match="no picture"):
        Question(dataset(pictures=held), {"picture": "1"}, {}).pictures()


def test_rules_by_row() -> None:
    fields: dict[str, Any] = {"rule": "contains", "rule_for": {"source=maths": "formula"}}
    assert question({"source": "maths", "answer": "x"}, **fields).rule == "formula"
    assert question({"source": "books", "answer": "x"}, **fields).rule == "contains"
    assert question({"answer": "two"}, rule="letter", otherwise="exact").rule == "exact"
    assert question({"answer": "B"}, rule="letter", otherwise="exact").rule == "letter"


def test_groups_of_numbers_modulo() -> None:
    made = question({"index": "2000007", "answer": "A"}, groups=[["index"]], modulo={"index": 1_000_000})
    assert made.key(("index",)) == ("7",)


@pytest.mark.parametrize("form", ["bytes", "parquet", "base64", "uri", "picture"])
def test_pictures_in_every_form(form: str) -> None:
    stored = png(400)
    text = base64.b64encode(stored + b" " * 400).decode()
    value: Any = {
        "bytes": stored,
        "parquet": {"bytes": stored, "path": None},
        "base64": text,
        "uri": f"data:image/png;base64,{text}",
        "picture": Image.open(io.BytesIO(stored)),
    }[form]
    (shown,) = question({"image": value, "image_2": None}, images=["image", "image_2"]).pictures()
    assert (shown.size, shown.mode) == ((400, 5), "RGB")


def test_what_is_no_picture() -> None:
    for value in (b"nothing", "no-such-file.png", 7):
        with pytest.raises(BadInput, match="made-up holds something that is no picture"):
            question({"image": value}).pictures()


def test_parquet_and_tsv(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"question": ["a", "b"], "answer": ["x", "y"], "image": [{"bytes": png(), "path": None}] * 2}
    parquet.write_table(arrow.table(rows), tmp_path / "rows.parquet")
    text = base64.b64encode(png(400) + b" " * 400).decode()
    (tmp_path / "rows.tsv").write_text(f"question\tanswer\timage\nc\tz\t{text}\n", encoding="utf-8")
    made = read_questions(dataset(hub=None, path=str(tmp_path)))
    assert [one.text for one in made] == ["a", "b", "c"]
    assert [one.pictures()[0].size for one in made] == [(9, 5), (9, 5), (400, 5)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": "nowhere.jsonl"}, "there is no .jsonl"),
        ({"path": "mini.toml"}, "cannot be read; give .jsonl"),
        ({"path": "broken.jsonl"}, "cannot be read"),
        ({"path": "signs.jsonl"}, "no column 'answer'; it has question, answers, image"),
        ({"path": "signs.jsonl", "answer": "answers", "images": ["photo"]}, "no column 'photo'"),
        ({"path": "signs.jsonl", "answer": "answers", "prompt": "{text}"}, "no column 'text'"),
        ({"path": "empty.jsonl"}, "has no rows"),
    ],
)
def test_files_that_cannot_be_used(suite_file: Path, fields: dict[str, Any], said: str) -> None:
    (suite_file.parent / "broken.jsonl").write_text("{", encoding="utf-8")
    write_rows(suite_file.parent / "empty.jsonl", [])
    place = str(suite_file.parent / fields["path"])
    with pytest.raises(BadInput, match=said):
        read_questions(dataset(**{**fields, "hub": None, "path": place}))


# --- the hub ----------------------------------------------------------------------------------------------------------


class Table(list[dict[str, Any]]):
    """Rows as the datasets library gives them."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def cast_column(self, column: str, kind: Any) -> Table:
        assert kind == "as stored"
        return Table({**row, column: {"bytes": row[column], "path": None}} for row in self)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A library with two tables; what it was asked for."""
    calls: list[tuple[Any, ...]] = []
    tables = {
        None: Table({"question": f"{n}?", "answer": "x", "image": png(n + 1)} for n in range(3)),
        "words": Table({"question": f"{n}?", "answer": "x", "picture": str(n)} for n in range(2)),
        "pictures": Table({"id": n, "image": png(20 + n)} for n in range(2)),
    }

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Table:
        calls.append((name, config, split, streaming))
        if name == "owner/gone":
            raise ConnectionError("the hub does not answer\nsecond line")
        return tables[config]

    library = SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: decode or "as stored")
    monkeypatch.setitem(sys.modules, "datasets", library)
    return calls


def test_the_hub_is_streamed_with_a_limit(asked: list[tuple[Any, ...]]) -> None:
    made = read_questions(dataset(split="validation"), 2)
    assert [one.pictures()[0].width for one in made] == [1, 2]
    assert len(read_questions(dataset())) == 3
    assert asked == [("owner/name", None, "validation", True), ("owner/name", None, "test", False)]


def test_pictures_in_a_table_of_their_own(asked: list[tuple[Any, ...]]) -> None:
    held = Pictures(config="pictures", split="test", key="picture")
    made = read_questions(dataset(config="words", pictures=held))
    assert [one.pictures()[0].width for one in made] == [20, 21]


def test_a_hub_that_does_not_answer(asked: list[tuple[Any, ...]]) -> None:
    with pytest.raises(
        DownloadFailed, match=r"\(owner/gone on the hub\) could not be fetched: the hub does not answer$"
    ):
        read_questions(dataset(hub="owner/gone"), 1)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of None fails
    with pytest.raises(NeedsExtra, match=r"efficiency-zoo\[datasets\]"):
        read_questions(dataset(), 1)
