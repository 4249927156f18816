"""Standard scores through EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

``evaluate`` is what ``zoo eval`` calls::

    found = zoo.evaluate("my-pruned-model", ["arc_easy", "hellaswag"], against="smollm2-135m")
    for score in found.scores:
        print(score.task, score.metric, score.model.value, score.difference)

The harness asks the questions and counts; the model is loaded by ``zoo.load_model``, so folders of pruned models with
widths per layer need no remote code. Prompts, few-shot examples and metrics are the harness's own, and so is its seed
unless another is given: the scores are those that its own command gives for the same weights.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import datetime, timezone
from difflib import get_close_matches
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from zoo.bench.record import Finite, ModelFacts
from zoo.errors import BadInput, DownloadFailed, NeedsExtra, Refused, RunFailed

if TYPE_CHECKING:
    import torch

    from zoo.models import LoadedModel

BATCH = 8
"""Sequences per forward pass when nothing else is asked for."""

Results = Mapping[str, Any]
"""What the harness returns for one model."""


class Estimate(BaseModel):
    """A mean over documents (or another aggregate) and its standard error, where the harness gives one."""

    model_config = ConfigDict(frozen=True)

    value: Finite
    stderr: Finite | None = None


class Score(BaseModel):
    """One metric of one task, or of a group of tasks.

    Attributes:
        metric: as the harness calls it (``acc``, ``acc_norm``, ``exact_match``, ``word_perplexity`` ...).
        filter: how answers were read before they were counted; ``none`` for most tasks.
        shots: solved examples in front of each question.
        n: documents that were scored.
        higher_is_better: direction of the metric; ``None`` when the task does not say.
        difference: ``model - against``. Both answer the same documents, so its error is that of the mean difference
            per document, which is small where they mostly agree; absent for what is no plain mean.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    filter: str
    shots: int | None
    n: int
    higher_is_better: bool | None
    model: Estimate
    against: Estimate | None = None
    difference: Estimate | None = None


class Evaluation(BaseModel):
    """All scores of one or two models, and what is needed to repeat them."""

    model: ModelFacts
    against: ModelFacts | None = None
    tasks: list[str] = Field(description="As they were asked for.")
    versions: dict[str, str] = Field(description="Of the tasks, as the harness counts them.")
    scores: list[Score]
    limit: int | None
    batch: int
    seed: int | None = Field(description="None: the harness's own.")
    device: str
    dtype: str
    started: str = Field(description="UTC, ISO 8601.")
    seconds: float = 0.0
    harness: str = Field(description="Version of lm-evaluation-harness.")
    environment: dict[str, Any]

    def to_json(self) -> str:
        """The whole of it as JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)


def evaluate(
    model: str | Path | LoadedModel,
    tasks: Sequence[str],
    *,
    against: str | Path | LoadedModel | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = BATCH,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    bars: bool = False,
) -> Evaluation:
    """Score a language model on tasks of lm-evaluation-harness.

    Args:
        model: short name, folder (also of a pruned model) or hub id, or a loaded model, which keeps its state.
        tasks: names, groups, tags and patterns (``mmlu_*``) of the harness; task files (YAML), and folders for all
            tasks in them; a file or folder goes before a task that is called the same.
            Data files that a task file names are looked for beside it first. A task file may name Python functions
            of its folder (``!function``), which then run: take only files that you trust.
        against: a second model that answers the same documents, such as the dense one.
        limit: take only the first documents of each task; ``None`` = all.
        shots: solved examples in front of each question, for tasks that have some; ``None`` = as each task has it.
        batch: sequences per forward pass.
        device, dtype: as in ``load_model``, for both models.
        seed: of everything random; ``None`` = the harness's own seeds, with which published scores are made.
        bars: let the harness draw its progress bars on standard error.

    Raises:
        NeedsExtra: the harness is not installed.
        BadInput: an unknown task, a task file that cannot be used, a task that runs code written by the model ...
        Refused: a model that writes no text.
        DownloadFailed: the data of a task could not be fetched.
        RunFailed: out of memory, or the model's scores are not numbers.
    """
    _check_harness()
    if not tasks:
        raise BadInput(
            "name at least one task, as in --tasks arc_easy (a task file will do too), or a suite with --suite"
        )
    from zoo.bench.environment import environment

    started, begun = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    with _quiet(bars), _seeded(seed):  # some tasks draw their documents
        exam = _Exam(_load_tasks(tasks), limit, shots, batch, seed, bars)
    loaded = _load(model, device, dtype)
    results = exam.sit(loaded)
    found = Evaluation(
        model=_facts(loaded),
        tasks=list(tasks),
        versions={name: str(number) for name, number in results["versions"].items() if number is not None},
        scores=list(_scores(results)),
        limit=limit,
        batch=batch,
        seed=seed,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        started=started,
        harness=version("lm_eval"),
        environment=environment(
            str(loaded.device), getattr(loaded.model.config, "_attn_implementation", None)
        ),
    )
    if against is not None:
        del loaded  # the second model may need its memory
        other = _load(against, device, dtype)
        found.against = _facts(other)
        found.scores = list(_scores(results, exam.sit(other)))
    found.seconds = round(time.perf_counter() - begun, 3)
    return found


def _check_harness() -> None:
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise NeedsExtra(
            f"zoo eval needs lm-evaluation-harness ({error}); install it with: pip install 'efficiency-zoo[eval]'"
        ) from None


# --- models -------------------------------------------------------------------------------------------------------


def _load(model: str | Path | LoadedModel, device: str | None, dtype: str | None) -> LoadedModel:
    if isinstance(model, str | Path):
        from zoo.models.loading import load_model

        model = load_model(model, device=device, dtype=dtype)
    if not model.model.can_generate():
        raise Refused(
            f"zoo eval scores models that write text, and {model.ref} ({model.model.config.model_type}) does not"
        )
    if model.tokenizer is None:
        raise BadInput(f"{model.ref} has no tokenizer, so it cannot be asked anything")
    return model


def _facts(loaded: LoadedModel) -> ModelFacts:
    facts = {"parameters": sum(parameter.numel() for parameter in loaded.model.parameters()), **loaded.facts}
    return ModelFacts(
        ref=loaded.ref, revision=loaded.revision, architecture=loaded.model.config.model_type, facts=facts
    )


# --- tasks --------------------------------------------------------------------------------------------------------


def _load_tasks(places: Sequence[str]) -> Any:
    """The harness's tasks, with their data, in the form that its ``evaluate`` takes."""
    from lm_eval.tasks import TaskManager

    files = {place: found for place in places if (found := _task_files(place))}
    # Reading the harness's own thousands of task files takes long.
    manager = TaskManager(include_defaults=len(files) < len(places))
    wanted: list[Any] = []
    for place in places:
        wanted += [_read_task(file) for file in files[place]] if place in files else _named(manager, place)
    try:
        return manager.load(wanted)
    except Exception as error:  # whatever tasks, file systems and HTTP clients raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        if len(files) == len(places):
            raise BadInput(f"the task in {', '.join(places)} cannot be used: {reason}") from None
        raise DownloadFailed(
            f"the tasks {', '.join(places)} or their data could not be fetched: {reason}"
        ) from None


def _task_files(place: str) -> list[Path]:
    """The YAML files that a path stands for; none for a name.

    Raises:
        BadInput: a path that leads nowhere, or to a folder without task files.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        # What tasks include has no name, and a group of tasks has a list of them.
        found = [
            file for file in sorted(path.rglob("*.yaml")) if isinstance(_read_yaml(file).get("task"), str)
        ]
        if not found:
            raise BadInput(f"the folder {place} holds no task file (.yaml with a line 'task: NAME')")
        return found
    if path.is_file():
        return [path]
    if path.suffix in (".yaml", ".yml") or place.startswith((".", "/", "~")):
        raise BadInput(f"there is no task file {place}")
    return []


def _named(manager: Any, name: str) -> list[str]:
    """The names that ``name`` stands for, itself or a pattern."""
    found = manager.match_tasks([name])
    if not found:
        near = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
        raise BadInput(f"the harness has no task '{name}'; {hint}")
    return list(found)


def _read_task(file: Path) -> dict[str, Any]:
    """A task file's configuration, with data files beside it named by their full path."""
    config = _read_yaml(file)
    if not isinstance(config.get("task"), str):
        raise BadInput(f"{file} describes no single task; it needs a line 'task: NAME'")
    options = dict(config.get("dataset_kwargs") or {})
    for name in ("data_files", "data_dir"):
        if name in options:
            options[name] = _beside(file.absolute().parent, options[name])
    return {**config, "dataset_kwargs": options}


def _beside(folder: Path, value: Any) -> Any:
    """``value`` with each path that exists in ``folder`` made absolute; others stay, as the harness reads them."""
    if isinstance(value, Mapping):
        return {name: _beside(folder, part) for name, part in value.items()}
    if isinstance(value, list):
        return [_beside(folder, part) for part in value]
    return str(folder / value) if (folder / value).exists() else value


def _read_yaml(file: Path) -> dict[str, Any]:
    # The harness's reader knows `include` and `!function`; no public name leads to it.
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return dict(load_yaml(file))
    except Exception as error:  # of the reader, and of modules that the file names
        raise BadInput(f"the task file {file} cannot be read: {_first_line(error)}") from None


# --- scoring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exam:
    """Tasks with their data, as the harness loads them, and how they are put to a model."""

    tasks: Any
    limit: int | None
    shots: int | None
    batch: int
    seed: int | None
    bars: bool

    def sit(self, loaded: LoadedModel) -> Results:
        """What the harness finds for one model; the model and its tokenizer stay as they are."""
        import torch
        from lm_eval.evaluator import evaluate as harness
        from lm_eval.models.huggingface import HFLM

        from zoo.models.quiet import quiet_transformers

        tokenizer = copy.deepcopy(loaded.tokenizer)
        with (
            _quiet(self.bars),
            quiet_transformers(bars=self.bars),
            _seeded(self.seed, loaded.device) as examples,
        ):
            for task in self.tasks["tasks"].values():
                own = task.get_config("num_fewshot")
                if own != 0:  # a task that says 0 means it
                    task.set_config(key="num_fewshot", value=(own or 0) if self.shots is None else self.shots)
                task.set_fewshot_seed(examples)
            judged = HFLM(loaded.model, backend="causal", tokenizer=tokenizer, batch_size=self.batch)
            try:
                results: Results = harness(judged, self.tasks, limit=self.limit)
            except (torch.OutOfMemoryError, MemoryError):
                raise RunFailed(
                    f"the machine ran out of memory at {self.batch} sequences per forward pass; use a smaller --batch"
                ) from None
            except ValueError as error:  # code to be run, pictures to be seen, no documents ...
                raise BadInput(f"the tasks cannot be put to {loaded.ref}: {_first_line(error)}") from None
        if any(_is_nan(sample) for samples in results["samples"].values() for sample in samples):
            raise RunFailed(
                f"{loaded.ref} gives NaN for likelihoods; nothing can be scored, try --dtype float32"
            )
        return results


def _is_nan(sample: Results) -> bool:
    """Whether a likelihood of this document is NaN, which the harness would take for an answer."""
    answers = [
        answer[0] for answer in sample["filtered_resps"] if isinstance(answer, tuple | list) and answer
    ]
    return any(isinstance(value, float) and math.isnan(value) for value in answers)


@contextmanager
def _seeded(seed: int | None, device: torch.device | None = None) -> Iterator[int]:
    """Seeds of the harness's three sources of random numbers, put back afterwards; yields that of its examples."""
    import numpy
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    other = DEFAULT_OTHER_SEED if seed is None else seed
    plain, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(other)
        numpy.random.seed(other)
        random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
        try:
            yield other
        finally:
            random.setstate(plain)
            numpy.random.set_state(arrays)


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Keep the harness's notes off the terminal, its bars unless they are wanted, and what it prints off the output."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with ExitStack() as stack:
        if not bars:  # the harness draws them unasked
            stack.enter_context(redirect_stderr(StringIO()))
        stack.enter_context(redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            logger.setLevel(level)


# --- reading the results ------------------------------------------------------------------------------------------


def _scores(results: Results, other: Results | None = None) -> Iterator[Score]:
    """One score per task and metric, in the harness's order."""
    for task, found in results["results"].items():
        for key in found:
            metric, comma, filtering = key.partition(",")
            mine = _estimate(results, task, metric, filtering)
            if not comma or metric.endswith("_stderr") or mine is None:
                continue
            theirs = None if other is None else _estimate(other, task, metric, filtering)
            yield Score(
                task=task,
                metric=metric,
                filter=filtering,
                shots=results["n-shot"].get(task),
                n=int(found["sample_len"]),
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                model=mine,
                against=theirs,
                difference=_difference(
                    mine, theirs, _by_document(results, task, metric, filtering),
                    _by_document(other or {}, task, metric, filtering),
                ),
            )  # fmt: skip


def _estimate(results: Results, task: str, metric: str, filtering: str) -> Estimate | None:
    """A figure and its error; ``None`` for what is no finite number."""
    found = results["results"].get(task, {})
    value, error = found.get(f"{metric},{filtering}"), found.get(f"{metric}_stderr,{filtering}")
    if not _is_number(value):
        return None
    return Estimate(value=float(value), stderr=float(error) if _is_number(error) else None)


def _by_document(results: Results, task: str, metric: str, filtering: str) -> dict[int, float]:
    """The metric's value of each document, by number; empty for groups, and where documents have no values."""
    rows = [row for row in results.get("samples", {}).get(task, ()) if row["filter"] == filtering]
    if not all(_is_number(row.get(metric)) for row in rows):
        return {}
    return {row["doc_id"]: float(row[metric]) for row in rows}


def _difference(
    mine: Estimate, theirs: Estimate | None, ours: Mapping[int, float], others: Mapping[int, float]
) -> Estimate | None:
    """``mine - theirs``, with the standard error of the mean of the differences per document."""
    if theirs is None:
        return None
    value, error = mine.value - theirs.value, None
    if len(ours) > 1 and ours.keys() == others.keys():
        steps = [ours[document] - others[document] for document in ours]
        if math.isclose(statistics.fmean(steps), value, abs_tol=1e-9):  # the metric is a plain mean
            error = statistics.stdev(steps) / math.sqrt(len(steps))
    return Estimate(value=value, stderr=error)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- files --------------------------------------------------------------------------------------------------------


def check_scores_target(file: Path) -> None:
    """Raise ``BadInput`` unless ``file`` can be written."""
    from zoo.runner import check_target

    if file.is_dir():
        raise BadInput(f"{file} is a folder; name a file for the scores, such as scores.json")
    check_target(file.parent, "the file of scores", must_be_new=False)


def write_scores(found: Evaluation, file: Path) -> None:
    """Write everything as JSON.

    Raises:
        RunFailed: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunFailed(f"the scores could not be written to {file}: {reason}") from None
