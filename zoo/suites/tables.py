"""What a suite file says: where each dataset is, how it is asked, and by which rule answers are scored.

::

    name = "my-suite"
    budgets = [0.222]

    [[datasets]]
    name = "signs"
    ability = "text reading"
    path = "signs.jsonl"            # beside this file; or hub = "owner/name", with config and split
    prompt = "{question}\\nAnswer with a single word."
    rule = "exact"

Nothing here imports torch.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zoo.errors import BadInput

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILT_IN = Path(__file__).parent

RuleName = Literal[
    "letter", "yes-no", "exact", "number", "open", "contains", "formula", "vqa", "anls", "relaxed"
]  # fmt: skip


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Pictures(_Frozen):
    """A second table that holds the pictures, for datasets whose rows only name them."""

    config: str
    split: str
    key: str = Field(description="Column of the questions that names the picture.")
    name: str = Field("id", description="Column of the pictures with that name.")
    column: str = Field("image", description="Column of the pictures that holds them.")


class Dataset(_Frozen):
    """One dataset of a suite. Columns are named as the dataset names them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    ability: str = Field(description="What the suite asks for with it; scores are averaged by ability.")
    hub: str | None = Field(None, description="owner/name on the hub.")
    config: str | None = None
    split: str = "test"
    path: str | None = Field(
        None, description="File (.jsonl, .parquet, .tsv) or folder of such, in place of the hub; "
        "relative to the suite file.",
    )  # fmt: skip
    images: tuple[str, ...] = Field(("image",), description="Columns with pictures; empty ones are left out.")
    pictures: Pictures | None = None
    prompt: str = Field(
        "{question}",
        description="Text of the question: columns in braces, and {choices}. Lines with nothing but empty columns "
        "in them are left out.",
    )
    open_prompt: str | None = Field(None, description="In its place for questions without choices.")
    choices: str | tuple[str, ...] | None = Field(
        None, description="A column with a list of choices, or a column per choice."
    )
    answer: str = Field("answer", description="Column of the expected answer, or of a list of them.")
    answer_as: Literal["letter", "index", "text"] = Field(
        "letter", description="How the expected choice is written, for the rule letter."
    )
    rule: RuleName = Field("exact", description="How answers are read and scored.")
    otherwise: RuleName = Field("exact", description="For questions of the rule letter that have no choices.")
    rule_for: dict[str, RuleName] = Field(
        default_factory=dict, description='Other rules for some rows: {"column=value" = rule}.'
    )
    new_tokens: int = Field(16, ge=1, description="Longest answer.")
    per: str | None = Field(None, description="The score is the mean over this column's values.")
    groups: tuple[tuple[str, ...], ...] = Field(
        (), description="Columns of questions that count only when all of a group are right."
    )
    modulo: dict[str, int] = Field(default_factory=dict, description="Of columns with numbers, in groups.")
    single: bool = Field(True, description="With groups: the single questions count, too, as one more group.")
    measure: Literal["credit", "f1"] = Field("credit", description="f1: of the answer yes.")
    judge: str | None = Field(None, description="Who judges the answers, when no rule can: it is left out.")
    optional: bool = Field(False, description="Asked only when it is named.")
    note: str | None = Field(None, description="What the reader of its score must know.")

    @model_validator(mode="after")
    def _has_a_place(self) -> Dataset:
        if (self.hub is None) == (self.path is None):
            raise BadInput(f"{self.name} needs either hub or path")
        if any("=" not in condition for condition in self.rule_for):
            raise BadInput(f'{self.name}: rule_for takes conditions such as "column=value"')
        if self.measure == "f1" and self.rule != "yes-no":
            raise BadInput(f"{self.name}: f1 is measured of answers by the rule yes-no")
        return self

    @property
    def plain(self) -> bool:
        """Its score is the mean credit of its questions."""
        return self.per is None and not self.groups and self.measure == "credit"


class Suite(_Frozen):
    """What a suite file says."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    title: str = ""
    source: str = Field("", description="The paper.")
    budgets: tuple[float, ...] = Field((), description="Fractions of visual tokens that its protocol keeps.")
    timed: int = Field(
        0, ge=0, description="Questions of each dataset on which prefill and decoding are timed."
    )
    notes: tuple[str, ...] = Field((), description="Choices that the source does not state.")
    datasets: tuple[Dataset, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise BadInput("two datasets of a suite have the same name")
        return self

    @cached_property
    def by_name(self) -> dict[str, Dataset]:
        """Datasets by name."""
        return {dataset.name: dataset for dataset in self.datasets}

    def dataset(self, name: str) -> Dataset:
        """One dataset.

        Raises:
            BadInput: there is none of this name (the message has the nearest ones), or a judge would have to score it.
        """
        if name not in self.by_name:
            raise BadInput(f"{self.name} has no dataset '{name}'; {_nearest(name, list(self.by_name))}")
        found = self.by_name[name]
        if found.judge is not None:
            raise BadInput(f"{name} cannot be scored here: its answers are judged by {found.judge}")
        return found

    def chosen(self, names: list[str] | None) -> list[Dataset]:
        """The datasets of these names, or all that can be scored and are not optional, in the suite's order."""
        if names:
            return list({name: self.dataset(name) for name in names}.values())
        return [one for one in self.usual if one.judge is None]

    @property
    def usual(self) -> list[Dataset]:
        """All that are not optional."""
        return [one for one in self.datasets if not one.optional]

    @property
    def judged(self) -> list[Dataset]:
        """The datasets that no rule can score."""
        return [one for one in self.datasets if one.judge is not None]


def suite_names() -> tuple[str, ...]:
    """The suites that come with the zoo."""
    return tuple(sorted(file.stem for file in BUILT_IN.glob("*.toml")))


def load_suite(ref: str) -> Suite:
    """A suite by name, or from a file (``.toml``), whose relative paths begin beside it.

    Raises:
        BadInput: no such suite, not TOML, or something in it is wrong: one sentence with the place.
    """
    path = Path(ref).expanduser()
    if ref in suite_names():
        path = BUILT_IN / f"{ref}.toml"
    elif path.suffix != ".toml" and not path.is_file():
        raise BadInput(
            f"there is no suite or suite file (.toml) '{ref}'; {_nearest(ref, list(suite_names()))}"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"the suite {path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML: {error}") from None
    try:
        return Suite.model_validate(_with_places(values, path.absolute().parent))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{path}: {where or 'suite'}: {first['msg']}") from None
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _with_places(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Local datasets with their full path."""
    rows = values.get("datasets")
    if not isinstance(rows, list):
        return values
    placed = [
        {**row, "path": str(folder / Path(row["path"]).expanduser())}
        if isinstance(row, dict) and isinstance(row.get("path"), str)
        else row
        for row in rows
    ]
    return {**values, "datasets": placed}


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
