"""Whether the committed catalogue is what the sources say."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from taxonomy import files, paths, schema
from taxonomy.catalog.sources import Sources
from taxonomy.catalog.writing import built_bytes


def check(sources: Sources, target: Path | None = None) -> str | None:
    """Compare the committed catalogue with what ``sources`` say, table by table.

    Returns:
        One line saying what differs, or ``None``. Bytes are compared too, but only between files written by the same
        SQLite version, which is part of the format.

    Raises:
        CatalogError: there is no catalogue, or it is damaged or foreign.
    """
    target = target or paths.catalog_file()
    content = built_bytes(sources)
    with files.plain_errors(str(target)):
        committed = files.connect(target, immutable=True)
        try:
            expected = sqlite3.connect(":memory:")
            try:
                with tempfile.NamedTemporaryFile(suffix=".sqlite", delete=False) as scratch:
                    scratch.write(content)
                try:
                    expected.execute("ATTACH ? AS built", (scratch.name,))
                    differing = list(_differences(committed, expected))
                    expected.execute("DETACH built")
                finally:
                    Path(scratch.name).unlink()
            finally:
                expected.close()
        finally:
            committed.close()
    if differing:
        return f"{target.name} is out of date: {'; '.join(differing)}; run: zoo catalog build"
    actual = target.read_bytes()
    version = slice(96, 100)  # SQLITE_VERSION_NUMBER of the library that wrote the file
    if actual[version] == content[version] and actual != content:
        return f"{target.name} has the right rows but other bytes than a fresh build; run: zoo catalog build"
    return None


def _differences(committed: sqlite3.Connection, expected: sqlite3.Connection) -> Iterator[str]:
    """One phrase per table (or definition) that is not the same in both; ``expected`` has the build attached."""
    definition = "SELECT name, sql FROM {}sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name"
    old = dict(committed.execute(definition.format("")))
    new = dict(expected.execute(definition.format("built.")))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        yield f"the definition of {_few(changed)} changed"
    for table in (*schema.metadata.sorted_tables, *schema.worked_out.sorted_tables):
        if table.name in changed:
            continue
        keys = [column.name for column in table.primary_key] if table.name != "method" else ["slug"]
        columns = keys + [
            column.name for column in table.columns if column.name not in keys and column.name != "id"
        ]
        chosen = ", ".join(f'"{name}"' for name in columns)
        query = f'SELECT {chosen} FROM {{}}"{table.name}"'
        before = {tuple(row[: len(keys)]): tuple(row) for row in committed.execute(query.format(""))}
        after = {tuple(row[: len(keys)]): tuple(row) for row in expected.execute(query.format("built."))}
        yield from _phrases(table.name, before, after)


def _phrases(table: str, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Iterator[str]:
    added, gone = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    changed = sorted(key for key in before.keys() & after.keys() if before[key] != after[key])
    for verb, keys in (("lacks", added), ("has too many", gone), ("has changed", changed)):
        if keys:
            shown = _few(list(dict.fromkeys(str(key[0]) for key in keys)))
            yield f"table {table} {verb} {len(keys)} row{'s' if len(keys) > 1 else ''} ({shown})"


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
