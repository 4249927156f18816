"""Overlays: the patches that look kept are those that are kept, on every architecture, and the pages hold together."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import VLMS

import zoo
from zoo.bench.settings import Settings
from zoo.cli import main
from zoo.engines.reductions import Join, Keep, Merge, Transform
from zoo.errors import BadInput
from zoo.gallery import build_gallery
from zoo.models.tiny import IMAGE
from zoo.overlays import Step, Trace, _paint, _panels, carriers, draw, record
from zoo.runner import Request, run

QUICK = Settings(repeats=1, new_tokens=4)
KEPT = (255, 210, 63)


def photo(seed: int = 0, width: int = 120, height: int = 72) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(40, 200, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def traced(model: str, spec: str, pictures: list[Any], kind: str = "images", **values: Any) -> list[Trace]:
    loaded = zoo.load_model(model)
    mark = IMAGE if kind == "images" else "<video>"
    texts = [f"{'what ' * i}{mark} is it?" for i in range(len(pictures))]
    inputs = loaded.processor(text=texts, **{kind: pictures}, padding=True, return_tensors="pt")
    with zoo.method(spec, **values).apply(loaded) as applied:
        traces = record(applied, **inputs)
        assert all(layer.reducer.watch is None for layer in getattr(applied, "layers", [applied]))
        kept = getattr(applied, "layers", [applied])[-1].kept
    for sample, trace in enumerate(traces):
        assert [(step.layer, step.kept) for step in trace.steps] == [
            (layer, len(rows[sample])) for layer, rows in kept.items()
        ]
        staying = trace.steps[-1].owner.unique()
        assert len(staying[staying >= 0]) == trace.steps[-1].kept
    return traces


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


# --- who carries whom ---------------------------------------------------------------------------------------------


def test_every_form_of_reduction_says_who_carries_whom() -> None:
    anchor = torch.tensor([[1, 3]])
    assert carriers(Keep(anchor), 5).tolist() == [-1, 0, -1, 1, -1]
    merge = Merge(torch.tensor([[0, 0, -1, 1, 1]]), torch.ones(1, 5), anchor)
    assert carriers(merge, 5).tolist() == [0, 0, -1, 1, 1]
    join = Join(anchor, torch.tensor([[4]]), torch.tensor([[0]]), 5)
    assert carriers(join, 5).tolist() == [-1, 0, -1, 1, 0]
    matrix = torch.tensor([[[0.4, 0.6, 0, 0, 0.1], [0.3, 0, 0, 1.0, 0.2]]])
    assert carriers(Transform(matrix, anchor), 5).tolist() == [0, 0, -1, 1, 1]
    assert carriers(Keep(anchor[:, :0]), 3).tolist() == [-1, -1, -1]


def test_groups_survive_later_stages() -> None:
    (trace,) = traced("tiny-llava", "visionzip+fastv", [photo()], **{"fastv.keep_ratio": 0.5})
    first, second = trace.steps
    assert first.merged > 0
    gone = (second.owner < 0) & (first.owner >= 0)
    assert torch.equal(second.owner[~gone], first.owner[~gone])
    assert set(second.owner[second.owner >= 0].tolist()) < set(first.owner[first.owner >= 0].tolist())


# --- the geometry -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", VLMS)
def test_pictures_are_what_the_encoder_got(model: str) -> None:
    """A padded batch of two: put together again, the patches of each sample look like its own photo."""
    pictures = [photo(1), photo(2, 72, 120)]
    traces = traced(model, "divprune", pictures, keep_ratio=0.4)
    for trace, picture in zip(traces, pictures, strict=True):
        panel = _panels(trace.pictures[0])[-1]
        seen = _paint(panel, None, False)
        small = [np.asarray(image.resize((8, 8), Image.Resampling.BOX), float) for image in (seen, picture)]
        other = np.asarray(pictures[trace is traces[0]].resize((8, 8), Image.Resampling.BOX), float)
        assert np.abs(small[0] - small[1]).mean() < 0.5 * np.abs(small[0] - other).mean()


@pytest.mark.parametrize("model", VLMS)
def test_one_kept_token_is_the_one_that_is_outlined(model: str) -> None:
    (trace,) = traced(model, "divprune", [photo()], keep_ratio=0.3)
    shown = trace.pictures[0]
    total = len(trace.steps[0].owner)
    panels = _panels(shown)
    drawn = set()
    numbers = shown.ordinals[shown.packed.part.cpu() >= 0].tolist()
    numbers = numbers[:: 1 + len(numbers) // 12]
    for number in numbers:
        owner = torch.full((total,), -1)
        owner[number] = number
        marked = [(np.asarray(_paint(panel, owner, False)) == KEPT).all(-1) for panel in panels]
        (only,) = [(place, mask) for place, mask in enumerate(marked) if mask.any()]
        rows, columns = only[1].nonzero()
        drawn.add((only[0], rows.min(), columns.min()))
    assert len(drawn) == len(numbers)


def test_dropped_is_grey_merged_is_tinted_and_kept_keeps_its_colours() -> None:
    (trace,) = traced("tiny-llava", "divprune", [photo()], keep_ratio=0.5)
    (panel,) = _panels(trace.pictures[0])
    plain = np.asarray(_paint(panel, None, False), dtype=float)
    owner = torch.full((36,), -1)
    owner[[7, 14, 15]] = torch.tensor([7, 14, 14])
    painted = np.asarray(_paint(panel, owner, False), dtype=float)
    side = plain.shape[0] // 6
    middle = {
        token: (token // 6 * side + side // 2, token % 6 * side + side // 2) for token in (0, 7, 14, 15)
    }
    assert np.ptp(painted[middle[0]]) == 0
    assert painted[middle[0]].mean() < 0.4 * plain[middle[0]].mean()
    assert np.array_equal(painted[middle[7]], plain[middle[7]])
    assert np.ptp(painted[middle[15]]) > 20
    corner = tuple(place - side // 2 for place in middle[14])
    assert tuple(painted[corner]) == KEPT


def test_videos_are_strips_of_frames() -> None:
    frames = [photo(seed, 48, 48) for seed in range(4)]
    for model, count in (("tiny-qwen2.5-vl", 2), ("tiny-llava-onevision", 4)):
        traces = traced(model, "fastvid", [frames, frames[::-1]], "videos")
        for trace in traces:
            assert sum(len(_panels(shown)) for shown in trace.pictures) == count
            image = draw(trace, model)
            assert image.width > image.height


# --- commands -----------------------------------------------------------------------------------------------------


def test_run_draws_what_it_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", "visionzip", "--model", "tiny-llava", "--repeats", "1", "-n", "4", "--no-record")
    target = tmp_path / "new" / "kept.png"
    code, _, err = command(capsys, *words, "--report", str(tmp_path / "report"), "--overlay", str(target))
    assert code == 0
    assert f"overlay: {target}" in err
    with Image.open(target) as image:
        assert image.format == "PNG"
        assert image.width > 600
    assert (tmp_path / "report" / "overlay.png").read_bytes() == target.read_bytes()
    assert "data:image/png;base64," in (tmp_path / "report" / "report.html").read_text()


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    request = Request(parameters={"keep_ratio": 1}, overlay=tmp_path / "kept.png", store=False)
    done = run("divprune", "tiny-llava", request, settings=QUICK)
    assert any("no overlay" in note for note in done.notes)
    assert not (tmp_path / "kept.png").exists()
    with pytest.raises(BadInput, match="nothing to draw"):
        draw(Trace(), "divprune")


def test_gallery_draws_what_suits_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "<b>page"
    words = ("gallery", "--model", "tiny-llava", "--keep", "0.25", "--out", str(folder))
    code, out, err = command(capsys, *words)
    assert code == 0
    pictures = {path.name for path in folder.glob("*.png")}
    assert {"divprune.png", "fastv.png", "visionzip.png"} <= pictures
    assert "not drawn: hiprune" in err
    assert f"{len(pictures)} methods" in out
    page = (folder / "index.html").read_text()
    assert set(_attributes(page, "img", "src")) == pictures
    assert not any("//" in value for value in _attributes(page, "a", "href"))
    assert command(capsys, *words[:1], "divprune", *words[1:])[0] == 0  # our own page may be replaced


def _attributes(page: str, tag: str, name: str) -> list[str]:
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, seen: str, attributes: list[tuple[str, str | None]]) -> None:
            if seen == tag:
                found.extend(value or "" for key, value in attributes if key == name)

    Reader().feed(page)
    return found


def test_gallery_escapes_names(tmp_path: Path) -> None:
    picture = tmp_path / "<script>x.png"
    photo().save(picture)
    done = build_gallery(tmp_path / "out", ["divprune"], "tiny-llava", str(picture))
    assert done.drawn[0].total == 36
    assert 0 < done.drawn[0].kept < 36
    page = done.page.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;x.png" in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("gallery", "flap"), "flap chooses no visual tokens"),
        (("gallery", "divprun"), "did you mean"),
        (("gallery", "divprune", "--model", "tiny-llama"), "vision-language model"),
        (("gallery", "hiprune", "--model", "tiny-llava"), "hiprune"),
        (("gallery", "divprune", "--model", "tiny-llava", "--keep", "1"), "every token stay"),
        (("gallery", "divprune", "--model", "tiny-llava", "--keep", "2"), "keep_ratio"),
        (("gallery", "--model", "tiny-llava", "--image", "nowhere.jpg"), "no picture nowhere.jpg"),
        (("run", "flap", "--model", "tiny-llama", "--overlay", "a.png"), "no visual tokens"),
        (("run", "divprune", "--model", "tiny-llava", "--overlay", "a.jpg"), "ends in .png"),
        (("run", "divprune", "--model", "tiny-llava", "--overlay", "/proc/a.png"), "cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command(capsys, *words)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


def test_somebody_elses_page_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>mine</p>")
    with pytest.raises(BadInput, match="not a page of zoo gallery"):
        build_gallery(tmp_path, ["divprune"], "tiny-llava")
    assert (tmp_path / "index.html").read_text() == "<p>mine</p>"


def test_methods_without_visual_tokens_cannot_be_drawn() -> None:
    loaded = zoo.load_model("tiny-vit")
    with zoo.method("tome").apply(loaded) as applied, pytest.raises(BadInput, match="no visual tokens"):
        record(applied, pixel_values=torch.zeros(1, 3, 32, 32))


def test_counts_of_a_step() -> None:
    step = Step(-1, 2, torch.tensor([1, 1, -1, 3]))
    assert step.merged == 1
