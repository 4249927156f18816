"""``zoo new``: what it writes works as it is, passes the linters, and never overwrites anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.cli.scaffold import scaffold
from zoo.errors import BadInput, RunFailed

ROOT = Path(zoo.__file__).parents[1]
FAMILIES = ("weights", "decoding", "visual-tokens", "encoder-tokens")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages, with one new method per family."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("zoo", "taxonomy"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    for name in ("pyproject.toml", "tests/conftest.py"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for family in FAMILIES:
        scaffold(f"my-{family}", family, root)
    return root


def test_new_methods_pass_their_tests(checkout: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/methods"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("....")


def test_new_cards_are_valid(checkout: Path) -> None:
    from taxonomy.card import load_card

    for family in FAMILIES:
        card = load_card(checkout / "taxonomy" / "cards" / f"my-{family}.toml")
        assert card.terms("training") == ("none",)


def test_new_files_pass_the_linter(checkout: Path) -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    files = [
        str(path) for path in checkout.rglob("*.py") if path.stem.removeprefix("test_").startswith("my_")
    ]
    assert len(files) == 8
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *arguments, *files], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("slug", "said"),
    [
        ("flap", "already"),
        ("prompt-lookup", "already"),
        ("My Method", "lower-case"),
        ("../evil", "lower-case"),
        ("2fast", "lower-case"),
        ("a--b", "lower-case"),
    ],
)
def test_bad_names_are_refused(checkout: Path, slug: str, said: str) -> None:
    before = sorted(checkout.rglob("*"))
    with pytest.raises(BadInput, match=said):
        scaffold(slug, "weights", checkout)
    assert sorted(checkout.rglob("*")) == before


def test_only_into_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a checkout"):
        scaffold("my-method", "weights", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_exist_are_kept(checkout: Path) -> None:
    module = checkout / "zoo" / "methods" / "weights" / "taken.py"
    module.write_text("# mine\n")
    with pytest.raises(BadInput, match="there already"):
        scaffold("taken", "weights", checkout)
    assert module.read_text() == "# mine\n"
    assert not (checkout / "taxonomy" / "cards" / "taken.toml").exists()


def test_a_card_that_exists_is_used(checkout: Path) -> None:
    card = checkout / "taxonomy" / "cards" / "wanda-sp.toml"
    if (ROOT / "zoo" / "methods" / "weights" / "wanda_sp.py").exists():
        pytest.skip("implemented by now")
    text = card.read_text()
    written = scaffold("wanda-sp", "weights", checkout)
    assert card not in written.paths
    assert card.read_text() == text
    assert "there already" in written.next_steps


def test_a_failure_leaves_nothing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def full(path: Path, *args: object, **kwargs: object) -> int:
        if path.name.startswith("test_"):
            raise OSError(28, "No space left on device")
        return real(path, *args, **kwargs)

    before = sorted(checkout.rglob("*"))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunFailed, match="no space left"):
        scaffold("unlucky", "decoding", checkout)
    assert sorted(checkout.rglob("*")) == before
