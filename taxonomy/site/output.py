"""Putting a built site in its folder: all of it or nothing, and only what changed.

A build streams ``(name, content)`` pairs in here. Files that are already there with the same bytes are left alone;
the first one that differs starts a folder aside, which takes the place of the old one when everything is written.
A build that fails half-way therefore leaves the old site as it was.
"""

from __future__ import annotations

import filecmp
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from taxonomy.errors import TaxonomyError
from taxonomy.site.processes import spread

File = tuple[str, bytes | Path]
"""Relative POSIX name of a file, and its content, or the file that has it."""

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


def publish(parts: Sequence[Iterable[File]], folder: Path, processes: int = 1) -> Published:
    """Write the files of all ``parts`` as the whole content of ``folder``.

    Args:
        parts: each is gone through in one process, from its first file to its last.
        folder: of the site; made if need be.
        processes: how many may share the parts.

    Raises:
        SiteError: ``folder`` is something else than an empty folder or an earlier site, or cannot be written.
    """
    folder = folder.expanduser().resolve()
    _check(folder)
    aside = folder.parent / f".{folder.name}-{secrets.token_hex(8)}"
    try:
        put = _Putting(folder, aside, _files_of(folder))
        done = spread(put, [[(MARKER, _MARK)], *parts], processes)
        written, kept = ([name for part in done for name in part[kind]] for kind in (0, 1))
        for name, times in Counter(written + kept).items():
            if times > 1:
                raise SiteError(f"the site has two files called {name}")
        gone = put.there.difference(written, kept)
        if written or gone:
            for name in kept:
                _carry(folder / name, aside / name)
            _swap(aside, folder)
    except OSError as error:
        raise SiteError(f"{folder} cannot be written: {error.strerror or error}") from None
    except BrokenProcessPool:
        raise SiteError("a process that made pages was ended from outside; build the site again") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Published(folder, len(written), len(kept), len(gone))


@dataclass(frozen=True)
class _Putting:
    """Going through the files of a part: those that are not in ``folder`` already are written to ``aside``."""

    folder: Path
    aside: Path
    there: set[str]

    def __call__(self, part: Iterable[File]) -> tuple[list[str], list[str]]:
        """Names of the files that were written, and of those that were there."""
        written, kept = [], []
        for name, content in part:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise SiteError(f"the site has a file called {name}, which leaves its folder")
            if name in self.there and _same(self.folder / name, content):
                kept.append(name)
            else:
                _write(self.aside / name, content)
                written.append(name)
        return written, kept


def _check(folder: Path) -> None:
    if folder.is_file():
        raise SiteError(f"{folder} is a file; name a folder for the site with --out")
    if folder.is_dir() and not (folder / MARKER).is_file() and any(folder.iterdir()):
        raise SiteError(
            f"{folder} holds something else than a site; name an empty or a new folder with --out"
        )


def _same(path: Path, content: bytes | Path) -> bool:
    try:
        if isinstance(content, Path):
            return filecmp.cmp(path, content, shallow=False)
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def _write(path: Path, content: bytes | Path) -> None:
    try:
        _put(path, content)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        _put(path, content)


def _put(path: Path, content: bytes | Path) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)


def _carry(old: Path, new: Path) -> None:
    """The same file in the new folder: a second name for it where the file system can, else a copy."""
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def _files_of(folder: Path) -> set[str]:
    found = set()
    for place, _, names in os.walk(folder):
        inside = Path(place).relative_to(folder).as_posix()
        found.update(names if inside == "." else [f"{inside}/{name}" for name in names])
    return found


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
