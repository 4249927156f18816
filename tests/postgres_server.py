"""A private PostgreSQL server for tests: on a unix socket in a folder of its own, gone when the tests are.

Skipped only where PostgreSQL (or its driver) is not installed. The server refuses to run as root, so root hands it to
the user ``postgres`` that the package has made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

OWNER = "postgres"


def programs() -> Path | None:
    """Folder of ``initdb`` and ``pg_ctl``: on the path, or where Debian puts the newest version."""
    found = shutil.which("initdb")
    if found and shutil.which("pg_ctl"):
        return Path(found).resolve().parent
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(folders, key=lambda folder: float(folder.parent.name), default=None)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a running server's own database."""
    pytest.importorskip("psycopg")
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed (apt-get install --no-install-recommends postgresql)")
    home = Path(
        tempfile.mkdtemp(prefix="zoo-pg-")
    )  # not tmp_path: a socket's path has at most 107 characters
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=120)
    if hasattr(os, "getuid") and os.getuid() == 0:
        shutil.chown(home, OWNER)
        run = partial(run, user=OWNER, group=OWNER, extra_groups=[])
    data, log = home / "data", home / "log"
    control = [folder / "pg_ctl", "-D", data, "-l", log, "-w"]
    options = f"-c listen_addresses='' -c unix_socket_directories='{home}' -c fsync=off"
    try:
        run(
            [
                folder / "initdb",
                "-D",
                data,
                "-U",
                "zoo",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "--no-sync",
            ]
        )
        run([*control, "-o", options, "start"])
        try:
            yield f"postgresql+psycopg://zoo@/postgres?host={home}"
        finally:
            run([*control, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(home)


@pytest.fixture
def database(postgres_server: str) -> str:
    """URL of a fresh, empty place: a schema of its own, which is made faster than a database."""
    name = f"zoo_{uuid.uuid4().hex}"
    engine = sa.create_engine(postgres_server, poolclass=sa.pool.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    return f"{postgres_server}&options=-csearch_path%3D{name}"
