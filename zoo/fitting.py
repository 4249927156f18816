"""Parameters that a method finds on samples: ``zoo fit`` writes them, ``zoo run --params`` takes them.

The file is JSON: the method, the fields that were found, and what they were found on::

    {"method": "vtw", "parameters": {"layer": 16}, "fitted_on": {"model": "...", "prompt": "...", "images": [...]}}
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from zoo.errors import BadInput, BadParameter, RunFailed
from zoo.interface import Method, method_class
from zoo.runner import DEFAULT_MODELS, check_target, kind_of, on_device
from zoo.scenes import PHOTOS, QUESTION, load_scene, picture_files, scene_inputs

if TYPE_CHECKING:
    from zoo.models import LoadedModel

Progress = Callable[[str, int, int], None]


class FittedOn(BaseModel):
    """What the parameters were found on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    prompt: str
    images: list[str]


class Fitted(BaseModel):
    """The contents of a file of parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    parameters: dict[str, Any]
    fitted_on: FittedOn | None = None

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class Samples:
    """What a method is fitted on: pictures, all with the same question.

    Attributes:
        images: folders, files or names of packaged photographs; none = all packaged ones.
        prompt: the question.
        raw: leave out the chat template of the model.
        limit: take no more than this many.
    """

    images: Sequence[str] = ()
    prompt: str = QUESTION
    raw: bool = False
    limit: int | None = None

    def names(self) -> list[str]:
        """The pictures, one after the other.

        Raises:
            BadInput: a folder without pictures.
        """
        named = [name for place in self.images or PHOTOS for name in picture_files(place)]
        return named[: self.limit]

    def inputs(self, loaded: LoadedModel, progress: Progress) -> Iterator[dict[str, Any]]:
        """What ``loaded`` takes for each of them, made when it is asked for."""
        names = self.names()
        for number, name in enumerate(names):
            progress("reading samples", number, len(names))
            scene = load_scene("picture", (name,))
            yield on_device(loaded, scene_inputs(loaded, scene, self.prompt, self.raw))


def fit(
    slug: str,
    model: str | LoadedModel | None = None,
    samples: Samples | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> Fitted:
    """Find parameters of a method on samples.

    Args:
        slug: a method with a ``fit`` of its own.
        model: reference or loaded model; ``None`` = the default of the family.
        samples: pictures and a question; ``None`` = packaged photographs.
        options: what the method's ``fit`` takes by name.
        device, dtype: as in ``load_model``.
        seed: of everything random that has no seed of its own.
        progress: called as the work goes on.

    Raises:
        BadInput: unknown method, nothing to fit, wrong options, pictures that cannot be read ...; nothing was done.
    """
    cls, samples = method_class(slug), samples or Samples()
    if getattr(cls.fit, "__func__", None) is getattr(Method.fit, "__func__", None):
        cls.fit()  # refuses
    given = checked_options(cls, options or {})
    names = samples.names()
    kind = kind_of([cls()], model)

    import torch

    from zoo.models.loading import load_model
    from zoo.models.quiet import quiet_transformers

    if model is None:
        model = DEFAULT_MODELS[kind]
    if isinstance(model, str):
        progress(f"loading {model}", 0, 0)
        model = load_model(model, device=device, dtype=dtype)
    cls().check(model)
    if "progress" in inspect.signature(cls.fit).parameters:
        given["progress"] = lambda done, total: progress(f"fitting {slug}", done, total)
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), quiet_transformers():
        torch.manual_seed(seed)
        try:
            method = cls.fit(model, samples.inputs(model, progress), **given)
        except ValidationError as error:
            raise BadParameter(f"{slug}: {_first(error)}") from None
    return Fitted(
        method=slug,
        parameters=method.model_dump(mode="json", exclude_unset=True),
        fitted_on=FittedOn(model=model.ref, prompt=samples.prompt, images=names),
    )


def checked_options(cls: type[Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, in the types that the method's ``fit`` declares.

    Raises:
        BadParameter: an option that it does not take, or a wrong value.
    """
    signature, hints = inspect.signature(cls.fit), get_type_hints(cls.fit)
    takes = [name for name in signature.parameters if name not in ("loaded", "samples", "progress")]
    named = [name for name in takes if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
    more = list(cls.model_fields) if len(named) < len(takes) else []
    checked = dict(given)
    for name, value in given.items():
        if name not in named and name not in more:
            near = get_close_matches(name, [*named, *more], n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(named) or 'none'}"
            raise BadParameter(f"fitting {cls.slug} takes no '{name}'; {hint}")
        if name in named:
            try:
                checked[name] = TypeAdapter(hints[name]).validate_python(value)
            except ValidationError as error:
                raise BadParameter(f"fitting {cls.slug}: {name}: {_first(error)}") from None
    return checked


def _first(error: ValidationError) -> str:
    """The first complaint of pydantic, as a part of a sentence."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    return f"{name}: {first['msg']}" if name else first["msg"]


# --- files of parameters ------------------------------------------------------------------------------------------


def write_parameters(fitted: Fitted, file: Path) -> None:
    """Write a file of parameters.

    Raises:
        RunFailed: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(fitted.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunFailed(f"the parameters could not be written to {file}: {reason}") from None


def check_parameter_target(file: Path) -> None:
    """Raise ``BadInput`` unless ``file`` can be written."""
    if file.is_dir():
        raise BadInput(f"{file} is a folder; name a file for the parameters, such as params.json")
    check_target(file.parent, "the file of parameters", must_be_new=False)


def read_parameters(file: Path, spec: str) -> dict[str, Any]:
    """Parameters of a file, named as ``zoo.method(spec, ...)`` takes them.

    Args:
        file: written by ``zoo fit``.
        spec: the method that shall run, or a stack with it.

    Raises:
        BadInput: no such file, another kind of file, or parameters of a method that is not in ``spec``.
    """
    try:
        found = Fitted.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadInput(f"the parameters {file} cannot be read: {reason}") from None
    except (ValidationError, UnicodeDecodeError):
        raise BadInput(
            f"{file} is no file of parameters: it must be JSON with a method and its parameters, as zoo fit writes it"
        ) from None
    slugs = [part.strip() for part in spec.split("+")]
    if found.method not in slugs:
        raise BadInput(f"{file} holds parameters of {found.method}, and {spec} is to run")
    prefix = f"{found.method}." if len(slugs) > 1 else ""
    return {f"{prefix}{name}": value for name, value in found.parameters.items()}
