"""Whatever stands in the catalogue stays text: it never becomes markup, script, or an address that runs something."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from site_pages import parse

from taxonomy import schema
from taxonomy.errors import CatalogError
from taxonomy.site import render
from taxonomy.site.loading import load, web_address

HOSTILE = (
    "x\"'></title></textarea></svg><script>alert(1)</script><img src=x onerror=alert(1)>&amp;{{7*7}}{% raw %}"
)
KEYS = {"id", "slug", "facet", "term", "parent", "property", "method", "other", "paper", "source", "topic", "run",
        "model_id", "view", "kind", "basis", "family", "status", "arm", "key", "position"}  # fmt: skip
LISTS = {("method", "arxiv"), ("method", "authors"), ("method", "shown_on")}
JSON = {("parameter", "default"), ("parameter", "schema"), ("run", "parameters"), ("run", "inputs"), ("run", "report"),
        ("environment", "facts"), ("model", "facts")}  # fmt: skip


def poison(path: Path) -> int:
    """Put ``HOSTILE`` into every text column that is not a key; returns how many columns that were."""
    poisoned = 0
    with closing(sqlite3.connect(path)) as connection:
        for table in schema.metadata.sorted_tables:
            for column in table.columns:
                place = (table.name, column.name)
                if column.name in KEYS and place not in {("claim", "model"), ("verification", "model")}:
                    continue
                if place in LISTS:
                    value = json.dumps([HOSTILE])
                elif place in JSON:
                    value = json.dumps({HOSTILE: HOSTILE})
                elif "VARCHAR" in str(column.type) or "TEXT" in str(column.type):
                    value = HOSTILE
                else:
                    continue
                unique = column.unique or column.primary_key
                query = f'UPDATE "{table.name}" SET "{column.name}" = ?' + (
                    " || rowid"
                    if unique and table.name not in ("verification", "parameter", "measurement")
                    else ""
                )
                try:
                    connection.execute(query, (value,))
                    poisoned += 1
                except sqlite3.IntegrityError:
                    connection.execute(query + " || hex(randomblob(8))", (value,))
                    poisoned += 1
        connection.execute(
            "UPDATE paper SET url = 'javascript:alert(1)', code = ? WHERE arxiv LIKE '%1'", (HOSTILE,)
        )
        connection.execute("UPDATE paper SET arxiv = NULL, url = 'javascript:alert(1)' WHERE id % 3 = 0")
        connection.execute("UPDATE method SET code = 'javascript:alert(1)' WHERE id % 2 = 0")
        connection.commit()
    return poisoned


@pytest.fixture(scope="module")
def hostile(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "catalog.sqlite"
    shutil.copy(built, path)
    assert poison(path) > 40
    return path


def test_hostile_text_stays_text(hostile: Path) -> None:
    seen = methods = 0
    for name, content in render(load(hostile)):
        assert b"<script>alert" not in content or name.startswith("data/"), name
        assert b"<img" not in content or name.startswith("data/"), name
        if name.startswith("methods/"):
            methods += 1
        if name.endswith(".html") and (
            methods % 6 == 1 or "flap" in name or not name.startswith(("methods/", "bibliography/2"))
        ):
            page = parse(name, content)  # strict: broken markup raises
            for node in page.tree.iter():
                assert node.tag != "img", name
                if node.tag == "script":
                    assert node.attrib["src"].lstrip("./").startswith("assets/"), name
                    assert node.text is None, name
                for attribute, value in node.attrib.items():
                    assert not attribute.startswith("on"), name
                    if attribute in ("href", "src", "data-index"):
                        assert not value.strip().lower().startswith(("javascript:", "data:", "vbscript:")), (
                            name
                        )
            seen += HOSTILE in page.text()
            assert "49{%" not in page.text(), name
        elif name == "data/bibliography.js":
            rows = json.loads(content.decode()[len("window.zooPapers=") : -2])["rows"]
            assert all(
                not link or link.startswith(("https://", "http://")) for row in rows for link in row[3:5]
            )
        elif name.endswith(".json"):
            assert json.loads(content)
    assert seen > 40


def test_a_slug_that_would_leave_the_folder_is_refused(built: Path, tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    shutil.copy(built, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE method SET slug = '../../flap' WHERE slug = 'flap'")
        connection.commit()
    with pytest.raises(CatalogError, match="not a slug"):
        load(path)


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("https://example.org/a?b=c#d", True),
        ("http://example.org", True),
        ("javascript:alert(1)", False),
        ("https://example.org/\"onclick='x'", False),
        (" https://example.org", False),
        ("//example.org", False),
        (None, False),
    ],
)
def test_only_plain_web_addresses_become_links(text: str | None, link: bool) -> None:
    assert web_address(text) == (text if link else None)
