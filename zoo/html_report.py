"""A run as one HTML file that needs nothing else: inline style, bars as SVG, light and dark."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from zoo.bench.record import Comparison, RunRecord
from zoo.errors import RunFailed
from zoo.panels import clean, header_facts, number, removed_line, verdict, with_spread

TEMPLATES = Path(__file__).parent / "templates"

WIDTH, HEIGHT = 720, 72
"""Size of a group of bars, in SVG units."""


def write_report(record: RunRecord, folder: Path, overlay: Path | None = None) -> Path:
    """Write ``report.html`` and ``record.json`` into ``folder``; each appears complete or not at all.

    Args:
        record: of the run.
        folder: made when it does not exist.
        overlay: a PNG file to show in the report.

    Raises:
        RunFailed: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "record.json", record.to_json() + "\n")
        picture = "" if overlay is None else base64.b64encode(overlay.read_bytes()).decode()
        return write_text(folder / "report.html", render(record, picture))
    except OSError as error:
        raise RunFailed(
            f"the report could not be written to {folder}: {(error.strerror or str(error)).lower()}; the figures are "
            "in the catalogue (zoo results) unless --no-record was given"
        ) from None


def write_text(path: Path, text: str) -> Path:
    """Write a text file that appears complete or not at all."""
    with NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
    ) as file:
        part = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    part.chmod(0o644)
    part.replace(path)
    return path


def render(record: RunRecord, overlay: str = "") -> str:
    """The page. Every value is escaped by the template engine; ``overlay`` is a PNG picture in base 64."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    engine = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"number": number, "clean": clean, "spread": with_spread}
    tables = [
        (title, rows)
        for group, title in (("speed", "Speed"), ("quality", "Quality"), ("memory", "Memory"))
        if (rows := [row for row in record.comparisons if row.about.group == group])
    ]
    return engine.get_template("report.html.j2").render(
        record=record,
        overlay=overlay,
        header=header_facts(record),
        tables=tables,
        removed=[(report, removed_line(report), _report_bars(report)) for report in record.reports],
        bars=[(label, _bars(pairs)) for label, pairs in record.bars.items()],
        verdict=verdict(record.outputs) if record.outputs is not None else "",
        environment=_flat(record.environment),
        width=WIDTH,
        height=HEIGHT,
        gain_class=_gain_class,
    )


def _gain_class(row: Comparison) -> str:
    if row.gain is None or 0.98 <= row.gain <= 1.02:
        return ""
    return "better" if row.gain > 1 else "worse"


def _report_bars(report: Any) -> list[tuple[str, list[dict[str, Any]]]]:
    groups = [(label, _bars([(bar.kept, bar.total) for bar in bars])) for label, bars in report.bars.items()]
    stats = report.decoding
    if stats is not None and stats.accepted:
        counts = [stats.accepted.count(value) for value in range(max(stats.accepted) + 1)]
        groups.append(
            (
                "steps by the number of draft tokens they accepted",
                _bars([(count, max(counts)) for count in counts]),
            )
        )
    return groups


def _bars(pairs: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """Geometry of one group: full height = all, filled = kept."""
    place = WIDTH / max(1, len(pairs))
    width = max(1.0, min(0.8 * place, 28.0))
    bars = []
    for index, (kept, total) in enumerate(pairs):
        ratio = max(0.0, min(1.0, kept / total)) if total else 1.0
        bars.append(
            {
                "x": round(index * place, 2),
                "width": round(width, 2),
                "top": round(HEIGHT * (1 - ratio), 2),
                "filled": round(HEIGHT * ratio, 2),
                "title": f"{index}: {number(kept)} of {number(total)}",
            }
        )
    return bars


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name} ")
        elif value is not None:
            rows.append((f"{prefix}{name}", str(value)))
    return rows
