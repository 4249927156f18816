"""One photo, every visual-token method: a folder of overlays and a page that shows them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import BadInput, Refused, RunFailed
from zoo.html_report import TEMPLATES, write_text
from zoo.interface import Method, implemented, method_class
from zoo.interface import method as make_method
from zoo.runner import DEFAULT_MODELS, check_target, kind_of, on_device
from zoo.scenes import load_scene, scene_inputs

if TYPE_CHECKING:
    from zoo.models import LoadedModel
    from zoo.overlays import Trace

MARK = '<meta name="generator" content="zoo gallery">'
"""Stands in every page of ours: another ``index.html`` is never overwritten."""


@dataclass(frozen=True)
class Drawn:
    """One method on the page.

    Attributes:
        slug, name, summary: of the method.
        parameters: hyper-parameters it was run with.
        kept: visual tokens left by its last stage.
        total: visual tokens before.
        merged: tokens that go on as a part of another one after the last stage.
    """

    slug: str
    name: str
    summary: str
    parameters: str
    kept: int
    total: int
    merged: int

    @property
    def file(self) -> str:
        """Name of its picture."""
        return f"{self.slug}.png"


@dataclass(frozen=True)
class Gallery:
    """What ``build_gallery`` wrote.

    Attributes:
        page: the ``index.html``.
        drawn: the methods on it.
        left_out: slug and reason of each method that the model, or the picture, does not suit.
    """

    page: Path
    drawn: tuple[Drawn, ...]
    left_out: tuple[tuple[str, str], ...]


def build_gallery(
    folder: Path,
    methods: Sequence[str] = (),
    model: str | LoadedModel | None = None,
    image: str = "china",
    keep: float | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Gallery:
    """Draw what each method keeps of a picture.

    Args:
        folder: for ``index.html`` and one PNG per method.
        methods: slugs; none = every visual-token method that does not refuse the model.
        model: reference or loaded model; ``None`` = the default vision-language model.
        image: packaged picture or file.
        keep: fraction of the tokens that stays, for methods with such a parameter; ``None`` = their own default.
        progress: called with what is being done, and how many of how many are finished.

    Raises:
        BadInput: unknown or unfit method, model or picture; nothing to draw; a folder with another page.
        RunFailed: the folder cannot be written.
    """
    chosen = _chosen(methods, keep)
    who = "+".join(methods) or "the gallery"
    kind_of(chosen, model, who)  # a short name of another kind of model is refused before it is loaded
    check_target(folder, "the gallery", must_be_new=False)
    page = folder / "index.html"
    if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
        raise BadInput(f"{page} is not a page of zoo gallery; name another folder")

    import torch

    from zoo.models.loading import load_model
    from zoo.models.quiet import quiet_transformers
    from zoo.overlays import draw, save_picture

    scene = load_scene("picture", (image,))
    if model is None:
        model = DEFAULT_MODELS["vlm"]
    if isinstance(model, str):
        progress(f"loading {model}", 0, 0)
        model = load_model(model)
        kind_of(chosen, model, who)
    drawn: list[Drawn] = []
    left_out: list[tuple[str, str]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with quiet_transformers(), torch.random.fork_rng(devices=devices):
        inputs = on_device(model, scene_inputs(model, scene))
        for number, method in enumerate(chosen):
            progress(f"drawing {method.slug}", number, len(chosen))
            torch.manual_seed(0)
            try:
                trace = _traced(method, model, inputs)
            except BadInput as refusal:
                if methods:
                    raise
                left_out.append((method.slug, str(refusal)))
                continue
            save_picture(draw(trace, f"{method.name} on {model.ref}"), folder / f"{method.slug}.png")
            drawn.append(_described(method, trace))
    if not drawn:
        raise BadInput(f"no visual-token method suits {model.ref}; zoo models lists vision-language models")
    gallery = Gallery(page, tuple(drawn), tuple(left_out))
    try:
        write_text(page, _render(gallery, model, image))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunFailed(f"the gallery could not be written to {folder}: {reason}") from None
    return gallery


def _chosen(slugs: Sequence[str], keep: float | None) -> list[Method]:
    """The methods, with ``keep`` as their budget where they have one."""
    found = []
    for slug in slugs or implemented():
        cls = method_class(slug)
        if cls.phase != "visual-tokens":
            if slugs:
                raise BadInput(
                    f"{slug} chooses no visual tokens; zoo find --family visual-token-pruning lists methods that do"
                )
            continue
        own = {"keep_ratio": keep} if keep is not None and "keep_ratio" in cls.model_fields else {}
        method = make_method(slug, **own)
        assert isinstance(method, Method)
        found.append(method)
    return found


def _traced(method: Method, loaded: LoadedModel, inputs: dict[str, Any]) -> Trace:
    from zoo.overlays import record

    with method.apply(loaded) as applied:
        (trace,) = record(applied, **inputs)
    if not trace.steps:
        raise Refused(f"{method.slug} lets every token stay, so there is nothing to draw")
    return trace


def _described(method: Method, trace: Trace) -> Drawn:
    card, last = method.card(), trace.steps[-1]
    values = {name: value for name, value in method.parameters().items() if value is not None}
    return Drawn(
        slug=method.slug,
        name=card.name,
        summary=card.summary,
        parameters=", ".join(f"{name}={value}" for name, value in values.items()),
        kept=last.kept,
        total=len(last.owner),
        merged=last.merged,
    )


def _render(gallery: Gallery, loaded: LoadedModel, image: str) -> str:
    """The page. Every value is escaped by the template engine."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    from zoo.models.names import KNOWN
    from zoo.panels import clean

    engine = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters["clean"] = clean
    known = KNOWN.get(loaded.ref)
    return engine.get_template("gallery.html.j2").render(
        gallery=gallery,
        model=loaded.ref,
        random=known is not None and known.random,
        image=image,
    )
