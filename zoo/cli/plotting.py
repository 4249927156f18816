"""A scatter plot in characters, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from taxonomy.charts import limits, ticks


def scatter(
    points: Sequence[tuple[float, float, str]], *, width: int, height: int, across: str, up: str
) -> list[str]:
    """Lines of a plot.

    Args:
        points: ``(x, y, mark)``; where two fall into one cell the later one is drawn.
        width, height: size of the plotting area, in characters.
        across, up: labels of the axes.
    """
    left, right = limits([x for x, _, _ in points])
    low, high = limits([y for _, y, _ in points])

    def column(x: float) -> int:
        return round((x - left) / (right - left) * (width - 1))

    def row(y: float) -> int:
        return round((high - y) / (high - low) * (height - 1))

    cells = [[" "] * width for _ in range(height)]
    for x, y, mark in points:
        cells[row(y)][column(x)] = mark
    marked_rows = {row(y): f"{y:g}" for y in ticks(low, high, max(3, height // 3))}
    margin = max(len(text) for text in marked_rows.values())
    lines = [up]
    for number, cell_row in enumerate(cells):
        edge = "┤" if number in marked_rows else "│"
        lines.append(f"{marked_rows.get(number, ''):>{margin}} {edge}{''.join(cell_row)}".rstrip())
    axis, labels = ["─"] * width, [" "] * (width + 8)
    for x in ticks(left, right, max(3, width // 12)):
        place = column(x)
        axis[place] = "┬"
        labels[place : place + len(f"{x:g}")] = f"{x:g}"
    lines.append(f"{'':>{margin}} └{''.join(axis)}")
    lines.append(f"{'':>{margin}}  {''.join(labels).rstrip()}")
    lines.append(f"{across:>{margin + 2 + width}}")
    return lines
