"""The user's catalogue: runs, with the environment they were measured in.

It is a SQLite file in the user's data folder, or whatever ``ZOO_CATALOG`` names (a path, or a SQLAlchemy URL such as
``postgresql+psycopg://...`` for a team). It is created on first use, upgraded in one transaction when an older zoo
made it, and never touched by ``zoo catalog build``. Several processes may write and read at once: SQLite runs in WAL
mode and every write is one short ``BEGIN IMMEDIATE`` transaction.
"""

from taxonomy.runs.database import reading, upgrade
from taxonomy.runs.queries import Result, ask, results
from taxonomy.runs.refusals import shown
from taxonomy.runs.run import IMPORTED, TRIAL, Measurement, Run, canonical_json, digest
from taxonomy.runs.store import RunStore, insert_run, open_runs, record_run, run_row

__all__ = [
    "IMPORTED",
    "TRIAL",
    "Measurement",
    "Result",
    "Run",
    "RunStore",
    "ask",
    "canonical_json",
    "digest",
    "insert_run",
    "open_runs",
    "reading",
    "record_run",
    "results",
    "run_row",
    "shown",
    "upgrade",
]
