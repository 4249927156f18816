"""What kind of model a method acts on, and which model stands in when none is named."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from zoo.errors import Refused
from zoo.interface import Method

if TYPE_CHECKING:
    from zoo.models import LoadedModel

Kind = Literal["text", "vlm", "image", "embedding", "diffusion"]

DEFAULT_MODELS: dict[Kind, str] = {
    "text": "smollm2-135m",
    "image": "dinov2-small-saliency",
    "vlm": "small-llava",
    "diffusion": "tiny-diffusion",
}
"""What a method runs on when no model is named. No registry carries a pretrained VLM or diffusion model, hence random
ones."""

_KINDS: dict[str, Kind] = {
    "decoder": "text",
    "encoder": "image",
    "vlm": "vlm",
    "embedding": "embedding",
    "diffusion": "diffusion",
}
"""By the kind of its anatomy."""

_IN_WORDS: dict[Kind, str] = {
    "text": "a language model",
    "image": "a vision encoder",
    "vlm": "a vision-language model",
    "embedding": "an embedding model",
    "diffusion": "a text-to-image model",
}


def kind_of(methods: Sequence[Method], model: str | LoadedModel | None, who: str = "") -> Kind:
    """What the methods act on. A short name of another kind of model is refused before it is loaded.

    Args:
        methods: none = the unmodified model alone.
        model: reference or loaded model; ``None`` = the default.
        who: subject of the refusal; by default the methods' names.

    Raises:
        Refused: the model is of another kind.
    """
    phases = {method.phase for method in methods}
    kind, given = _made_for(phases), _given(model)
    if given in (None, kind):
        return kind
    if not methods:
        return given
    if given == "vlm" and (kind == "image" or "decoding" in phases):
        return "vlm"
    if given == "embedding" and phases in ({"weights"}, {"cache"}):
        return "embedding"
    names = who or "+".join(method.slug for method in methods)
    ref = model if isinstance(model, str) else getattr(model, "ref", "this model")
    raise Refused(
        f"{names} works on {_IN_WORDS[kind]}, and {ref} is {_IN_WORDS[given]}; zoo models lists models of each kind"
    )


def usual_draft(model: str | LoadedModel | None) -> str | None:
    """Short name of the small model that drafts for ``model`` when none is named; ``None`` where none is known."""
    from zoo.models.names import KNOWN

    known = KNOWN.get(model if isinstance(model, str) else getattr(model, "ref", ""))
    return None if known is None else known.draft


def _made_for(phases: Collection[str]) -> Kind:
    """The kind of model that methods of these phases are made for."""
    if "visual-tokens" in phases:
        return "vlm"
    if "encoder-tokens" in phases:
        return "image"
    return "diffusion" if "diffusion" in phases else "text"


def _given(model: str | LoadedModel | None) -> Kind | None:
    """The kind of ``model``; ``None`` where only loading can tell."""
    if model is None:
        return None
    if not isinstance(model, str):
        return _KINDS[model.anatomy.kind]
    from zoo.models.names import KNOWN

    known = KNOWN.get(model)
    return None if known is None else _KINDS[known.kind]
