"""A cache folder of its own for each test, and registries that live in a folder."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.models.packages import PackageFile


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("ZOO_HOME", str(folder))
    return folder


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PackageFile]:
    """Publish a wheel where pip (the real one) looks: a folder instead of a server."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def publish(content: bytes, tag: str = "py3-none-any", member: str = "pkg/data.bin") -> PackageFile:
        with zipfile.ZipFile(shelf / f"zoo_probe-1.0-{tag}.whl", "w") as wheel:
            wheel.writestr(member, content)
            wheel.writestr("pkg/other.bin", b"not asked for")
            wheel.writestr(
                "zoo_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: zoo-probe\nVersion: 1.0\n"
            )
            wheel.writestr(
                "zoo_probe-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
            )
            wheel.writestr("zoo_probe-1.0.dist-info/RECORD", "")
        return PackageFile("pip", "zoo-probe", "1.0", member, hashlib.sha256(content).hexdigest(), 0.01)

    return publish


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """An ``npm`` that knows one package: ``npm pack NAME@VERSION --pack-destination DIR ...`` writes a gzipped tar."""

    def publish(content: bytes) -> None:
        archive = tmp_path / "published.tgz"
        with tarfile.open(archive, "w:gz") as bundle:
            for name, data in (("package/data.bin", content), ("../escape.bin", b"never unpacked")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                bundle.addfile(entry, io.BytesIO(data))
        command = tmp_path / "bin" / "npm"
        command.parent.mkdir()
        command.write_text(
            f"#!{sys.executable}\n"
            "import shutil, sys\n"
            "if sys.argv[1:3] != ['pack', 'zoo-probe@1.0']:\n"
            "    sys.exit('npm error code E404\\nnpm error 404 Not Found: ' + sys.argv[2])\n"
            "folder = sys.argv[sys.argv.index('--pack-destination') + 1]\n"
            f"shutil.copy({str(archive)!r}, folder + '/zoo-probe-1.0.tgz')\n"
        )
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")

    return publish
