"""What ran before, in brief: for taking up a sweep where it stopped, and for guessing how long one will take."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from taxonomy import paths, schema
from taxonomy.errors import EmptyCatalogError
from taxonomy.runs import IMPORTED, reading


@dataclass(frozen=True)
class Earlier:
    """A stored run.

    Attributes:
        key: of the run.
        cell: hash of what was asked, for cells of a sweep; see ``zoo.bench.plan.Cell``.
        task: name of the task; ``None`` for a side-by-side run.
        own: it was measured by this user, and neither imported nor shipped.
    """

    key: str
    cell: str | None
    method: str
    model: str
    task: str | None
    hardware: str
    status: str
    seconds: float
    own: bool


def earlier_runs(models: Collection[str], where: str | None = None) -> list[Earlier]:
    """Runs on the ``models``, oldest first: the user's own, imported ones and reference measurements.

    Args:
        models: references of models.
        where: file or URL of the user's catalogue; ``None`` = the usual one. It need not exist yet.

    Raises:
        CatalogError: a catalogue cannot be read.
    """
    run, model, environment = schema.run, schema.model, schema.environment
    query = (
        sa.select(
            run.c.key, run.c.method, run.c.status, run.c.seconds, model.c.ref, environment.c.hardware,
            run.c.inputs["cell"].as_string().label("cell"),
            run.c.inputs[("task", "name")].as_string().label("task"),
            environment.c.facts[IMPORTED].as_string().label("source"),
        )
        .join(model, model.c.id == run.c.model)
        .join(environment, environment.c.id == run.c.environment)
        .where(model.c.ref.in_(sorted(models)))
        .order_by(run.c.started, run.c.key)
    )  # fmt: skip
    found: dict[str, Earlier] = {}
    for place, own in ((str(paths.catalog_file()), False), (where or paths.user_catalog(), True)):
        if "://" not in place and not Path(place).is_file():
            continue
        # An empty file is one that another process is just creating: nothing is in it yet.
        with suppress(EmptyCatalogError), reading(place) as connection:
            for row in connection.execute(query).mappings():
                found[row["key"]] = Earlier(
                    key=row["key"],
                    cell=row["cell"],
                    method=row["method"],
                    model=row["ref"],
                    task=row["task"],
                    hardware=row["hardware"],
                    status=row["status"],
                    seconds=row["seconds"],
                    own=own and row["source"] is None,
                )
    return list(found.values())
