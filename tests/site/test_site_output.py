"""A build replaces the site as a whole or not at all, and writes only what changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from taxonomy.site import build, pages
from taxonomy.site.output import MARKER, SiteError, publish
from taxonomy.site.processes import usable
from taxonomy.site.server import open_server
from zoo.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [("index.html", b"one"), ("methods/a.html", b"two"), ("methods/b.html", b"three")]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_an_unchanged_build_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "public"
    first = publish([PAGES], folder)
    assert (first.written, first.unchanged, first.removed) == (4, 0, 0)
    before, inode = state(folder), folder.stat().st_ino
    again = publish([PAGES], folder)
    assert (again.written, again.unchanged, again.removed) == (0, 4, 0)
    assert (state(folder), folder.stat().st_ino) == (before, inode)


def test_only_what_changed_is_written_and_what_is_gone_leaves(tmp_path: Path) -> None:
    folder = tmp_path / "public"
    publish([PAGES], folder)
    before = state(folder)
    done = publish([[PAGES[0], ("methods/b.html", b"new"), ("methods/c.html", b"four")]], folder)
    assert (done.written, done.unchanged, done.removed) == (2, 2, 1)
    assert state(folder)["index.html"] == before["index.html"]
    assert sorted(state(folder)) == [MARKER, "index.html", "methods/b.html", "methods/c.html"]
    assert (folder / "methods/b.html").read_bytes() == b"new"
    assert publish([[PAGES[0]]], folder).removed == 2
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_a_build_that_fails_leaves_the_old_site(tmp_path: Path) -> None:
    folder = tmp_path / "public"
    publish([PAGES], folder)
    before = state(folder)

    def broken() -> Iterator[tuple[str, bytes]]:
        yield "index.html", b"changed"
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        publish([broken()], folder)
    assert state(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_if_the_new_site_cannot_take_its_place_the_old_one_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "public"
    publish([PAGES], folder)
    before = state(folder)
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.name.startswith(".public-") and Path(to) == folder:
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SiteError, match="cannot be written: Input/output error"):
        publish([[("index.html", b"changed")]], folder)
    assert state(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_links_that_cannot_be_made_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "public"
    publish([PAGES], folder)

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    publish([[*PAGES[:2], ("methods/b.html", b"new")]], folder)
    assert (folder / "methods/a.html").read_bytes() == b"two"


def test_other_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(SiteError, match="something else than a site"):
        publish([PAGES], tmp_path)
    with pytest.raises(SiteError, match="is a file"):
        publish([PAGES], tmp_path / "mine.txt")
    with pytest.raises(SiteError, match="cannot be written"):
        publish([PAGES], tmp_path / "mine.txt" / "public")
    assert (tmp_path / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert publish([PAGES], tmp_path / "empty").written == 4


@pytest.mark.parametrize("name", ["../out.html", "/etc/passwd"])
def test_names_that_leave_the_folder_are_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(SiteError, match="leaves its folder"):
        publish([[PAGES[0], (name, b"")]], tmp_path / "public")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parts", [[[PAGES[0], PAGES[0]]], [[PAGES[0]], [PAGES[0]]]])
def test_names_that_repeat_are_errors(tmp_path: Path, parts: list[list[tuple[str, bytes]]]) -> None:
    with pytest.raises(SiteError, match="two files called index"):
        publish(parts, tmp_path / "public")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_copied_and_compared_as_it_is(tmp_path: Path) -> None:
    source, folder = tmp_path / "catalog", tmp_path / "public"
    source.write_bytes(b"one" * 100_000)
    publish([[("data/catalog", source)]], folder)
    assert (folder / "data/catalog").read_bytes() == source.read_bytes()
    assert publish([[("data/catalog", source)]], folder).written == 0
    source.write_bytes(b"two" * 100_000)
    assert publish([[("data/catalog", source)]], folder).written == 1
    assert (folder / "data/catalog").read_bytes() == source.read_bytes()


def many_parts() -> list[list[tuple[str, bytes]]]:
    return [[(f"{part}/{n}.html", f"{part} {n}".encode()) for n in range(20)] for part in "abcdef"]


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in state(folder)}


def test_several_processes_make_the_same_site(tmp_path: Path) -> None:
    done = publish(many_parts(), tmp_path / "one")
    assert publish(many_parts(), tmp_path / "three", processes=3).written == done.written == 121
    assert content(tmp_path / "three") == content(tmp_path / "one")
    before = state(tmp_path / "three")
    assert publish(many_parts(), tmp_path / "three", processes=3).unchanged == 121
    assert state(tmp_path / "three") == before
    changed = publish([*many_parts()[1:], [("g.html", b"new")]], tmp_path / "three", processes=3)
    assert (changed.written, changed.unchanged, changed.removed) == (1, 101, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]


def test_what_fails_in_another_process_leaves_the_old_site(tmp_path: Path) -> None:
    folder = tmp_path / "public"
    publish([PAGES], folder)
    before = state(folder)

    def broken() -> Iterator[tuple[str, bytes]]:
        yield "x.html", b"changed"
        raise RuntimeError("half-way")

    def ended() -> Iterator[tuple[str, bytes]]:
        yield "x.html", b"changed"
        os._exit(1)

    with pytest.raises(RuntimeError, match="half-way"):
        publish([*many_parts(), broken()], folder, processes=2)
    with pytest.raises(SiteError, match="ended from outside"):
        publish([*many_parts(), ended()], folder, processes=2)
    assert state(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_a_program_with_threads_is_not_forked() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert usable() == 1
    done.set()
    thread.join()


def test_a_large_site_is_made_by_several_processes(
    built: Path, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pages, "MANY", 1)
    monkeypatch.setattr(pages, "usable", lambda: asked.append(2) or 2)
    folder = build(built, tmp_path / "public").folder
    assert asked == [2]
    assert {name: text for name, text in content(folder).items() if name != MARKER} == files


def test_builds_do_not_depend_on_hashing_and_need_no_torch(built: Path) -> None:
    """Two processes with different hash seeds render the same bytes, and neither loads a model library."""
    script = (
        "import hashlib, sys\nfrom pathlib import Path\nfrom taxonomy.site import render\n"
        "from taxonomy.site.loading import load\nh = hashlib.sha256()\n"
        "for name, content in render(load(Path(sys.argv[1]))):\n    h.update(name.encode() + b'\\0' + content)\n"
        "assert not {'torch', 'transformers', 'zoo'} & set(sys.modules), 'heavy import'\nprint(h.hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(built)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_the_command_builds_and_says_what_it_did(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "public"
    arguments = ["site", "build", "--catalog", str(built), "--out", str(out)]
    code, said, _ = run(arguments, capsys)
    assert code == 0
    assert "files written" in said
    assert (out / "methods/flap.html").is_file()
    assert "nothing to write" in run(arguments, capsys)[1]


def test_what_goes_wrong_is_one_line(tmp_path: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "broken.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 200)
    for arguments, reason in (
        (["build", "--catalog", str(built), "--out", str(tmp_path)], "something else than a site"),
        (
            ["build", "--catalog", str(tmp_path / "none.sqlite"), "--out", str(tmp_path / "o")],
            "zoo catalog build",
        ),
        (["build", "--catalog", str(tmp_path / "broken.sqlite"), "--out", str(tmp_path / "o")], "damaged"),
        (["serve", "--dir", str(tmp_path)], "zoo site build"),
    ):
        code, _, said = run(["site", *arguments], capsys)
        assert code == 2
        assert reason in said
        assert said.count("\n") == 1


def test_the_server_gives_pages_to_this_machine_only(built: Path, tmp_path: Path) -> None:
    folder = build(built, tmp_path / "public").folder
    with open_server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            host, port = server.server_address[:2]
            assert host == "127.0.0.1"
            with urlopen(f"http://127.0.0.1:{port}/") as answer:
                assert b"<h1>" in answer.read()
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            with urlopen(f"http://127.0.0.1:{port}/data/catalog.sqlite") as answer:
                assert hashlib.sha256(answer.read()).digest() == hashlib.sha256(built.read_bytes()).digest()
            with pytest.raises(HTTPError, match="404"):
                urlopen(f"http://127.0.0.1:{port}/../../etc/passwd")
            with pytest.raises(SiteError, match="another one with --port"):
                open_server(folder, port)
        finally:
            server.shutdown()
            thread.join()
