"""A whole suite, put to one model: one dataset after the other, dense and with a method at each of its budgets.

``examine`` is what ``zoo eval --suite`` calls::

    for found in examine("llava-hf/llava-1.5-7b-hf", load_suite("uniprunebench"), trials_of("divprune")):
        print(found.dataset.name, found.trial.label, found.result)

Each result is stored as it comes: as a run of the method, or of ``dense`` for the model alone, that was asked the task
``benchmark``. Once a suite is through, ``record_summaries`` stores its own figures as one more run.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.bench.record import Comparison, Figure, RunRecord, compare
from zoo.bench.tasks.benchmarks import Benchmark
from zoo.errors import BadInput, DownloadFailed, Refused, ZooError
from zoo.interface import Method, Stack, method_class
from zoo.interface import method as make_method
from zoo.suites.scores import DatasetResult, Summary, result_of, summarise
from zoo.suites.tables import Dataset, Suite

if TYPE_CHECKING:
    from zoo.bench.session import Progress
    from zoo.bench.tasks import Desk
    from zoo.models import LoadedModel

BUDGET = "keep_ratio"
"""The parameter that takes a budget: the fraction of visual tokens that stays."""


@dataclass(frozen=True)
class Trial:
    """What is set beside the unmodified model: a method at one budget; ``None`` = nothing."""

    method: Method | Stack | None = None
    budget: float | None = None

    @property
    def label(self) -> str:
        """For people: ``divprune at 0.222``."""
        if self.method is None:
            return "the model alone"
        return self.method.name + (f" at {self.budget:g}" if self.budget is not None else "")


def trials_of(
    method: str | None,
    parameters: Mapping[str, Any] | None = None,
    budgets: Sequence[float] | None = None,
    usual: Sequence[float] = (),
) -> list[Trial]:
    """The trials that a method and its budgets make.

    Args:
        method: slug, or several joined by ``+``; ``None`` = the model alone.
        parameters: of the method.
        budgets: values of ``BUDGET``; ``None`` = ``usual``, where the method has that parameter and it is not among
            ``parameters``.
        usual: the suite's own.

    Raises:
        BadInput: parameters or budgets without a method, or budgets for one that has none.
    """
    parameters = dict(parameters or {})
    if method is None:
        if parameters or budgets:
            raise BadInput("parameters and budgets are a method's: name it with --method")
        return [Trial()]
    has_one = any(BUDGET in method_class(slug.strip()).model_fields for slug in method.split("+"))
    if budgets and not has_one:
        raise BadInput(f"{method} has no {BUDGET}; set its own parameters with --set, in place of a budget")
    given = any(name.rpartition(".")[2] in (BUDGET, "keep_tokens") for name in parameters)
    if budgets and given:
        raise BadInput("give either budgets or the parameter that they set")
    chosen = budgets or (usual if has_one and not given else ())
    if not chosen:
        return [Trial(make_method(method, **parameters))]
    return [Trial(make_method(method, **parameters, **{BUDGET: one}), one) for one in chosen]


@dataclass
class Found:
    """What one dataset gave for one trial.

    Attributes:
        result: ``None`` when it failed; ``error`` says why.
        kept: fractions of the visual tokens left, as the method reports them for the last questions: the mean over
            decoder layers, and in the last one.
        record: of the run; ``None`` when it failed.
    """

    dataset: Dataset
    trial: Trial
    seconds: float
    result: DatasetResult | None = None
    error: str | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    kept: tuple[float, float] | None = None
    record: RunRecord | None = None


def examine(
    model: str | LoadedModel,
    suite: Suite,
    trials: Sequence[Trial],
    *,
    place: str | None = None,
    datasets: Sequence[Dataset] | None = None,
    limit: int | None = None,
    batch: int = 1,
    timed: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    store: bool = True,
    progress: Progress | None = None,
) -> Iterator[Found]:
    """Ask the datasets of a suite; yields each with each trial, as soon as it is done.

    Args:
        model: a vision-language model: short name, folder or hub id, or a loaded one.
        suite: the suite.
        trials: see ``trials_of``. The unmodified model answers once for all of them.
        place: what the suite was loaded from, for runs that can be repeated; ``None`` = its name.
        datasets: some of the suite's; ``None`` = all that can be scored and are not optional.
        limit: the first questions of each; ``None`` = all.
        batch: questions at once.
        timed: questions of each on which speed is measured; ``None`` = as the suite says.
        seed: of everything random.
        device, dtype: as in ``load_model``.
        store: keep runs in the user's catalogue.
        progress: called with what is done.

    Raises:
        ZooError: the first dataset cannot be read or put to the model. A later one that fails is yielded with its
            error, and the rest go on.
    """
    from zoo.bench.tasks import Desk, Kept

    tell: Progress = progress or (lambda *_: None)
    chosen = list(suite.chosen(None) if datasets is None else datasets)
    if not chosen:
        raise BadInput(f"no dataset of {suite.name} can be scored by a rule")
    methods = [trial.method for trial in trials if trial.method is not None]
    _check_kind(methods, model)
    asked = [
        Benchmark(
            suite=place or suite.name,
            dataset=dataset.name,
            limit=limit,
            batch=batch,
            timed=suite.timed if timed is None else timed,
        )
        for dataset in chosen
    ]
    kept = Kept()
    try:
        asked[0].questions(Desk(seed, tell, kept))  # before the model: whoever has no hub hears so at once
    except DownloadFailed as error:
        raise BadInput(f"{error}; is there a network? A suite file can name local files instead") from None
    loaded = _loaded(model, device, dtype, tell)
    anything = False
    for dataset, task in zip(chosen, asked, strict=True):
        for trial in trials:
            begun = time.perf_counter()
            try:
                found = _ask(loaded, dataset, task, trial, Desk(seed, tell, kept), store)
                anything = True
            except ZooError as error:
                if not anything:
                    raise
                found = Found(dataset, trial, 0.0, error=str(error))
            found.seconds = round(time.perf_counter() - begun, 3)
            yield found


def _check_kind(methods: Sequence[Method | Stack], model: str | LoadedModel) -> None:
    """Refuse short names of other models before anything is fetched."""
    from zoo.models.names import KNOWN
    from zoo.runner import kind_of

    for one in methods:
        kind_of(one.methods if isinstance(one, Stack) else [one], model)
    if isinstance(model, str) and model in KNOWN and KNOWN[model].kind != "vlm":
        raise Refused(f"suites are put to vision-language models, and {model} is none; zoo models lists some")


def _loaded(model: str | LoadedModel, device: str | None, dtype: str | None, tell: Progress) -> LoadedModel:
    from zoo.models.loading import load_model
    from zoo.suites.asking import check_model

    if isinstance(model, str):
        tell(f"loading {model}", 0, 0)
        model = load_model(model, device=device, dtype=dtype)
    check_model(model)
    return model


def _ask(
    loaded: LoadedModel, dataset: Dataset, task: Benchmark, trial: Trial, desk: Desk, store: bool
) -> Found:
    from zoo.runner import Request, run

    method = Stack([]) if trial.method is None else trial.method
    request = Request(seed=desk.seed, task=task, store=store)
    record = run(method, loaded, request, progress=desk.progress, kept=desk.kept)
    return Found(
        dataset,
        trial,
        0.0,
        result_of(dataset, record.comparisons),
        comparisons=record.comparisons,
        kept=_kept_share(record),
        record=record,
    )


def _kept_share(record: RunRecord) -> tuple[float, float] | None:
    """Visual tokens left on average over the layers, and in the last one."""
    for report in record.reports:
        bars = report.bars.get("visual tokens")
        if bars and report.total:
            return report.kept / report.total, bars[-1].kept / bars[-1].total
    return None


# --- the suite's own figures ------------------------------------------------------------------------------------------


def summaries(found: Sequence[Found]) -> list[tuple[Trial, Summary]]:
    """The suite's figures per trial, over the datasets that are done."""
    trials = list({id(one.trial): one.trial for one in found}.values())
    results = [
        (trial, [one.result for one in found if one.trial is trial and one.result]) for trial in trials
    ]
    return [(trial, summarise(own)) for trial, own in results if own]


def record_summaries(suite: Suite, found: Sequence[Found]) -> list[str]:
    """Store the suite's own figures, a run per method and budget; its inputs name the runs they are made of.

    Args:
        suite: the suite.
        found: what they gave.

    Returns:
        Keys of the stored runs.

    Raises:
        TaxonomyError: the catalogue cannot be written.
    """
    from taxonomy.runs import record_run
    from zoo.runner import stored_form

    keys = []
    for trial, summary in summaries(found):
        own = [one for one in found if one.trial is trial and one.record is not None]
        if not own or own[0].record is None:
            continue
        first = own[0].record
        label = f"{suite.name}, {len(summary.datasets)} of {len(suite.usual)} datasets"
        if (limit := first.inputs["task"]["limit"]) is not None:
            label += f", at most {limit} questions of each"
        inputs = {
            "suite": suite.name,
            "datasets": {one.dataset.name: one.record.inputs["task"] for one in own if one.record},
            "left out": {one.name: f"judged by {one.judge}" for one in suite.judged},
            "runs": [one.record.key for one in own if one.record],
        }
        record = first.model_copy(
            update={
                "key": uuid.uuid4().hex,
                "seconds": round(sum(one.seconds for one in own), 3),
                "inputs": inputs,
                "comparisons": list(_rows(suite, label, summary)),
                "notes": list(suite.notes),
                "reports": own[-1].record.reports if own[-1].record else [],
            }
        )
        keys.append(record_run(stored_form(record)))
    return keys


def _rows(suite: Suite, label: str, summary: Summary) -> Iterator[Comparison]:
    count = len(summary.datasets)

    def figure(value: float | None, n: int = count) -> Figure | None:
        return None if value is None else Figure(median=value, n=n)

    for name, ability in summary.abilities.items():
        n = len(ability.datasets)
        task = f"{suite.name}: {name}, mean of {', '.join(ability.datasets)}"
        yield compare("benchmark-score", figure(ability.dense, n), figure(ability.method, n), task=task)
    yield compare("benchmark-score", figure(summary.dense), figure(summary.method), task=label)
    for quantity, value in (
        ("retained-score", summary.retained),
        ("retained-score-rms", summary.retained_rms),
        ("unevenness", summary.unevenness),
        ("loyalty", summary.loyalty),
    ):
        if value is not None:
            yield compare(quantity, None, figure(value), task=label)
    dense, method = summary.dense_speed, summary.method_speed
    if dense is not None and method is not None:
        yield compare("prefill-time", figure(dense.prefill), figure(method.prefill), task=label)
        if dense.decode is not None and method.decode is not None:
            yield compare("decode-speed", figure(dense.decode), figure(method.decode), task=label)
