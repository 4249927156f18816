"""Methods, vocabulary and bibliography beside the runs of a user or a team."""

from __future__ import annotations

from dataclasses import replace

import sqlalchemy as sa

from taxonomy import schema
from taxonomy.catalog.filling import fill_text
from taxonomy.catalog.sources import Sources
from taxonomy.runs import open_runs

_RUNS = {
    table.name
    for table in (schema.model, schema.environment, schema.run, schema.run_method, schema.measurement)
}
"""Tables of runs: in a user's catalogue they are the user's."""


def publish(sources: Sources, where: str | None = None) -> bool:
    """Put methods, vocabulary and bibliography beside the runs of the user's catalogue, so that SQL can join them.

    Meant for the PostgreSQL database of a team; a SQLite file takes them too. What an earlier call wrote is replaced,
    in one transaction; runs stay as they are, and the reference runs of the zoo do not get among them.

    Args:
        sources: what the catalogue is made from.
        where: file or SQLAlchemy URL; ``None`` = the user's own catalogue.

    Returns:
        Whether anything was written: what is there already is left alone.

    Raises:
        CatalogError: the sources contradict each other, or the catalogue cannot be opened or written.
    """
    sources = replace(sources, runs=())
    meta = schema.meta
    with open_runs(where) as store, store.writing() as connection:
        published = connection.execute(sa.select(meta.c.value).where(meta.c.key == "sources")).scalar()
        if published == sources.digest():
            return False
        connection.execute(meta.delete().where(meta.c.key == "sources"))
        for table in reversed(schema.metadata.sorted_tables):
            if table is not meta and table.name not in _RUNS:
                connection.execute(table.delete())
        schema.create_views(connection)  # their columns come from the vocabulary
        fill_text(connection, sources)
        schema.index_text(connection)
    return True
