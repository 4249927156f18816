from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.errors import DownloadFailed
from zoo.models import packages
from zoo.models.packages import PackageFile, fetch

Publish = Callable[..., PackageFile]
MEMBER = b"the member" * 1000


def kept(home: Path) -> list[str]:
    """All files in the cache, locks aside."""
    return sorted(path.name for path in home.rglob("*") if path.is_file() and path.name != ".lock")


def test_only_the_named_member_is_kept_and_then_needs_no_client(
    home: Path, registry: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = registry(MEMBER)
    path = fetch(file)
    assert path.read_bytes() == MEMBER
    assert path == file.path
    assert kept(home) == ["data.bin"]

    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a second fetch must not run a client")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    assert fetch(file) == path


def test_members_beside_are_kept_too_and_checked(home: Path, registry: Publish) -> None:
    file = registry(MEMBER)
    other = ("pkg/other.bin", hashlib.sha256(b"not asked for").hexdigest())
    with pytest.raises(
        DownloadFailed, match=r"pkg/other\.bin of zoo-probe 1\.0 \(pip\) is not the file expected"
    ):
        fetch(dataclasses.replace(file, beside=((other[0], "0" * 64),)))
    assert kept(home) == []
    path = fetch(dataclasses.replace(file, beside=(other,)))
    assert path.read_bytes() == MEMBER
    assert kept(home) == ["data.bin", "other.bin"]


def test_a_wrong_digest_is_refused_and_nothing_is_kept(home: Path, registry: Publish) -> None:
    file = dataclasses.replace(registry(MEMBER), sha256="0" * 64)
    with pytest.raises(DownloadFailed, match=r"not the file expected.*nothing was kept"):
        fetch(file)
    assert kept(home) == []
    assert not list(home.rglob("incoming-*"))


def test_what_is_missing_is_named(home: Path, registry: Publish) -> None:
    file = registry(MEMBER)
    with pytest.raises(DownloadFailed, match=r"zoo-probe 1\.0 \(pip\) has no member pkg/nowhere\.bin"):
        fetch(dataclasses.replace(file, member="pkg/nowhere.bin"))
    with pytest.raises(
        DownloadFailed, match=r"could not download zoo-probe 9\.9 \(pip\): Could not find a version"
    ):
        fetch(dataclasses.replace(file, version="9.9", sha256="1" * 64))
    assert kept(home) == []


def test_a_wheel_for_another_platform_gives_its_data_too(home: Path, registry: Publish) -> None:
    file = registry(MEMBER, tag="cp311-cp311-win_arm64")
    with pytest.raises(DownloadFailed, match="could not download"):
        fetch(file)
    assert fetch(dataclasses.replace(file, platforms=("win_arm64",))).read_bytes() == MEMBER


def test_a_damaged_archive_is_one_line(home: Path, tmp_path: Path, npm: Callable[[bytes], None]) -> None:
    npm(MEMBER)
    archive = tmp_path / "published.tgz"
    archive.write_bytes(archive.read_bytes()[:60])
    file = PackageFile("npm", "zoo-probe", "1.0", "package/data.bin", "0" * 64, 0.01)
    with pytest.raises(DownloadFailed, match="damaged; try again"):
        fetch(file)
    assert kept(home) == []


def test_npm_packages(home: Path, tmp_path: Path, npm: Callable[[bytes], None]) -> None:
    npm(MEMBER)
    file = PackageFile(
        "npm", "zoo-probe", "1.0", "package/data.bin", hashlib.sha256(MEMBER).hexdigest(), 0.01
    )
    assert fetch(file).read_bytes() == MEMBER
    assert kept(home) == ["data.bin"]
    assert not list(tmp_path.rglob("escape.bin"))
    with pytest.raises(
        DownloadFailed, match=r"could not download other 1\.0 \(npm\): 404 Not Found: other@1\.0"
    ):
        fetch(dataclasses.replace(file, package="other", sha256="1" * 64))


def test_missing_clients_are_named(
    home: Path, registry: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DownloadFailed, match=r"zoo-probe 1\.0 \(npm\) is an npm package and npm is not installed"
    ):
        fetch(dataclasses.replace(registry(MEMBER), kind="npm"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadFailed, match=r"fetched with pip, which this Python lacks.*ensurepip"):
        fetch(registry(MEMBER))


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, registry: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "file"))
    with pytest.raises(DownloadFailed, match=r"cannot write to the cache folder .*; set ZOO_HOME"):
        fetch(registry(MEMBER))


def test_an_interrupt_stops_the_client_and_leaves_nothing(
    home: Path, registry: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Client(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(packages.subprocess, "Popen", Client)
    monkeypatch.setattr(
        packages, "_command", lambda file, work: [sys.executable, "-c", "input()\nwhile True: pass"]
    )
    with pytest.raises(KeyboardInterrupt):
        fetch(registry(MEMBER))
    assert started[0].returncode is not None
    assert kept(home) == []
    assert not list(home.rglob("incoming-*"))


def test_leftovers_of_a_killed_process_are_cleared(home: Path, registry: Publish) -> None:
    file = registry(MEMBER)
    leftover = file.path.parent / "incoming-killed"
    leftover.mkdir(parents=True)
    (leftover / "member").write_bytes(b"half")
    fetch(file)
    assert kept(home) == ["data.bin"]


def test_processes_fetching_at_once_download_once(home: Path, registry: Publish) -> None:
    file = registry(MEMBER)
    program = (
        "import subprocess\nfrom zoo.models import packages\n"
        "plain = subprocess.Popen\n"
        "class Counted(plain):\n"
        "    def __init__(self, *a, **k):\n"
        "        print('client', flush=True)\n"
        "        super().__init__(*a, **k)\n"
        "packages.subprocess.Popen = Counted\n"
        f"path = packages.fetch(packages.{file!r})\n"
        "print(len(path.read_bytes()))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sorted(line for lines in said for line in lines) == [*[str(len(MEMBER))] * 3, "client"]
