"""Putting a built site in its folder: all of it or nothing, and only what changed.

A build streams ``(name, content)`` pairs in here. Files that are already there with the same bytes are left alone;
the first one that differs starts a folder aside, which takes the place of the old one when everything is written.
A build that fails half-way therefore leaves the old site as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from taxonomy.errors import TaxonomyError

MARKER = ".zoo-site"
"""A folder with this file in it is a site that a build may replace."""

_MARK = b"Built by `zoo site build`, which replaces this folder as a whole.\n"


class SiteError(TaxonomyError):
    """The site cannot be built, written or served."""


@dataclass(frozen=True)
class Published:
    """What a build did: the folder, and how many files it wrote, left as they were, and took away."""

    folder: Path
    written: int
    unchanged: int
    removed: int

    @property
    def pages(self) -> int:
        """Number of files of the site."""
        return self.written + self.unchanged


def publish(files: Iterable[tuple[str, bytes]], folder: Path) -> Published:
    """Write ``files`` (relative POSIX name, content) as the whole content of ``folder``.

    Raises:
        SiteError: ``folder`` is something else than an empty folder or an earlier site, or cannot be written.
    """
    folder = folder.expanduser().resolve()
    _check(folder)
    aside: Path | None = None
    kept: list[str] = []
    written = 0
    seen: set[str] = set()
    try:
        there = _files_of(folder)
        for name, content in _marked(files):
            if name in seen or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise SiteError(f"the site has two files called {name}, or a name that leaves its folder")
            seen.add(name)
            if name in there and _same(folder / name, content):
                kept.append(name)
                continue
            if aside is None:
                folder.parent.mkdir(parents=True, exist_ok=True)
                aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            _write(aside / name, content)
            written += 1
        gone = there - seen
        if gone and aside is None:
            aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        if aside is not None:
            for name in kept:
                _carry(folder / name, aside / name)
            aside.chmod(0o755)
            _swap(aside, folder)
            aside = None
    except OSError as error:
        raise SiteError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return Published(folder, written, len(kept), len(gone))


def _marked(files: Iterable[tuple[str, bytes]]) -> Iterable[tuple[str, bytes]]:
    yield MARKER, _MARK
    yield from files


def _check(folder: Path) -> None:
    if folder.is_file():
        raise SiteError(f"{folder} is a file; name a folder for the site with --out")
    if folder.is_dir() and not (folder / MARKER).is_file() and any(folder.iterdir()):
        raise SiteError(
            f"{folder} holds something else than a site; name an empty or a new folder with --out"
        )


def _same(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _carry(old: Path, new: Path) -> None:
    """The same file in the new folder: a second name for it where the file system can, else a copy."""
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def _files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _swap(aside: Path, folder: Path) -> None:
    """Put ``aside`` in the place of ``folder``; if that fails, what was there is put back."""
    if not folder.exists():
        aside.rename(folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
    folder.rename(old / "site")
    try:
        aside.rename(folder)
    except OSError:
        (old / "site").rename(folder)
        raise
    finally:
        with suppress(OSError):
            shutil.rmtree(old)
