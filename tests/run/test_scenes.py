"""What ``zoo run`` shows a vision-language model, and what it says when that cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import VLMS

import zoo
from zoo.bench.settings import Settings
from zoo.cli import main
from zoo.errors import BadInput, NeedsExtra
from zoo.interface import method_class
from zoo.runner import run
from zoo.scenes import FRAMES, MADE_FRAMES, load_frames, load_scene, pan, scene_inputs, wanted_by

QUICK = Settings(repeats=1, new_tokens=2)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """A folder with twelve frames, each of one grey, and the same as ``clip.gif`` beside it."""
    folder = tmp_path / "frames"
    folder.mkdir()
    frames = [Image.new("RGB", (64, 48), (20 * number,) * 3) for number in range(12)]
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:02}.png")
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    return folder


def greys(frames: list[Image.Image]) -> list[int]:
    return [frame.getpixel((5, 5))[0] for frame in frames]


def kept_of(slug: str, model: str, **request: object) -> tuple[float, zoo.Report]:
    record = run(slug, model, settings=QUICK, store=False, **request)
    return record.reports[0].total, record.reports[0]


# --- frames and pictures ------------------------------------------------------------------------------------------


def test_frames_are_taken_at_equal_distances(film: Path) -> None:
    for source in (film, film.parent / "clip.gif"):
        assert greys(load_frames(source, 4)) == [0, 80, 140, 220]
        assert greys(load_frames(source, 12)) == list(range(0, 240, 20))
        assert greys(load_frames(source, 1)) == [0]
        assert len(load_frames(source)) == FRAMES


def test_video_files_are_read_where_pyav_is_installed(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            picture = Image.new("RGB", (64, 48), (20 * number,) * 3)
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
    assert greys(load_frames(tmp_path / "clip.mp4", 4)) == pytest.approx([0, 80, 140, 220], abs=4)
    (tmp_path / "broken.mp4").write_bytes(b"x" * 500)
    with pytest.raises(BadInput, match="cannot be read as a video"):
        load_frames(tmp_path / "broken.mp4")


def test_video_files_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(NeedsExtra, match="pip install av"):
        load_frames(tmp_path / "clip.mp4")


def test_a_made_film_moves() -> None:
    frames = pan(Image.linear_gradient("L").rotate(90).convert("RGB"), 4)
    assert {frame.size for frame in frames} == {(256, 256)}
    middles = [np.asarray(frame).mean() for frame in frames]
    assert middles == sorted(middles) or middles == sorted(middles, reverse=True)
    assert abs(middles[-1] - middles[0]) > 20


def test_methods_get_what_they_were_made_for() -> None:
    expected = {"dycoke": "video", "holitom": "video", "catp": "pictures", "divprune": "picture"}
    for slug, kind in expected.items():
        assert wanted_by([method_class(slug)()]) == kind
    assert wanted_by([method_class("divprune")(), method_class("aot")()]) == "video"


@pytest.mark.parametrize("slug", ["dycoke", "prunevid", "holitom", "aot", "fastvid"])
def test_methods_for_video_run_out_of_the_box(slug: str) -> None:
    parameters = {"layer": 2} if slug == "prunevid" else {}
    record = run(slug, "tiny-llava", settings=QUICK, store=False, parameters=parameters)
    assert record.reports[0].total == MADE_FRAMES * 36
    assert record.reports[0].kept < record.reports[0].total
    assert record.inputs["frames"] == MADE_FRAMES
    assert any("No video was given" in note for note in record.notes)


def test_methods_for_several_pictures_get_two() -> None:
    record = run("catp", "tiny-llava", settings=QUICK, store=False, parameters={"layer": 1})
    assert record.reports[0].total == 2 * 36
    assert record.inputs["images"] == ["china", "flower"]


@pytest.mark.parametrize("model", VLMS)
def test_every_model_takes_a_video_and_several_pictures(model: str, film: Path) -> None:
    loaded = zoo.load_model(model)
    placeholders = set(loaded.anatomy.visual_token_ids.values())
    still = load_scene("picture", ["china"])
    counts = []
    for scene in (still, load_scene("picture", ["china", "flower"]), load_scene("picture", (), film, 4)):
        inputs = scene_inputs(loaded, scene)
        counts.append(sum(int((inputs["input_ids"] == number).sum()) for number in placeholders))
        with zoo.method("divprune", keep_ratio=0.5).apply(loaded) as applied:
            applied(**inputs)
            assert applied.report.total == counts[-1]
    assert min(counts) > 0
    if loaded.anatomy.video_token_id is not None:
        assert any("video" in name for name in inputs)


def test_a_command_repeats_its_video(film: Path) -> None:
    record = run("dycoke", "tiny-llava", settings=QUICK, store=False, video=film, frames=6)
    assert f"--video {film} --frames 6" in record.command
    assert record.reports[0].total == 6 * 36


# --- bad input ----------------------------------------------------------------------------------------------------

TINY = ("-m", "tiny-llava", "--repeats", "1", "--max-new-tokens", "2", "--no-record")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["divprune", "-m", "tiny-llama"], "vision-language model"),
        (["divprune", "-m", "tiny-clip"], "vision encoder"),
        (["divprune", *TINY, "-s", "keep_ratio=0"], "greater than 0"),
        (["divprune", *TINY, "-s", "keep_ratio=-1"], "greater than 0"),
        (["divprune", *TINY, "-s", "keep_ratio=1.5"], "less than or equal to 1"),
        (["divprune", *TINY, "-s", "keep_ratio=nan"], "finite"),
        (["divprune", *TINY, "-s", "keep_ratio=few"], "number"),
        (["divprune", *TINY, "-s", "keep_tokens=37"], "only 36 visual tokens"),
        (["fastv", *TINY, "-s", "keep_tokens=1000"], "only 36 visual tokens"),
        (["fastv", *TINY, "-s", "keep_tokens=0"], "greater than or equal to 1"),
        (["fastv", *TINY, "-s", "layer=99"], "4 layers"),
        (["fastv", *TINY, "-s", "kep_ratio=0.5"], "did you mean keep_ratio"),
        (["divprun", *TINY], "did you mean divprune"),
        (["divprune", *TINY, "--image", "{bad}/nowhere.png"], "there is no picture"),
        (["divprune", *TINY, "--image", "{bad}/empty.png"], "not a picture"),
        (["divprune", *TINY, "--image", "{bad}/text.jpg"], "not a picture"),
        (["divprune", *TINY, "--image", "{bad}/cut.png"], "cannot be read"),
        (["divprune", *TINY, "--image", "{bad}/huge.png"], "pixels; make it smaller"),
        (["divprune", *TINY, "--image", "{bad}"], "is a folder"),
        (["divprune", "-m", "tiny-qwen2.5-vl", "--image", "{bad}/thin.png"], "aspect ratio"),
        (["divprune", *TINY, "--video", "{bad}/nowhere"], "there is no video"),
        (["divprune", *TINY, "--video", "{bad}/none"], "no frames"),
        (["divprune", *TINY, "--video", "{bad}/dot.png"], "single picture"),
        (["divprune", *TINY, "--video", "{bad}/none", "--image", "china"], "either pictures or a video"),
        (["divprune", *TINY, "--frames", "3"], "no video"),
        (["dycoke", *TINY, "--image", "china", "--frames", "3"], "pictures have no frames"),
        (["flap", "-m", "tiny-llama", "--video", "{bad}/none"], "leave out the video"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_files(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["run", *(word.format(bad=tmp_path) for word in words)])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def bad_files(folder: Path) -> None:
    """Pictures that are none, or that nobody could show."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:4000])
    Image.new("1", (20000, 20000)).save(folder / "huge.png")
    Image.new("RGB", (5000, 1)).save(folder / "thin.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "text.jpg").write_text("hello")
    (folder / "empty.png").touch()
    (folder / "none").mkdir()


@pytest.mark.parametrize("model", VLMS)
def test_a_picture_of_one_pixel_is_a_picture(model: str, tmp_path: Path) -> None:
    bad_files(tmp_path)
    total, report = kept_of("divprune", model, images=(str(tmp_path / "dot.png"),))
    assert 1 <= report.kept < total


def test_a_large_picture_costs_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (10000, 10000)).save(tmp_path / "large.png")
    assert load_scene("picture", [str(tmp_path / "large.png")]).pictures[0].size == (10000, 10000)
    assert not recwarn.list


def test_no_picture_at_all_is_said_in_one_line() -> None:
    loaded = zoo.load_model("tiny-llava")
    text = loaded.processor(text="What is it?", return_tensors="pt")
    with (
        zoo.method("divprune").apply(loaded) as applied,
        pytest.raises(BadInput, match="no image or video"),
    ):
        applied.generate(**text, max_new_tokens=2)
