"""What the result pages show: fronts with their charts by family, findings, and the data of the compare page."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from markupsafe import Markup

from taxonomy import charts
from taxonomy.evidence import GOALS, Cell, Front, Point, Trial, fronts, goals_of
from taxonomy.finding import Outcome, judge, load_findings
from taxonomy.site.library import Entry, Library, Term

MOST_FRONTS = 12
"""Groups of like runs shown per family and goal, the largest first."""

MOST_ROWS = 200
"""Rows of a table of results; the best ones are always among them."""

METHODS_PER_FILE = 50
"""Entries in a file of the compare page's data."""

GOAL_TITLES = {
    "prefill": "Faster prefill, or time per image",
    "decode": "Faster decoding",
    "memory": "Fewer bytes",
    "compute": "Fewer operations (counted, not timed)",
}
GAIN_LABELS = {
    "prefill-time": "prefill, times faster",
    "image-time": "images, times faster",
    "decode-speed": "decoding, times faster",
    "generation-speed": "whole generation, times faster",
    "weight-bytes": "weights, times smaller",
    "kv-bytes": "KV cache, times smaller",
    "flops": "operations, times fewer",
}


@dataclass(frozen=True)
class Section:
    """A front as shown: its charts, and its rows, best gain first; ``hidden`` rows are not listed."""

    anchor: str
    front: Front
    charts: tuple[Markup, ...]
    rows: tuple[Point, ...]
    hidden: int

    @property
    def gain_label(self) -> str:
        """What the gain is, for people."""
        return GAIN_LABELS[self.front.gain]

    @property
    def leaders(self) -> set[Cell]:
        """The largest gain on each task of a method that loses nothing, where it is one beyond the noise."""
        best: dict[str, Cell] = {}
        for cell in (cell for p in self.rows if p.unchanged for cell in p.cells if cell.sure > 1):
            best[cell.task] = max(cell, best.get(cell.task, cell), key=lambda found: found.credited)
        return set(best.values())

    @property
    def another_gain(self) -> str | None:
        """Another gain of the same kind that all runs have, as that of the whole generation beside decoding."""
        group = next(group for group in GOALS.values() if self.front.gain in group)
        others = (name for name in group if name != self.front.gain)
        return next((n for n in others if all(n in point.trial.scores for point in self.rows)), None)

    @property
    def another_label(self) -> str:
        """What that is, for people."""
        return GAIN_LABELS[self.another_gain] if self.another_gain else ""


@dataclass(frozen=True)
class FamilyResults:
    """The results page of a family: sections by goal, and its measured entries that also have reported figures."""

    family: Term
    goals: tuple[tuple[str, tuple[Section, ...]], ...]
    runs: int
    methods: int
    beside: tuple[tuple[Entry, tuple[Point, ...]], ...]

    @property
    def file(self) -> str:
        """Its page."""
        return f"results/{self.family.id}.html"

    @property
    def sections(self) -> list[Section]:
        """All sections."""
        return [section for _, sections in self.goals for section in sections]

    @property
    def models(self) -> list[str]:
        """Models that can be chosen."""
        return sorted({section.front.model for section in self.sections})

    @property
    def hardware(self) -> list[str]:
        """Hardware that can be chosen."""
        return sorted({section.front.hardware for section in self.sections})


class Results:
    """Everything the result pages of one build show, worked out once, when it is asked for."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._groups = _groups(library)
        self._places = _places(self._groups)

    @cached_property
    def families(self) -> list[FamilyResults]:
        """A page per family with results, in the order of the vocabulary."""
        return _families(self.library, self._groups)

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """The findings with their verdicts, those that could be judged first."""
        judged = (judge(one, self.library.trials, self.library.outcomes) for one in load_findings())
        return sorted(judged, key=_answered_first)

    def method_chart(self, entry: Entry) -> Markup | None:
        """The points of a method on the largest front that it is on, before the best of the others."""
        place = self._places.get(entry.slug)
        return None if place is None else _method_chart(entry, place)

    def points(self, entry: Entry) -> Sequence[Point]:
        """Points of a method on that front."""
        place = self._places.get(entry.slug)
        return () if place is None else place.own


def _answered_first(outcome: Outcome) -> tuple[bool, str]:
    return outcome.figure is None, outcome.finding.card


def _by_family(library: Library) -> dict[str, list[Trial]]:
    """Trials by the main family of their methods; a stack belongs to the family of each of its methods."""
    found: dict[str, dict[str, Trial]] = defaultdict(dict)
    for trial in library.trials:
        for slug in trial.method.split("+"):
            if slug in library and library[slug].terms.get("family"):
                found[library[slug].terms["family"][0].id][trial.key] = trial
    return {family: list(trials.values()) for family, trials in found.items()}


@dataclass(frozen=True)
class _Group:
    """The trials of a family, and their fronts by goal."""

    trials: Sequence[Trial]
    fronts: Mapping[str, Sequence[Front]]


def _groups(library: Library) -> dict[str, _Group]:
    """By family."""
    return {
        family: _Group(trials, {goal: fronts(trials, gains) for goal, gains in GOALS.items()})
        for family, trials in _by_family(library).items()
    }


def _families(library: Library, groups: Mapping[str, _Group]) -> list[FamilyResults]:
    """A page per family with results, in the order of the vocabulary."""
    pages = []
    for term in library.facets["family"].terms if "family" in library.facets else ():
        if term.id not in groups:
            continue
        group, goals = groups[term.id], []
        for goal in goals_of(term.id):
            if found := group.fronts[goal]:
                shown = enumerate(found[:MOST_FRONTS], 1)
                sections = [_section(library, f"{goal}-{n}", front) for n, front in shown]
                goals.append((GOAL_TITLES[goal], tuple(sections)))
        if goals:
            methods = {trial.method for trial in group.trials}
            beside = _beside(library, goals[0][1])
            runs = sum(len(trial.runs) for trial in group.trials)
            pages.append(FamilyResults(term, tuple(goals), runs, len(methods), beside))
    return pages


def _section(library: Library, anchor: str, front: Front) -> Section:
    ordered = list(reversed(front.points))
    listed = [point for point in ordered if point.best]
    listed += [point for point in ordered if not point.best][: max(0, MOST_ROWS - len(listed))]
    rows = tuple(sorted(listed, key=lambda point: (-point.gain.value, point.trial.method, point.trial.key)))
    drawn = []
    if front.by_task:
        drawn.append(_task_chart(_task_dots(library, rows), front))
    if not (front.by_task and front.unchanged):  # else height would say nothing
        dots = [_dot(library, point, "best" if point.best else "plain") for point in rows]
        title = f"{front.quality} kept against {GAIN_LABELS[front.gain]}: {front.model} on {front.hardware}"
        drawn.append(_chart(dots, front, title))
    return Section(anchor, front, tuple(drawn), rows, len(ordered) - len(rows))


def _chart(dots: Sequence[charts.Dot], front: Front, title: str) -> Markup:
    drawing = charts.scatter(
        dots,
        title=title,
        across=GAIN_LABELS[front.gain],
        up=f"{front.quality}, share kept",
        base="the unmodified model",
    )
    return Markup(drawing)  # noqa: S704 - taxonomy.charts escapes every text it draws


def _task_chart(dots: Sequence[charts.Dot], front: Front) -> Markup:
    drawing = charts.lanes(
        dots,
        front.gain_tasks,
        noise=front.noise,
        title=f"{GAIN_LABELS[front.gain]}, by task: {front.model} on {front.hardware}",
        across=GAIN_LABELS[front.gain],
        base="the unmodified model",
    )
    return Markup(drawing)  # noqa: S704 - taxonomy.charts escapes every text it draws


def _task_dots(library: Library, points: Iterable[Point]) -> list[charts.Dot]:
    """A dot per method and task, the largest gain of each task first; gains beyond the noise are named.

    The best is the first that loses nothing; what loses something says so.
    """
    cells = [(place, cell, point) for point in points for place, cell in enumerate(point.cells)]
    leading: set[int] = set()
    dots = []
    for place, cell, point in sorted(cells, key=lambda found: -found[1].credited):
        best = cell.sure > 1 and point.unchanged and place not in leading
        group = "best" if best else "other" if cell.sure == 1 else "plain"
        leading |= {place} if best else set()
        name, href = _named(library, point)
        name = name if point.unchanged else f"{name} (not all kept)"
        label = name if cell.sure > 1 else ""
        dots.append(charts.Dot(cell.credited, place, label, _told(name, cell), group, href))
    return dots


def _told(name: str, cell: Cell) -> str:
    passes = "" if cell.passes is None else f", {cell.passes:.2f} tokens a pass"
    return f"{name} on {cell.task}: {cell.gain:.2f}×{passes}"


def _named(library: Library, point: Point) -> tuple[str, str | None]:
    """Name and page of a method, as seen from a page one folder below the top."""
    method = point.trial.method
    return (library[method].name, f"../methods/{method}.html") if method in library else (method, None)


def _dot(library: Library, point: Point, group: str) -> charts.Dot:
    """A point of the family's chart."""
    name, href = _named(library, point)
    return charts.Dot(point.gain.credited, point.quality.value, name, _tooltip(name, point), group, href)


def _tooltip(name: str, point: Point) -> str:
    setting = point.trial.setting_text or "defaults"
    return f"{name} ({setting}): {point.gain.value:.2f}×, {point.quality.value:.1%} kept"


def _beside(library: Library, sections: Iterable[Section]) -> tuple[tuple[Entry, tuple[Point, ...]], ...]:
    """Entries with figures that were read in a source, with their points on the first front they are on."""
    found: dict[str, tuple[Point, ...]] = {}
    for section in sections:
        of_method: dict[str, list[Point]] = defaultdict(list)
        for point in section.rows:
            of_method[point.trial.method].append(point)
        for method, points in of_method.items():
            if method in library and library[method].claims:
                found.setdefault(method, tuple(points))
    return tuple(
        (library[slug], found[slug]) for slug in sorted(found, key=lambda slug: library[slug].order())
    )


@dataclass(frozen=True)
class _Place:
    """The front that the chart of a method is drawn from, its own points there, and the best of all."""

    front: Front
    own: Sequence[Point]
    best: Sequence[Point]


def _places(groups: Mapping[str, _Group]) -> dict[str, _Place]:
    """For each method its place on a front: of its family's goal if it can, the one with most runs."""
    found: dict[str, _Place] = {}
    for family, group in groups.items():
        for goal in goals_of(family):
            for front in group.fronts[goal]:
                best = [point for point in front.points if point.best]
                of_method: dict[str, list[Point]] = defaultdict(list)
                for point in front.points:
                    of_method[point.trial.method].append(point)
                for method, own in of_method.items():
                    found.setdefault(method, _Place(front, own, best))
    return found


def _method_chart(entry: Entry, place: _Place) -> Markup:
    front, own = place.front, place.own
    if front.by_task and front.unchanged:
        return _task_chart(list(_own_and_best(entry, front, own)), front)
    others = [point for point in place.best if point.trial.method != entry.slug]
    dots = []
    for group, points in (("best", own), ("other", others)):
        for point in points:
            trial = point.trial
            tooltip = _tooltip(entry.name if group == "best" else trial.method, point)
            label = trial.setting_text or "defaults"
            dots.append(charts.Dot(point.gain.credited, point.quality.value, label, tooltip, group))
    return _chart(
        dots, front, f"{entry.name} on {front.model}: quality kept against {GAIN_LABELS[front.gain]}"
    )


def _own_and_best(entry: Entry, front: Front, own: Sequence[Point]) -> Iterator[charts.Dot]:
    """On each task the points of a method, and of all others the one with the largest gain."""
    others = [point for point in front.points if point.trial.method != entry.slug]
    for place in range(len(front.gain_tasks)):
        for point in own:
            cell = point.cells[place]
            yield charts.Dot(
                cell.credited,
                place,
                f"{cell.gain:.2f}×",
                _told(point.trial.setting_text or "defaults", cell),
                "best",
            )
        if others:
            best = max(others, key=lambda point: point.cells[place].credited)
            cell, name = best.cells[place], best.trial.method
            yield charts.Dot(cell.credited, place, name, _told(name, cell), "other")


# --- the compare page -----------------------------------------------------------------------------------------


def comparison_data(library: Library, results: Results) -> Iterator[tuple[str, bytes]]:
    """What the compare page loads, as scripts: a page opened from a folder may load no JSON.

    A file holds ``METHODS_PER_FILE`` entries, in the order of the library: fewer, larger files, of which the page loads
    those that hold what was chosen.
    """
    for at in range(0, len(library.entries), METHODS_PER_FILE):
        some = library.entries[at : at + METHODS_PER_FILE]
        scripts = [_comparison_script(library, entry, results.points(entry)) for entry in some]
        yield f"data/methods/{at // METHODS_PER_FILE}.js", "".join(scripts).encode()


def _comparison_script(library: Library, entry: Entry, points: Sequence[Point]) -> str:
    """What it needs of one entry."""
    facets = {
        library.facets[name].label: [term.label for term in terms] for name, terms in entry.terms.items()
    }
    content: Mapping[str, Any] = {
        "slug": entry.slug,
        "name": entry.name,
        "summary": entry.first_sentence,
        "year": entry.year,
        "venue": entry.venue,
        "runs": entry.implemented,
        "facets": facets,
        "properties": {
            library.properties[name].label: value
            for name, value in entry.properties.items()
            if name in library.properties
        },
        "parameters": {p.name: "must be given" if p.default is None else p.shown for p in entry.parameters},
        "claims": [
            [c.model, c.task, c.metric, c.budget, c.baseline, c.value, c.source] for c in entry.claims
        ],
        "points": [
            {
                "model": point.trial.model,
                "hardware": point.trial.hardware,
                "setting": point.trial.setting_text or "defaults",
                "gain": GAIN_LABELS[point.gain.quantity],
                "times": round(point.gain.credited, 4),
                "quality": point.quality.quantity,
                "kept": round(point.quality.value, 4),
                "tasks": {cell.task: round(cell.credited, 4) for cell in point.cells if len(point.cells) > 1},
            }
            for point in points
        ],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return f"zooMethod({text});\n"
