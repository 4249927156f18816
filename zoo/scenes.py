"""What a vision-language model is shown: a picture, several, or a video, together with a question.

A scene comes from files, or from packaged photographs when none are given; methods for video then get a film that is
made of a photograph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo import data
from zoo.errors import BadInput, NeedsExtra
from zoo.interface import Method

if TYPE_CHECKING:
    from PIL import Image

    from zoo.models import LoadedModel

QUESTION = "What can be seen in this picture?"
PHOTOS = ("china", "flower")
FRAMES = 8
"""Frames taken of a video."""
MADE_FRAMES = 4
"""Frames of a film that is made of a photograph."""
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

Kind = Literal["picture", "pictures", "video"]


@dataclass(frozen=True)
class Scene:
    """Pictures in the order of the prompt, or the frames of one video.

    Attributes:
        pictures: at least one.
        video: they are frames.
        source: files or names that they are from.
        note: what was made up because nothing was given; empty = nothing was.
    """

    pictures: tuple[Image.Image, ...]
    video: bool
    source: tuple[str, ...]
    note: str = ""


def wanted_by(methods: Sequence[Method]) -> Kind:
    """What a method, or a stack of them, was made for, as its card says: a single picture suits most of them."""
    shown = [set(method.card().terms("modality")) for method in methods]
    if any("video-text" in terms and "image-text" not in terms for terms in shown):
        return "video"
    return "pictures" if any(terms == {"multi-image"} for terms in shown) else "picture"


def load_scene(
    kind: Kind, images: Sequence[str] = (), video: str | Path | None = None, frames: int | None = None
) -> Scene:
    """The scene that was asked for, or one for methods that want a ``kind`` of it.

    Args:
        kind: decides when neither pictures nor a video are given.
        images: packaged photographs by name, or files.
        video: a file, or a folder of frames.
        frames: how many; ``None`` = ``FRAMES``, or as many as the video has.

    Raises:
        BadInput: pictures and a video, frames without a video, a file that cannot be read, more frames than there are.
        NeedsExtra: a video file without PyAV.
    """
    if images and video is not None:
        raise BadInput("give either pictures or a video")
    if video is not None:
        return Scene(tuple(load_frames(video, frames)), True, (str(video),))
    if images:
        if frames is not None:
            raise BadInput("pictures have no frames: leave out the number of frames, or give a video")
        return Scene(tuple(data.load_picture(name) for name in images), False, tuple(images))
    if kind == "video":
        number = frames or MADE_FRAMES
        note = f"No video was given: {number} frames move over the packaged photograph '{PHOTOS[0]}'."
        return Scene(tuple(pan(data.load_picture(PHOTOS[0]), number)), True, (PHOTOS[0],), note)
    if frames is not None:
        raise BadInput("there is no video to take frames of; give one")
    names = PHOTOS if kind == "pictures" else PHOTOS[:1]
    note = f"The method is for several pictures: {' and '.join(names)} were taken." if len(names) > 1 else ""
    return Scene(tuple(data.load_picture(name) for name in names), False, names, note)


def picture_files(place: str) -> list[str]:
    """Pictures of a folder in the order of their names; a file, or a packaged photograph, by itself.

    Raises:
        BadInput: a folder without pictures.
    """
    folder = Path(place).expanduser()
    if place in data.PICTURES or not folder.is_dir():
        return [place]
    files = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise BadInput(f"there are no pictures in {folder}")
    return files


def check_files(images: Sequence[str], video: str | Path | None) -> None:
    """Raise ``BadInput`` when both are given, or the video is not there; before a model is loaded."""
    if images and video is not None:
        raise BadInput("give either pictures or a video")
    if video is not None and not Path(video).expanduser().exists():
        raise BadInput(f"there is no video {video}; give a file, or a folder of frames")


# --- frames -------------------------------------------------------------------------------------------------------


def pan(picture: Image.Image, frames: int) -> list[Image.Image]:
    """A film of one picture: a window of 3/4 of its size moves from its left to its right edge and closes in a little.

    All frames have the size of the picture.
    """
    from PIL import Image

    width, height = picture.size
    made = []
    for number in range(frames):
        way = number / max(1, frames - 1)
        share = 0.75 - 0.1 * way
        left, top = (1 - share) * width * way, (1 - share) * height / 2
        window = (left, top, left + share * width, top + share * height)
        made.append(picture.resize((width, height), Image.Resampling.BICUBIC, box=window))
    return made


def load_frames(ref: str | Path, frames: int | None = None) -> list[Image.Image]:
    """Frames of a video at equal distances, the first and the last included, as RGB images.

    Args:
        ref: a folder of pictures (in the order of their names), an animated GIF or WebP, or a video file.
        frames: how many; ``None`` = ``FRAMES``, or as many as there are.

    Raises:
        BadInput: nothing there, not a video, or fewer frames than asked for.
        NeedsExtra: a video file without PyAV.
    """
    path = Path(ref).expanduser()
    if not path.exists():
        raise BadInput(f"there is no video {path}; give a file, or a folder of frames")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        return [data.load_picture(files[number]) for number in _spread(len(files), frames, path)]
    if path.suffix.lower() in _SUFFIXES:
        return _animation(path, frames)
    return _film(path, frames)


def _spread(there: int, wanted: int | None, path: Path) -> list[int]:
    """Numbers of ``wanted`` of ``there`` frames."""
    if there == 0:
        raise BadInput(f"{path} has no frames in it")
    if wanted is not None and wanted > there:
        raise BadInput(f"{path} has {there} frames, and {wanted} were asked for")
    count = wanted or min(FRAMES, there)
    return [round(number * (there - 1) / max(1, count - 1)) for number in range(count)]


def _animation(path: Path, frames: int | None) -> list[Image.Image]:
    from PIL import Image, ImageSequence

    data.load_picture(path)  # says what is wrong with a file that is no picture
    with Image.open(path) as animation:
        there = getattr(animation, "n_frames", 1)
        if there == 1:
            raise BadInput(f"{path} is a single picture; give a video, or a folder of frames")
        chosen = _spread(there, frames, path)
        return [
            frame.convert("RGB")
            for number, frame in enumerate(ImageSequence.Iterator(animation))
            if number in chosen
        ]


def _film(path: Path, frames: int | None) -> list[Image.Image]:
    try:
        import av
    except ImportError:
        raise NeedsExtra(
            "reading video files needs PyAV; install it with: pip install av (a folder of frames, or an animated GIF, "
            "needs nothing)"
        ) from None

    def decoded() -> Iterator[Any]:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise BadInput(f"{path} has no video in it")
            yield from film.decode(video=0)

    try:
        # Many formats do not say how many frames they have: they are counted, and only the wanted ones are kept.
        chosen = _spread(sum(1 for _ in decoded()), frames, path)
        return [frame.to_image().convert("RGB") for number, frame in enumerate(decoded()) if number in chosen]
    except (av.error.FFmpegError, OSError) as error:
        raise BadInput(f"{path} cannot be read as a video: {error.strerror or error}") from None


# --- model inputs -------------------------------------------------------------------------------------------------


def scene_inputs(
    loaded: LoadedModel, scene: Scene, prompt: str = QUESTION, raw: bool = False
) -> dict[str, Any]:
    """What a vision-language model takes for a scene and a question, on the CPU, batch 1.

    A model without a video input gets the frames as pictures, one behind the other. Of several pictures, each but the
    last is followed by its number, so that every picture has a text of its own.

    Args:
        loaded: with a processor.
        scene: what it is shown.
        prompt: the question.
        raw: leave out the chat template of the model.

    Raises:
        BadInput: there is no processor, or it refuses the pictures.
    """
    processor = loaded.processor
    if processor is None:
        raise BadInput(f"{loaded.ref} has no processor, so it cannot be shown a picture")
    as_video = scene.video and loaded.anatomy.video_token_id is not None
    content: list[dict[str, str]] = []
    for number in range(1 if as_video else len(scene.pictures)):
        if number and not scene.video:
            content.append({"type": "text", "text": f"This is picture {number}."})
        content.append({"type": "video" if as_video else "image"})
    content.append({"type": "text", "text": prompt})
    if getattr(processor, "chat_template", None) and not raw:
        written = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    else:
        written = "".join(_plain(processor, piece) for piece in content)
    shown: dict[str, Any] = {"images": list(scene.pictures)}
    if as_video:
        shown = {"videos": [list(scene.pictures)]}
        if hasattr(processor, "video_processor"):
            shown["do_sample_frames"] = False  # these are the frames
    try:
        return dict(processor(text=written, return_tensors="pt", **shown))
    except ValueError as error:  # a picture that is far too thin for its patches, say
        reason = str(error).splitlines()[0]
        raise BadInput(f"the processor of {loaded.ref} refuses {', '.join(scene.source)}: {reason}") from None


def _plain(processor: Any, piece: dict[str, str]) -> str:
    """One part of a prompt without a chat template."""
    if piece["type"] == "text":
        return f"\n{piece['text']}\n"
    return str(getattr(processor, f"{piece['type']}_token", f"<{piece['type']}>"))
