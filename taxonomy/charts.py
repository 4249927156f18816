"""Charts of the site as SVG text: points in a plane, with their names.

Drawn by hand for the reasons ``taxonomy.diagrams`` is: colours come from the style sheet (so that charts follow the
theme), points are links with tooltips, the same numbers give the same bytes whatever libraries are installed, and ten
thousand charts take seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 22, 30, 48
_LETTER = 6.6
"""Width of a letter of a label, in SVG units: an estimate that is on the large side."""


At = Callable[[float, float], tuple[float, float]]
"""Where a value lies in the picture."""


@dataclass(frozen=True)
class Dot:
    """A point: ``group`` is ``best``, ``plain`` or ``other`` (drawn faintly); ``href`` where it leads."""

    x: float
    y: float
    label: str
    tooltip: str
    group: str = "plain"
    href: str | None = None


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` (three or more) round numbers between ``low`` and ``high``, in steps of 1, 2 or 5 times 10^n."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [round(number * step, 10) for number in range(first, last + 1)]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """A range around ``values`` with a little room; never empty."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1
    return low - room, high + room


def scatter(dots: Sequence[Dot], *, title: str, across: str, up: str, base: str) -> str:
    """A scatter plot with the unmodified model at (1, 1) as a hollow ring.

    Args:
        dots: the points; those of group ``best`` are joined by steps and named.
        title: what a screen reader says first.
        across, up: labels of the axes.
        base: tooltip of the ring.
    """
    left, right = limits([1.0, *(dot.x for dot in dots)])
    low, high = limits([1.0, *(dot.y for dot in dots)])

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - left) / (right - left) * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_axes(at, ticks(left, right, 8), ticks(low, high, 6), across, up),
        _steps([at(dot.x, dot.y) for dot in dots if dot.group == "best"]),
        _ring(*at(1, 1), base),
    ]
    for dot in sorted(dots, key=lambda dot: ("other", "plain", "best").index(dot.group)):
        parts.append(_dot(dot, *at(dot.x, dot.y)))
    named = [dot for dot in dots if dot.group == "best"]
    parts += _labels([(dot.label, *at(dot.x, dot.y)) for dot in named], [at(dot.x, dot.y) for dot in dots])
    return "".join([*parts, "</svg>"])


def _axes(at: At, across: Sequence[float], up: Sequence[float], below: str, above: str) -> Iterable[str]:
    bottom = HEIGHT - _BOTTOM
    for x in across:
        place = at(x, 0)[0]
        yield f'<path class="c-grid" d="M{place:.1f} {_TOP}V{bottom}"/>'
        yield f'<text class="c-tick" x="{place:.1f}" y="{bottom + 18}" text-anchor="middle">{x:g}×</text>'
    for y in up:
        place = at(0, y)[1]
        yield f'<path class="c-grid" d="M{_LEFT} {place:.1f}H{WIDTH - _RIGHT}"/>'
        yield f'<text class="c-tick" x="{_LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{y:.4g}</text>'
    yield f'<text class="c-name" x="{WIDTH - _RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(below)}</text>'
    yield f'<text class="c-name" x="{_LEFT}" y="16">{escape(above)}</text>'


def _steps(places: Sequence[tuple[float, float]]) -> str:
    """The edge of what is reachable: right, then down, from one of the best to the next."""
    if len(places) < 2:
        return ""
    ordered = sorted(places)
    path = f"M{ordered[0][0]:.1f} {ordered[0][1]:.1f}"
    path += "".join(f"H{x:.1f}V{y:.1f}" for x, y in ordered[1:])
    return f'<path class="c-front" d="{path}"/>'


def _ring(x: float, y: float, tooltip: str) -> str:
    return f'<circle class="c-base" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(tooltip)}</title></circle>'


def _dot(dot: Dot, x: float, y: float) -> str:
    circle = (
        f'<circle class="c-{dot.group}" cx="{x:.1f}" cy="{y:.1f}" r="{3.5 if dot.group == "other" else 4.5}">'
        f"<title>{escape(dot.tooltip)}</title></circle>"
    )
    return f'<a href="{escape(dot.href)}">{circle}</a>' if dot.href else circle


def _labels(wanted: Sequence[tuple[str, float, float]], dots: Sequence[tuple[float, float]]) -> Iterable[str]:
    """Names beside their points, where they cover neither another name nor leave the picture; else none."""
    taken: list[tuple[float, float, float, float]] = [(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
    for name, x, y in wanted:
        width = _LETTER * len(name)
        for left, base, anchor in (
            (x + 8, y - 6, "start"),
            (x - 8 - width, y - 6, "end"),
            (x + 8, y + 15, "start"),
        ):
            box = (left, base - 10, left + width, base + 3)
            inside = box[0] >= _LEFT and box[2] <= WIDTH - 2 and box[1] >= 18 and box[3] <= HEIGHT - _BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                place = left if anchor == "start" else left + width
                where = f'x="{place:.1f}" y="{base:.1f}" text-anchor="{anchor}"'
                yield f'<text class="c-label" {where}>{escape(name)}</text>'
                break


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
