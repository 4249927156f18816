"""Record what each visual-token method keeps of one photograph, for the site: ``python docs/make_gallery.py``.

Writes ``taxonomy/gallery/photo.jpg`` and ``taxonomy/gallery/gallery.json``. Run it again when a method is added or
chooses otherwise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import zoo
from taxonomy.gallery import FOLDER, Drawing, Gallery, bits_of
from zoo.data import PICTURES, load_picture
from zoo.errors import BadInput
from zoo.interface import implemented, method_class
from zoo.models.quiet import quiet_transformers
from zoo.overlays import record
from zoo.runner import on_device
from zoo.scenes import QUESTION, Scene, scene_inputs

PHOTO, MODEL, KEEP, SIDE = "coffee", "small-llava", 0.25, 336
OWN = {
    "attention-debiasing": {"host_parameters": {"keep_ratio": KEEP}},
    "hiprune": {"keep_ratio": KEEP, "object_layer": 3},  # its own layer is that of a deeper encoder
    "lvlm-csp": {},  # a quarter is less than its middle layers take
    "transprune": {},  # and less than the layers in front of its first cut see
}


def main() -> None:
    """Run every method that the model and a single picture suit."""
    FOLDER.mkdir(exist_ok=True)
    square(load_picture(PHOTO)).save(FOLDER / "photo.jpg", quality=82, optimize=True)
    photo = load_picture(FOLDER / "photo.jpg")
    loaded = zoo.load_model(MODEL)
    with quiet_transformers():
        inputs = on_device(loaded, scene_inputs(loaded, Scene((photo,), False, (PHOTO,))))
        drawings = {slug: made for slug in implemented() if (made := drawing(slug, loaded, inputs))}
    rows = columns = SIDE // 14
    packaged = PICTURES[PHOTO]
    gallery = Gallery(
        photo=packaged.description,
        licence=packaged.licence,
        model=MODEL,
        question=QUESTION,
        rows=rows,
        columns=columns,
        methods=drawings,
    )
    (FOLDER / "gallery.json").write_text(gallery.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print(f"{len(drawings)} methods in {Path(FOLDER).name}/gallery.json")


def square(picture: Image.Image) -> Image.Image:
    """The middle of a picture, ``SIDE x SIDE`` pixels: what the encoder is shown, and what is drawn on."""
    short = min(picture.size)
    left, top = ((side - short) // 2 for side in picture.size)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short))


def drawing(slug: str, loaded: zoo.models.LoadedModel, inputs: dict[str, torch.Tensor]) -> Drawing | None:
    """What one method leaves; ``None`` for other kinds of methods, and those that a single picture does not suit."""
    cls = method_class(slug)
    if cls.phase != "visual-tokens":
        return None
    given = OWN.get(slug, {"keep_ratio": KEEP} if "keep_ratio" in cls.model_fields else {})
    torch.manual_seed(0)
    try:
        method = cls(**given)
        with method.apply(loaded) as applied:
            (trace,) = record(applied, **inputs)
    except (BadInput, ValueError) as refusal:
        print(f"not drawn: {slug}: {refusal}")
        return None
    if not trace.steps or trace.steps[-1].kept in (0, len(trace.steps[-1].owner)):
        print(f"not drawn: {slug} leaves everything, or nothing")
        return None
    last = trace.steps[-1]
    places = torch.arange(len(last.owner))
    return Drawing(
        parameters=", ".join(f"{name}={value}" for name, value in given.items()),
        kept=bits_of((last.owner == places).tolist()),
        merged=bits_of(((last.owner >= 0) & (last.owner != places)).tolist()),
    )


if __name__ == "__main__":
    main()
