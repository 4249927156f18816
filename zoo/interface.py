"""``Method``: hyper-parameters, a card and one verb, ``apply``. And the registry that finds methods by name.

A method file holds the idea of its paper and nothing else::

    @register("divprune")
    class DivPrune(VisualTokenReducer):
        keep_ratio: float = Field(0.098, gt=0, le=1, description="Fraction of visual tokens kept.")
        ...

Nothing here imports torch: listing methods must be instant. Built-in methods are found by file name
(``zoo/methods/*/prompt_lookup.py`` is ``prompt-lookup``), third-party ones through the entry-point group
``zoo.methods`` (name = slug, value = ``module:Class``).
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from taxonomy.card import Card, builtin_card
from zoo.errors import BadInput, BadParameter, Refused, UnknownMethod
from zoo.report import Report

if TYPE_CHECKING:
    from types import TracebackType

    from zoo.models import LoadedModel

Phase = Literal["weights", "encoder-tokens", "visual-tokens", "cache", "decoding", "diffusion"]
PHASES: tuple[Phase, ...] = ("weights", "encoder-tokens", "visual-tokens", "cache", "decoding", "diffusion")
"""The order in which the methods of a stack are applied."""


class Applied:
    """A method at work on a model. Leaving the ``with`` block undoes it.

    ``loaded`` is the model to use: the caller's own (hooked) model for token methods and decoders, a new, smaller
    one for weight methods, which leave the caller's model untouched. ``report`` describes the latest input (token
    methods, decoders) or the removal (weight methods).
    """

    def __init__(
        self, method: Method | Stack, loaded: LoadedModel, undo: Callable[[], None] | None = None
    ) -> None:
        self.method = method
        self.loaded = loaded
        self._undo = undo

    @property
    def model(self) -> Any:
        """The transformers model to call."""
        return self.loaded.model

    @property
    def report(self) -> Report:
        """What was removed; raises ``BadInput`` when nothing has run yet."""
        raise BadInput(f"{self.method.name} has nothing to report")

    @property
    def reports(self) -> list[Report]:
        """One report per method at work."""
        return [self.report]

    def generate(self, **inputs: Any) -> Any:
        """As ``model.generate``: token ids ``[batch, length]``, prompt included."""
        return self.model.generate(**inputs)

    def __call__(self, **inputs: Any) -> Any:
        """One forward pass, as ``model(**inputs)``."""
        return self.model(**inputs)

    def save(self, folder: str | Path) -> Path:
        """Write a model that loads again in a new process (weight methods only).

        Raises:
            BadInput: the method changes how the model runs, not its weights.
        """
        raise BadInput(
            f"{self.method.name} changes how a model runs, not its weights: there is nothing to save"
        )

    def close(self) -> None:
        """Undo the method; harmless when done twice."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Method(BaseModel):
    """Base of all methods: frozen, validated hyper-parameters with a card and ``apply``.

    Family bases in ``zoo.families`` implement ``apply`` once; a method file implements the idea.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    slug: ClassVar[str] = ""
    phase: ClassVar[Phase]
    default_model: ClassVar[str | None] = None
    """Short name of the model it runs on when none is named, where the family's own would not do."""

    @classmethod
    def card(cls) -> Card:
        """The card; third-party methods override this."""
        return builtin_card(cls.slug)

    @property
    def name(self) -> str:
        """The method's slug."""
        return self.slug

    def check(self, loaded: LoadedModel) -> None:
        """Raise ``Refused`` in one line when ``loaded`` lacks what the method needs."""

    @abstractmethod
    def apply(self, loaded: LoadedModel, **resources: Any) -> Applied:
        """Put the method to work on ``loaded``; see the family bases for the ``resources`` they take."""

    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters as JSON values."""
        return self.model_dump(mode="json")

    @classmethod
    def fit(cls, *args: Any, **options: Any) -> Method:
        """The method with parameters that were found on samples, for ``zoo fit``.

        A method that has something to fit overrides this as ``fit(loaded, samples, *, option=default, ...)``: samples
        are inputs of one prompt each, options are what the search is told, ``**parameters`` other fields of the method.
        An option named ``progress`` is called with what is done and what there is to do.

        Raises:
            BadInput: there is nothing to fit, or the samples do not allow it.
        """
        raise BadInput(
            f"{cls.slug} has nothing to fit; zoo find --implemented --training calibration lists methods that do"
        )

    @classmethod
    def combine(cls, methods: Sequence[Method]) -> Method:
        """One method that does what several methods of this phase do, for stacks.

        A family whose methods can share a model overrides this; places that clash may also be found later, in
        ``check`` or ``apply``, when the model is known.

        Raises:
            BadInput: methods of this family exclude each other.
        """
        first, second = methods[0], methods[1]
        raise BadInput(
            f"{first.slug} and {second.slug} both act on {first.phase.replace('-', ' ')}; "
            "a stack takes one method per stage"
        )


class Stack:
    """Several methods applied together: ``flap+divprune+prompt-lookup``.

    Attributes:
        methods: in the order in which they are applied.
        units: what is applied: the methods, those of one phase combined to one (see ``Method.combine``).
    """

    def __init__(self, methods: list[Method]) -> None:
        self.methods = sorted(methods, key=lambda method: PHASES.index(method.phase))
        self.units: list[Method] = []
        for _, group in groupby(self.methods, key=lambda method: method.phase):
            together = list(group)
            self.units.append(together[0] if len(together) == 1 else type(together[0]).combine(together))

    @property
    def name(self) -> str:
        """Slugs joined by ``+``, in the order in which they are applied; ``dense`` when there is none."""
        return "+".join(method.slug for method in self.methods) or "dense"

    slug = name

    def check(self, loaded: LoadedModel) -> None:
        """Ask every method."""
        for method in self.units:
            method.check(loaded)

    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters of each method, by slug."""
        return {method.slug: method.parameters() for method in self.methods}

    def apply(self, loaded: LoadedModel, **resources: Any) -> AppliedStack:
        """Apply all methods; on failure those already applied are undone."""
        layers: list[Applied] = []
        try:
            for method in self.units:
                layers.append(method.apply(loaded, **resources))
                loaded = layers[-1].loaded
        except BaseException:
            for applied in reversed(layers):
                applied.close()
            raise
        return AppliedStack(self, layers)


class AppliedStack(Applied):
    """Several applied methods; the last one generates, all are undone in reverse order."""

    def __init__(self, stack: Stack, layers: list[Applied]) -> None:
        super().__init__(stack, layers[-1].loaded)
        self.layers = layers

    @property
    def report(self) -> Report:
        """Report of the last method; ``reports`` has them all."""
        return self.layers[-1].report

    @property
    def reports(self) -> list[Report]:
        """One report per method, in order of application."""
        return [report for applied in self.layers for report in applied.reports]

    def generate(self, **inputs: Any) -> Any:
        """Generate through the last method (a decoder drives the model; others hook it)."""
        return self.layers[-1].generate(**inputs)

    def save(self, folder: str | Path) -> Path:
        """Save the pruned weights, when the stack has a weight method."""
        for applied in self.layers:
            if isinstance(applied.method, Method) and applied.method.phase == "weights":
                return applied.save(folder)
        raise BadInput(f"{self.method.name} has no weight method: there is nothing to save")

    def close(self) -> None:
        """Undo all."""
        for applied in reversed(self.layers):
            applied.close()


# --- registry -------------------------------------------------------------------------------------------------

_METHODS = Path(__file__).parent / "methods"
_registered: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(slug: str) -> Callable[[M], M]:
    """Class decorator: make a method available under ``slug``. A name that is taken is an error."""

    def decorate(cls: M) -> M:
        taken = _registered.get(slug)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"two methods are called '{slug}': {taken.__module__} and {cls.__module__}")
        cls.slug = slug
        _registered[slug] = cls
        return cls

    return decorate


@cache
def _places() -> dict[str, str]:
    """Slug -> ``module`` or ``module:Class``, without importing any of them."""
    places = {
        path.stem.replace("_", "-"): f"zoo.methods.{path.parent.name}.{path.stem}"
        for path in sorted(_METHODS.glob("*/*.py"))
        if not path.stem.startswith("_")
    }
    for point in entry_points(group="zoo.methods"):
        if point.name in places:
            raise ValueError(f"the entry point '{point.name}' ({point.value}) has the name of another method")
        places[point.name] = point.value
    return places


def implemented() -> tuple[str, ...]:
    """Slugs of all methods that can run, sorted. Imports none of them."""
    return tuple(sorted({*_places(), *_registered}))


def method_class(slug: str) -> type[Method]:
    """Import and return the class of one method.

    Raises:
        UnknownMethod: with the nearest names; says so when the name has a card but no implementation.
    """
    if slug not in _registered:
        place = _places().get(slug)
        if place is None:
            raise UnknownMethod(_unknown(slug))
        module = importlib.import_module(place.partition(":")[0])
        if ":" in place and slug not in _registered:
            _registered[slug] = getattr(module, place.partition(":")[2])
        if slug not in _registered:
            raise ValueError(f"{place} does not register a method called '{slug}'")
    return _registered[slug]


def _unknown(slug: str) -> str:
    from taxonomy.card import CARDS

    if (CARDS / f"{slug}.toml").is_file():
        return f"'{slug}' has a card but no implementation yet (zoo list --implemented shows what runs)"
    near = get_close_matches(slug, implemented(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "zoo list --implemented shows what runs"
    return f"there is no method called '{slug}'; {hint}"


def method(spec: str, **parameters: Any) -> Method | Stack:
    """Make a method (or, from ``a+b``, a stack) by name.

    Args:
        spec: slug, or several joined by ``+``.
        parameters: hyper-parameters. In a stack a plain name goes to the one method that has it; ``slug.name``
            says which.

    Raises:
        UnknownMethod, BadParameter, BadInput: one line that says what to do.
    """
    slugs = [part.strip() for part in spec.split("+")]
    classes = [method_class(slug) for slug in slugs]
    given: list[dict[str, Any]] = [{} for _ in classes]
    for key, value in parameters.items():
        owner, _, field = key.rpartition(".")
        owners = [
            index
            for index, cls in enumerate(classes)
            if (owner == cls.slug if owner else field in cls.model_fields)
        ]
        if not owners and len(classes) == 1:
            owners = [0]  # let pydantic's message speak
        if len(owners) != 1:
            having = "no method" if not owners else "more than one method"
            raise BadParameter(f"{having} of {spec} takes '{key}'; write SLUG.{field} to say which")
        given[owners[0]][field] = value
    built = [_build(cls, values) for cls, values in zip(classes, given, strict=True)]
    return built[0] if len(built) == 1 else Stack(built)


def _build(cls: type[Method], values: dict[str, Any]) -> Method:
    try:
        return cls(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = get_close_matches(name, cls.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(cls.model_fields) or 'none'}"
            raise BadParameter(f"{cls.slug} has no parameter '{name}'; {hint}") from None
        given = f" (given: {first['input']!r})" if name else ""
        raise BadParameter(f"{cls.slug}: {name or 'parameters'}: {first['msg']}{given}") from None


def refuse(method: Method, needs: str, has: str) -> Refused:
    """The refusal in its usual form: what the method needs, what the model has."""
    return Refused(f"{method.slug} needs {needs}; this model has {has}")
