"""What the result pages show: fronts with their charts by family, findings, and the data of the compare page."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from taxonomy import charts
from taxonomy.evidence import GOALS, Front, Point, Trial, fronts, goals_of
from taxonomy.finding import Outcome, judge, load_findings
from taxonomy.site.library import Entry, Library, Term

MOST_FRONTS = 12
"""Groups of like runs shown per family and goal, the largest first."""

MOST_ROWS = 200
"""Rows of a table of results; the best ones are always among them."""

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
    """A front as shown: its chart, and its rows, best gain first; ``hidden`` rows are not listed."""

    anchor: str
    front: Front
    chart: Markup
    rows: tuple[Point, ...]
    hidden: int

    @property
    def gain_label(self) -> str:
        """What the gain is, for people."""
        return GAIN_LABELS[self.front.gain]


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
    """Everything the result pages of one build show, worked out once."""

    def __init__(self, library: Library) -> None:
        self.library = library
        groups = _groups(library)
        self.families = _families(library, groups)
        self.outcomes: list[Outcome] = sorted(
            (judge(finding, library.trials) for finding in load_findings()), key=_answered_first
        )
        self._charts = _method_fronts(groups)

    def method_chart(self, entry: Entry) -> Markup | None:
        """The points of a method on the largest front that it is on, before the best of the others."""
        front = self._charts.get(entry.slug)
        return None if front is None else _method_chart(entry, front)

    def points(self, entry: Entry) -> list[Point]:
        """Points of a method on that front."""
        front = self._charts.get(entry.slug)
        return [] if front is None else [p for p in front.points if p.trial.method == entry.slug]


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
        for goal, found in group.fronts.items():
            if found:
                shown = enumerate(found[:MOST_FRONTS], 1)
                sections = [_section(library, f"{goal}-{n}", front) for n, front in shown]
                goals.append((GOAL_TITLES[goal], tuple(sections)))
        if goals:
            methods = {trial.method for trial in group.trials}
            beside = _beside(library, goals[0][1])
            pages.append(FamilyResults(term, tuple(goals), len(group.trials), len(methods), beside))
    return pages


def _section(library: Library, anchor: str, front: Front) -> Section:
    ordered = list(reversed(front.points))
    listed = [point for point in ordered if point.best]
    listed += [point for point in ordered if not point.best][: max(0, MOST_ROWS - len(listed))]
    rows = tuple(sorted(listed, key=lambda point: (-point.gain.value, point.trial.method, point.trial.key)))
    dots = [_dot(library, point, "best" if point.best else "plain") for point in rows]
    title = f"{front.quality} kept against {GAIN_LABELS[front.gain]}: {front.model} on {front.hardware}"
    return Section(anchor, front, _chart(dots, front, title), rows, len(ordered) - len(rows))


def _chart(dots: Sequence[charts.Dot], front: Front, title: str) -> Markup:
    drawing = charts.scatter(
        dots,
        title=title,
        across=GAIN_LABELS[front.gain],
        up=f"{front.quality}, share kept",
        base="the unmodified model",
    )
    return Markup(drawing)  # noqa: S704 - taxonomy.charts escapes every text it draws


def _dot(library: Library, point: Point, group: str) -> charts.Dot:
    """A point of the family's chart; pages lie one folder below the top."""
    method = point.trial.method
    name = library[method].name if method in library else method
    href = f"../methods/{method}.html" if method in library else None
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


def _method_fronts(groups: Mapping[str, _Group]) -> dict[str, Front]:
    """For each method the front its chart is drawn from: of its family's goal if it can, the one with most runs."""
    found: dict[str, Front] = {}
    for family, group in groups.items():
        for goal in goals_of(family):
            for front in group.fronts[goal]:
                for point in front.points:
                    found.setdefault(point.trial.method, front)
    return found


def _method_chart(entry: Entry, front: Front) -> Markup:
    own = [point for point in front.points if point.trial.method == entry.slug]
    others = [point for point in front.points if point.best and point.trial.method != entry.slug]
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


# --- the compare page -----------------------------------------------------------------------------------------


def comparison_data(library: Library, entry: Entry, points: Sequence[Point]) -> bytes:
    """What the compare page needs of one entry, as a script: a page opened from a folder may load no JSON."""
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
            }
            for point in points
        ],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return f"zooMethod({text});\n".encode()
