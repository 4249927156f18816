"""A run on the terminal: what was removed, speed beside its bound, quality, memory, both outputs.

Everything is built from the ``RunRecord`` alone. Nothing is wider than the console; without colour (a pipe,
``NO_COLOR``) the same facts are told by signs; model output and prompts are untrusted text and lose their control
characters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from zoo.bench.record import Comparison, Figure, Outputs, RunRecord
from zoo.report import DecodingStats, Report

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " .:-=+*%#"


def clean(text: str) -> str:
    """``text`` without control characters (a model may write escape sequences); tabs become spaces."""
    shown = []
    for character in text.replace("\r\n", "\n").expandtabs(4):
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co") and character not in "\n\u200d"
        shown.append("\ufffd" if hidden else character)
    return "".join(shown)


def number(value: float) -> str:
    """Three significant digits, thousands grouped, no exponent for readable sizes."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e7 or size < 1e-4:
        return f"{value:.2e}"
    if size >= 100:
        return f"{value:,.0f}"
    digits = 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return f"{value:.{digits}f}"


def with_spread(figure: Figure | None) -> str:
    """``123 ±4``; a dash when there is none."""
    if figure is None:
        return "–"
    if figure.spread is None or figure.n < 3:
        return number(figure.median)
    return f"{number(figure.median)} ±{number(figure.spread)}"


def header_facts(record: RunRecord) -> list[tuple[str, str]]:
    """Label and text of the lines above everything else."""
    parameters = ", ".join(_parameters(record.parameters)) or "none"
    model = record.model.ref + (f" ({record.model.architecture})" if record.model.architecture else "")
    where = f"{record.device}, {record.dtype}, {record.environment.get('attention') or 'default'} attention"
    hardware = str(record.environment.get("hardware", ""))
    rows = [("model", model), ("parameters", parameters), ("runs on", where), ("hardware", hardware)]
    if record.status != "done":
        rows.append(("status", record.status + (f": {record.error}" if record.error else "")))
    if record.saved:
        rows.append(("saved to", record.saved))
    return rows


def _parameters(values: dict[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _parameters(value, f"{name}.")
        elif value is not None:
            yield f"{prefix}{name}={value}"


def removed_line(report: Report) -> str:
    """``decoder parameters: 85.0M of 106M stay (-20%)``."""
    if report.decoding is not None:
        return f"{report.unit}: {number(report.kept_ratio)} (plain decoding: 1)"
    return (
        f"{report.unit}: {_amount(report.kept)} of {_amount(report.total)} stay "
        f"({report.removed_ratio:.1%} removed)"
    )


def _amount(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if float(value).is_integer() else number(value)


def draw(record: RunRecord, console: Console) -> None:
    """Print the whole record."""
    console.print(Group(*_sections(record, console)))


def _sections(record: RunRecord, console: Console) -> Iterator[RenderableType]:
    ascii_only = console.options.ascii_only
    yield _header(record, console)
    for report in record.reports:
        yield _heading(
            f"What {report.method} removed" if report.decoding is None else f"What {report.method} saved"
        )
        yield Text(removed_line(report))
        for label, bars in report.bars.items():
            yield _spark(
                label, [bar.kept for bar in bars], [bar.total for bar in bars], console.width, ascii_only
            )
        if report.facts:
            yield Text(
                " · ".join(f"{name} {_fact(value)}" for name, value in report.facts.items()), style="dim"
            )
        if report.decoding is not None:
            yield from _decoding(report.decoding, ascii_only)
    for label, pairs in record.bars.items():
        yield _spark(label, [own for own, _ in pairs], [full for _, full in pairs], console.width, ascii_only)
    for group, title in (("speed", "Speed"), ("quality", "Quality"), ("memory", "Memory")):
        rows = [row for row in record.comparisons if row.about.group == group]
        if rows:
            yield _heading(title)
            yield from _table(rows, console)
    if record.outputs is not None:
        yield _heading("Outputs (greedy)")
        yield from _outputs(record.outputs, console)
    for note in record.notes:
        yield Text.assemble(("! ", "bold yellow"), clean(note))
    if record.environment:
        clock = record.environment.get("clock")
        load = _load(record.comparisons)
        yield Text(
            f"Time is {clock}, medians of alternating runs, ± half the quartile distance.{load}", style="dim"
        )
    yield Text.assemble(("repeat: ", "dim"), clean(record.command))


def _load(rows: Iterable[Comparison]) -> str:
    """A remark when the wall clock tells another story than processor time."""
    ratios = []
    for row in rows:
        for figure in (row.dense, row.method):
            if figure is not None and figure.wall and figure.median and row.about.better is not None:
                ratio = figure.wall / figure.median
                ratios.append(ratio if row.about.better == "lower" else 1 / ratio)
    worst = max(ratios, default=1.0)
    return (
        f" The wall clock ran up to {worst:.1f} times as long: the machine was busy." if worst > 1.2 else ""
    )


def _header(record: RunRecord, console: Console) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in header_facts(record):
        table.add_row(label, Text(clean(text), style="bold yellow" if label == "status" else ""))
    return Panel(table, title=Text(record.method, style="bold cyan"), title_align="left", border_style="cyan")


def _heading(title: str) -> RenderableType:
    return Padding(Rule(Text(title, style="bold"), align="left", style="dim"), (1, 0, 0, 0))


def _fact(value: object) -> str:
    return number(value) if isinstance(value, float) else clean(str(value))


def _spark(
    label: str, kept: Sequence[float], total: Sequence[float], width: int, ascii_only: bool
) -> RenderableType:
    """One block per layer, as high as what is left of it; the extremes and the sum beside it."""
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    ratios = [own / full if full else 1.0 for own, full in zip(kept, total, strict=True)]
    bar = Text()
    step = 2 if 2 * len(ratios) <= width - 4 else 1
    for ratio in ratios:
        # Only what is gone entirely gets an empty place.
        level = 0 if ratio <= 0 else max(1, min(8, round(8 * ratio)))
        bar.append(
            blocks[level] * step, style="green" if ratio > 0.95 else "yellow" if ratio > 0.5 else "red"
        )
    # Tokens pass through every layer, so they are averaged; heads, channels and bytes are added up.
    share = len(ratios) if "tokens" in label else 1
    sums = f"{_amount(sum(kept) / share)} of {_amount(sum(total) / share)}" if ratios else "nothing"
    low = min(range(len(ratios)), key=ratios.__getitem__) if ratios else 0
    fewest = f", fewest at {low}: {_amount(kept[low])} of {_amount(total[low])}" if ratios else ""
    text = Text.assemble(
        (f"{label}", "bold"), (f"  {sums} stay{' on average' if share > 1 else ''}{fewest}", "dim")
    )
    return Group(text, Padding(bar, (0, 0, 0, 2)))


def _decoding(stats: DecodingStats, ascii_only: bool) -> Iterator[RenderableType]:
    """Where the time went, and how many draft tokens the steps accepted."""
    parts = (
        ("prefill", stats.prefill_seconds, "blue"),
        ("draft", stats.draft_seconds, "yellow"),
        ("verify", stats.verify_seconds, "green"),
        ("rest", stats.overhead_seconds, "red"),
    )
    whole = sum(seconds for _, seconds, _ in parts)
    if whole > 0:
        bar = Text("  ")
        for letter, (_, seconds, style) in zip("pdv.", parts, strict=True):
            bar.append((letter if ascii_only else "█") * round(40 * seconds / whole), style=style)
        shares = Text("time  ", style="bold")
        for name, seconds, style in parts:
            shares.append(f"{name} {seconds / whole:.0%}  ", style=style)
        yield Group(shares, bar)
    if stats.accepted:
        counts = [stats.accepted.count(value) for value in range(max(stats.accepted) + 1)]
        top = max(counts)
        table = Table.grid(padding=(0, 1))
        for value, count in enumerate(counts):
            length = round(30 * count / top)
            bar_text = ("#" if ascii_only else "▇") * (max(1, length) if count else 0)
            table.add_row(f"  {value:>3}", Text(bar_text, style="green"), Text(str(count), style="dim"))
        yield Text("draft tokens accepted per step  (how many steps)", style="bold")
        yield table


def _table(rows: Sequence[Comparison], console: Console) -> Iterator[RenderableType]:
    bounded = any(row.bound is not None for row in rows)
    gains = any(row.gain is not None for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", overflow="fold", min_width=16)
    for name in ("dense", "method"):
        table.add_column(name, justify="right", overflow="fold")
    if gains:
        table.add_column("gain", justify="right")
    if bounded:
        table.add_column("bound", justify="right")
        table.add_column("of bound", justify="right")
    for row in rows:
        label = Text(row.about.label)
        if row.about.unit:
            label.append(f" {row.about.unit}", style="dim")
        if row.task and console.width >= 100:
            label.append(f"  {clean(row.task)}", style="dim")
        cells: list[RenderableType] = [label, with_spread(row.dense), with_spread(row.method)]
        if gains:
            cells.append(_gain(row))
        if bounded:
            cells.append("" if row.bound is None else f"{row.bound:.2f}x")
            cells.append(
                "" if row.efficiency is None else f"{row.efficiency:.0%}{' (!)' if row.suspect else ''}"
            )
        table.add_row(*cells)
    yield table
    for row in rows:
        if row.bound_of:
            yield Text(f"bound of {row.about.label}: {row.bound_of}", style="dim")
    if console.width < 100:
        for task in dict.fromkeys(row.task for row in rows if row.task):
            labels = ", ".join(row.about.label for row in rows if row.task == task)
            yield Text(f"{labels}: {clean(task)}", style="dim")


def _gain(row: Comparison) -> Text:
    if row.gain is None:
        return Text("")
    style = "bold green" if row.gain > 1.02 else "bold red" if row.gain < 0.98 else "bold"
    return Text(f"{row.gain:.2f}x", style=style)


def verdict(outputs: Outputs) -> str:
    """One sentence on how the two texts relate."""
    if outputs.identical:
        return f"Identical: all {outputs.tokens_dense} tokens."
    gap = (
        f"; the dense model's two best logits are {outputs.gap:.2g} apart there"
        if outputs.gap is not None
        else ""
    )
    if not outputs.common:
        return f"They differ from the first token on{gap}."
    return f"The first {outputs.common} token{'s are' if outputs.common > 1 else ' is'} equal{gap}."


def _outputs(outputs: Outputs, console: Console) -> Iterator[RenderableType]:
    prompt = clean(outputs.prompt)
    if len(prompt) > 300:
        prompt = prompt[:200].rstrip() + " [...] " + prompt[-80:].lstrip()
    yield Text.assemble(("prompt  ", "bold"), (prompt, "dim"))
    if outputs.meaningless:
        yield Text("Random weights: the words below mean nothing.", style="yellow")
    yield Text(verdict(outputs), style="green" if outputs.identical else "")
    coloured = console.is_terminal and not console.no_color
    dense = _marked(outputs.dense, outputs.common_text, outputs.identical, coloured)
    if outputs.pieces:
        method = Text()
        for piece in outputs.pieces:
            text = clean(piece.text)
            if piece.accepted and not coloured:
                text = f"[{text}]"
            method.append(text, style="bold green" if piece.accepted else "")
        legend = "method: accepted drafts " + ("in green" if coloured else "in [brackets]")
    else:
        method = _marked(outputs.method, outputs.common_text, outputs.identical, coloured)
        legend = "method"
    panels = [
        Panel(
            dense, title=Text(f"dense, {outputs.tokens_dense} tokens"), title_align="left", border_style="dim"
        ),
        Panel(
            method,
            title=Text(f"{legend}, {outputs.tokens_method} tokens"),
            title_align="left",
            border_style="cyan",
        ),
    ]
    if console.width >= 120:
        half = console.width // 2 - 1
        for panel in panels:
            panel.width = half
        yield Columns(panels)
    else:
        yield from panels


def _marked(text: str, common: int, identical: bool, coloured: bool) -> Text:
    """The text with a sign where it leaves the other one, and what follows set apart."""
    if identical:
        return Text(clean(text))
    marked = Text(clean(text[:common]))
    marked.append("" if coloured else ">>")
    marked.append(clean(text[common:]), style="magenta")
    return marked
