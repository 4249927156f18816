from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from zoo.data import (
    COPY_PROMPT,
    PICTURES,
    TEXTS,
    calibration_windows,
    digest,
    load_picture,
    load_texts,
)
from zoo.errors import BadInput, DownloadFailed, NeedsExtra
from zoo.models.tiny import byte_tokenizer

# --- texts ----------------------------------------------------------------------------------------------------


def cached(file: Any) -> None:
    if not file.path.is_file():
        pytest.skip(f"{file.label} is not in the cache yet; load it once with a connection")


@pytest.mark.network
def test_news_parts_share_no_item() -> None:
    cached(TEXTS["news"].file)
    calibration, heldout = load_texts("news", "calibration"), load_texts("news", "heldout")
    assert (len(calibration), len(heldout)) == (200, 100)
    assert [*calibration, *heldout] == load_texts("news")
    assert not set(calibration) & set(heldout)
    assert calibration[0].startswith("Hundreds of people have been forced to vacate their homes")
    assert sum(len(text.split()) for text in calibration) > 30_000
    wrong: Any = "test"
    with pytest.raises(BadInput, match="there is no split called 'test'"):
        load_texts("news", wrong)


def test_files_of_every_format(tmp_path: Path) -> None:
    expected = ["one é", "two\nlines"]
    (tmp_path / "a.txt").write_text("one é\n\n \ntwo\nlines\n\n", encoding="utf-8")
    assert [text.strip() for text in load_texts(tmp_path / "a.txt")] == expected
    rows = [{"text": "one é", "id": 1}, "two\nlines", {"text": "  "}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert load_texts(str(tmp_path / "a.jsonl")) == expected
    (tmp_path / "a.JSON").write_text(json.dumps(rows), encoding="utf-8")
    assert load_texts(tmp_path / "a.JSON") == expected


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    assert load_texts(tmp_path / "a.parquet") == ["one", "two"]
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "b.parquet")
    with pytest.raises(BadInput, match="a column 'text'"):
        load_texts(tmp_path / "b.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(NeedsExtra, match=r"pip install 'efficiency-zoo\[datasets\]'"):
        load_texts(tmp_path / "a.parquet")


class FakeDatasets:
    """Stands in for the datasets library: what it was asked for, and two splits."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def load_dataset(self, name: str, configuration: str | None, *, split: str, streaming: bool) -> Any:
        self.asked.append((name, configuration, split, streaming))
        if split == "offline":
            raise RuntimeError("connection refused\nby a long story")
        if split == "nowhere":
            raise ValueError("Bad split: nowhere.")
        return ({"text": f"text {row}" if row else " ", "abstract": "a", "id": row} for row in range(20_000))


def test_a_dataset_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatasets()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    texts = load_texts("hub:allenai/c4@en:validation:text")
    assert fake.asked == [("allenai/c4", "en", "validation", True)]
    assert texts == [f"text {row}" for row in range(1, 10_000)]
    assert load_texts("hub:owner/name:test:abstract")[0] == "a"
    load_texts("hub:owner/name")
    assert fake.asked[-1] == ("owner/name", None, "train", True)
    for place, message in (
        ("hub:name", "is not a dataset; write hub:OWNER/NAME"),
        ("hub:owner/name:train:title", "no column 'title'; it has text, abstract, id"),
        ("hub:owner/name:train:id", "holds no text in its column 'id'"),
        ("hub:owner/name:nowhere", "cannot be read: Bad split: nowhere$"),
    ):
        with pytest.raises(BadInput, match=message):
            load_texts(place)
    with pytest.raises(DownloadFailed, match=r"owner/name could not be fetched: connection refused$"):
        load_texts("hub:owner/name:offline")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NeedsExtra, match=r"pip install 'efficiency-zoo\[datasets\]'"):
        load_texts("hub:owner/name")


def test_digests_tell_texts_apart() -> None:
    assert digest(["ab", "c"]) == digest(["ab", "c"]) != digest(["a", "bc"])
    assert len(digest([])) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{broken', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "line 1 of .* have a field 'text'"),
        ("a.json", b'{"text": "x"}', "must hold a list"),
        ("a.json", b"[1]", "item 0 of .* must be a string"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.csv", b"text", r"texts are read from \.txt, \.jsonl, \.json, \.parquet files"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_texts_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match="there are no texts called 'nwes'; give a file, hub:OWNER/NAME, or one of"
    ):
        load_texts("nwes")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(BadInput, match="has no heldout part"):
        load_texts(tmp_path / "a.txt", "heldout")


# --- windows --------------------------------------------------------------------------------------------------


def test_windows_are_pieces_of_the_stream() -> None:
    tokenizer = byte_tokenizer()
    texts = ["abcdefghij" * 3, "0123456789" * 2]
    before = torch.get_rng_state()
    windows = calibration_windows(tokenizer, texts, samples=20, length=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert windows.shape == (20, 8)
    assert windows.dtype == torch.int64
    stream = "\n\n".join(texts) + "\n\n"
    for row in windows:
        assert tokenizer.decode(row) in stream
    assert torch.equal(windows, calibration_windows(tokenizer, texts, 20, 8, seed=1))
    assert not torch.equal(windows, calibration_windows(tokenizer, texts, 20, 8, seed=2))


def test_as_many_windows_as_the_text_has_and_not_one_more() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(48, 48 + 38)))  # 38 different characters, and the blank line: 40 tokens
    windows = calibration_windows(tokenizer, [text], samples=31, length=10)
    assert len({tuple(row.tolist()) for row in windows}) == 31
    with pytest.raises(BadInput, match="have 40 tokens and 32 windows of 10 need at least 41"):
        calibration_windows(tokenizer, [text], samples=32, length=10)
    with pytest.raises(BadInput, match="have 0 tokens and 1 windows of 10 need at least 10"):
        calibration_windows(tokenizer, [], samples=1, length=10)


def test_windows_refuse_nonsense() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(BadInput, match="needs a tokenizer"):
        calibration_windows(None, ["x"], 1, 1)
    with pytest.raises(BadInput, match="at least one window"):
        calibration_windows(tokenizer, ["x"], 0, 8)
    with pytest.raises(BadInput, match="not one string"):
        calibration_windows(tokenizer, "a long text", 1, 2)


def test_the_copy_prompt_asks_for_its_own_text() -> None:
    body, _, request = COPY_PROMPT.rstrip().rpartition("\n\n")
    assert request == "Repeat the text above, word for word."
    assert 60 < len(body.split()) < 150


# --- pictures -------------------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize("name", PICTURES)
def test_packaged_photographs(name: str) -> None:
    cached(PICTURES[name].file)
    picture = load_picture(name)
    width, height = picture.size
    assert picture.mode == "RGB"
    assert f"{width} x {height} pixels" in PICTURES[name].description


def test_own_pictures_come_upright_and_rgb(tmp_path: Path) -> None:
    picture = Image.new("L", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.png", exif=exif)
    loaded = load_picture(tmp_path / "a.png")
    assert (loaded.mode, loaded.size) == ("RGB", (2, 4))
    Image.new("P", (1, 1)).save(tmp_path / "b.gif")
    assert load_picture(str(tmp_path / "b.gif")).size == (1, 1)


def test_bad_pictures_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no picture chnia; give a file, or one of: china, flower"):
        load_picture("chnia")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(BadInput, match="is not a picture in a known format"):
        load_picture(tmp_path / "text.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="cannot be read as a picture"):
        load_picture(tmp_path / "half.png")
    with pytest.raises(BadInput, match="is a folder"):
        load_picture(tmp_path)
