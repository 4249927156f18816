"""Charts of the site as SVG: points in a plane or in lanes, with their names.

matplotlib draws the two axes (scale, grid, numbers, name) and says where a value lies on them. The points go on top as
elements of their own, since they are links with tooltips. An axis depends on nothing but its name and its range, which
ends at round numbers, so one that was drawn serves all charts with that range: ten thousand charts take seconds.
Colours come from the style sheet (classes only), so that charts follow the theme.
"""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Literal
from xml.etree import ElementTree

from taxonomy.errors import TaxonomyError

WIDTH, HEIGHT = 720, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 22, 30, 48
_LETTER = 6.6
"""Width of a letter of a label, in SVG units: an estimate that is on the large side."""

_RADIUS = 4.5
"""Of a point."""

_LONGEST = 28
"""Most letters of the name of a lane."""

_ORDER = ("other", "plain", "best")
"""In which groups are drawn: the later over the earlier."""

_MOST_ACROSS, _MOST_UP = 8, 6
"""Most numbers along the two axes."""


@dataclass(frozen=True)
class Dot:
    """A point: ``group`` is ``best``, ``plain`` or ``other`` (drawn faintly); ``href`` where it leads.

    In a chart of lanes ``y`` is the number of the lane.
    """

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
    below, x0, dx = _axis("x", _range([dot.x for dot in dots], _MOST_ACROSS), across)
    left, y0, dy = _axis("y", _range([dot.y for dot in dots], _MOST_UP), up)

    def at(x: float, y: float) -> tuple[float, float]:
        return x0 + x * dx, y0 + y * dy

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        below,
        left,
        _steps([at(dot.x, dot.y) for dot in dots if dot.group == "best"]),
        _ring(*at(1, 1), base),
    ]
    for dot in sorted(dots, key=lambda dot: _ORDER.index(dot.group)):
        parts.append(_dot(dot, *at(dot.x, dot.y)))
    named = [dot for dot in dots if dot.group == "best"]
    parts += _labels([(dot.label, *at(dot.x, dot.y)) for dot in named], [at(dot.x, dot.y) for dot in dots])
    return "".join([*parts, "</svg>"])


def lanes(
    dots: Sequence[Dot], names: Sequence[str], *, noise: float, title: str, across: str, base: str
) -> str:
    """Points in lanes, one below the other, along one axis; 1, the unmodified model, is a line.

    Args:
        dots: the points; those with a label are named where there is room, the first ones first.
        names: of the lanes, from above.
        noise: how far from 1 a point may lie by chance; the band is drawn.
        title: what a screen reader says first.
        across: label of the axis.
        base: tooltip of the line.
    """
    names = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names]
    left = round(16 + _LETTER * max(map(len, names)))
    values = [1 - noise, 1 + noise, *(dot.x for dot in dots)]
    below, x0, dx = _axis("x", _range(values, _MOST_ACROSS), across, left)
    height = (HEIGHT - _TOP - _BOTTOM) / len(names)
    middles = [_TOP + (number + 0.5) * height for number in range(len(names))]
    places = _apart([(x0 + dot.x * dx, middles[int(dot.y)]) for dot in dots], height / 2 - _RADIUS)
    one, ends = x0 + dx, (_TOP, HEIGHT - _BOTTOM)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<rect class="c-noise" x="{one - noise * dx:.1f}" y="{ends[0]}" width="{2 * noise * dx:.1f}"'
        f' height="{ends[1] - ends[0]}"/>',
        below,
        *(
            f'<path class="c-grid" d="M{left} {middle + height / 2:.1f}H{WIDTH - _RIGHT}"/>'
            for middle in middles[:-1]
        ),
        f'<path class="c-base" d="M{one:.1f} {ends[0]}V{ends[1]}"><title>{escape(base)}</title></path>',
        *(
            f'<text class="c-lane" x="{left - 12}" y="{middle + 4:.1f}" text-anchor="end">{escape(name)}</text>'
            for name, middle in zip(names, middles, strict=True)
        ),
    ]
    for dot, place in sorted(zip(dots, places, strict=True), key=lambda pair: _ORDER.index(pair[0].group)):
        parts.append(_dot(dot, *place))
    named = [(dot.label, *place) for dot, place in zip(dots, places, strict=True) if dot.label]
    parts += _labels(named, places, left)
    return "".join([*parts, "</svg>"])


def _apart(places: Sequence[tuple[float, float]], most: float) -> list[tuple[float, float]]:
    """The places, moved up or down by at most ``most``, so that no two of a lane lie upon each other if that can be."""
    taken: dict[float, list[tuple[float, float]]] = defaultdict(list)
    found: list[tuple[float, float]] = []
    step = 2 * _RADIUS
    shifts = [sign * n * step for n in range(1 + int(most // step)) for sign in ((1, -1) if n else (1,))]
    for x, y in places:
        lane = taken[y]
        free = (
            shift for shift in shifts if all(math.hypot(x - ax, y + shift - ay) >= step for ax, ay in lane)
        )
        lane.append((x, y + next(free, 0.0)))
        found.append(lane[-1])
    return found


def _range(values: Sequence[float], most: int) -> tuple[float, ...]:
    """Round numbers, the first not above and the last not below any of ``values`` and the unmodified model's 1."""
    values = [1.0, *values]
    one, other, *_ = ticks(*limits(values), most)
    step = other - one
    first, last = math.floor(min(values) / step + 1e-9), math.ceil(max(values) / step - 1e-9)
    return tuple(round(number * step, 10) for number in range(first, max(last, first + 1) + 1))


@lru_cache(maxsize=1024)
def _axis(
    way: Literal["x", "y"], numbers: tuple[float, ...], name: str, start: int = _LEFT
) -> tuple[str, float, float]:
    """One axis with its part of the grid, as SVG elements; the place of its 0, and how far it is from there to its 1.

    The grid begins ``start`` units from the left.

    Raises:
        TaxonomyError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context, rcdefaults, rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise TaxonomyError(
            "the site's charts need matplotlib; install it with: pip install 'efficiency-zoo[site]'"
        ) from None
    content = io.StringIO()
    with rc_context():  # whatever the user has configured: the same chart everywhere
        rcdefaults()
        rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "efficiency-zoo"})  # text stays text
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)  # one point of SVG is one unit
        left, bottom = start / WIDTH, _BOTTOM / HEIGHT
        axes = figure.add_axes((left, bottom, 1 - left - _RIGHT / WIDTH, 1 - bottom - _TOP / HEIGHT))
        for unused in (*axes.spines.values(), axes.yaxis if way == "x" else axes.xaxis):
            unused.set_visible(False)
        axes.tick_params(length=0, pad=10, labelsize=11.5)
        if way == "x":
            axes.set_xlim(numbers[0], numbers[-1])
            axes.set_xticks(numbers, [f"{x:g}×" for x in numbers], gid="c-tick")
            title = axes.set_xlabel(name, loc="right")
        else:
            axes.set_ylim(numbers[0], numbers[-1])
            axes.set_yticks(numbers, [f"{y:.4g}" for y in numbers], gid="c-tick")
            title = axes.set_title(name, loc="left", x=0, pad=10)
        title.set(gid="c-name", fontsize=12, parse_math=False)
        axes.grid(visible=True, axis=way, gid="c-grid")
        figure.savefig(content, format="svg", metadata={"Date": None})
        zero, one = axes.transData.transform([(0, 0), (1, 1)])[:, 0 if way == "x" else 1]
    if way == "y":  # matplotlib counts from below, SVG from above
        zero, one = HEIGHT - zero, HEIGHT - one
    return "".join(_elements(content.getvalue())), float(zero), float(one - zero)


def _elements(drawing: str) -> Iterator[str]:
    """What is marked with a class in an SVG of matplotlib, without its ids, fonts and colours."""
    name = "{http://www.w3.org/2000/svg}"
    for group in ElementTree.fromstring(drawing).iter(f"{name}g"):  # noqa: S314 - we have just made it
        kind = group.get("id", "")
        if kind.startswith("c-"):
            for path in group.iter(f"{name}path"):
                yield f'<path class="{kind}" d="{" ".join(path.get("d", "").split())}"/>'
            for text in group.iter(f"{name}text"):
                anchor = re.search(r"text-anchor: (\w+)", text.get("style", ""))
                place = f'x="{text.get("x")}" y="{text.get("y")}" text-anchor="{anchor[1] if anchor else "start"}"'
                yield f'<text class="{kind}" {place}>{escape(text.text or "")}</text>'


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
        f'<circle class="c-{dot.group}" cx="{x:.1f}" cy="{y:.1f}" r="{3.5 if dot.group == "other" else _RADIUS}">'
        f"<title>{escape(dot.tooltip)}</title></circle>"
    )
    return f'<a href="{escape(dot.href)}">{circle}</a>' if dot.href else circle


def _labels(
    wanted: Sequence[tuple[str, float, float]], dots: Sequence[tuple[float, float]], start: int = _LEFT
) -> Iterable[str]:
    """Names beside their points, where they cover neither another name nor leave the picture; else none."""
    taken: list[tuple[float, float, float, float]] = [(x - 6, y - 5, x + 6, y + 5) for x, y in dots]
    for name, x, y in wanted:
        width = _LETTER * len(name)
        for left, base, anchor in (
            (x + 8, y - 8, "start"),
            (x - 8 - width, y - 8, "end"),
            (x + 8, y + 15, "start"),
            (x - 8 - width, y + 15, "end"),
        ):
            box = (left, base - 10, left + width, base + 3)
            inside = box[0] >= start and box[2] <= WIDTH - 2 and box[1] >= 18 and box[3] <= HEIGHT - _BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                place = left if anchor == "start" else left + width
                where = f'x="{place:.1f}" y="{base:.1f}" text-anchor="{anchor}"'
                yield f'<text class="c-label" {where}>{escape(name)}</text>'
                break


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
