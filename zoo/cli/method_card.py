"""The card of a method on the terminal, and methods side by side."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from taxonomy.queries import Check, Claim, Comparison, MethodPage, Parameter, default_text, labels
from taxonomy.vocabulary import FACETS, PROPERTIES
from zoo.cli.output import NO, YES, Column, counted, print_parts, print_table, terminal

BASIS = {
    "official-code": "the official code was read",
    "paper-text": "the paper was read, not its code",
    "abstract-only": "only the abstract was read",
}
NOTES = {
    "note": "Good to know",
    "paper_vs_code": "Where paper and official code differ",
    "deviation": "Where this implementation differs from the official code",
    "reconstructed": "What no source states, and was reconstructed",
}


def print_card(page: MethodPage, console: Console | None = None) -> None:
    """Print everything about one method that is known to be true."""
    console = console or terminal()
    print_parts(_parts(page), console, min(console.width, 110))  # longer lines are hard to read


def _parts(page: MethodPage) -> Iterable[RenderableType]:
    yield _head(page)
    yield from _section("Facets", _facets(page))
    if page.properties:
        yield from _section("Properties", _properties(page))
    if page.implemented:
        yield from _section("Parameters", _parameters(page.parameters))
    if page.claims or page.unverified_claims:
        yield from _section("Reported by its source", _claims(page.claims, len(page.unverified_claims)))
    if page.measurements:
        yield from _section("Measured", _measured(page))
    yield from _section("Fidelity", _fidelity(page))
    for kind, title in NOTES.items():
        if page.notes[kind]:
            yield from _section(title, Group(*(_bullet(text) for text in page.notes[kind])))
    yield from _section("Like it", _alike(page))
    yield from _section("Use", _use(page))


def _head(page: MethodPage) -> Panel:
    where = [str(page.year), page.venue or "", *(f"arXiv:{number}" for number in page.arxiv)]
    lines = Text(page.title, style="bold")
    if page.authors:
        names = page.authors if len(page.authors) <= 4 else (*page.authors[:3], "et al.")
        lines.append("\n" + ", ".join(names), style="not bold")
    lines.append("\n" + " · ".join(part for part in where if part), style="not bold dim")
    if page.code:
        lines.append(f"\n{page.code} ({page.code_license or 'no licence stated'})", style="not bold dim")
    state = Text("✓ runs here", "green") if page.implemented else Text("not implemented yet", "yellow")
    return Panel(
        Group(lines, Text(""), Text(page.summary)),
        title=Text.assemble(
            (page.name, "bold cyan"), (f" · {page.slug}" if page.slug != page.name.lower() else "", "")
        ),
        subtitle=state,
        title_align="left",
        subtitle_align="right",
        padding=(1, 2),
        border_style="cyan",
    )


def _section(title: str, body: RenderableType) -> Iterable[RenderableType]:
    yield Text(f"\n{title}", style="bold")
    yield Padding(body, (0, 0, 0, 2))


def _grid(rows: Iterable[tuple[Text | str, ...]], *, first: str = "dim") -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=first, no_wrap=True)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return table


def _bullet(text: str) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_row("•", Text(text))
    return table


def _facets(page: MethodPage) -> Table:
    return _grid(
        (FACETS[name].label, ", ".join(labels(FACETS[name], terms))) for name, terms in page.facets.items()
    )


def _properties(page: MethodPage) -> Table:
    rows = []
    for name, value in page.properties.items():
        mark = Text("yes", "green") if value else Text("no", "dim")
        rows.append((PROPERTIES[name].label, mark, _verified(name, page.checks)))
    return _grid(rows, first="")


def _verified(name: str, checks: Iterable[Check]) -> Text:
    """On which models the property was executed as a test."""
    own = [check for check in checks if check.kind == "property" and check.subject == name]
    failed = [check.model for check in own if not check.passed]
    if failed:
        return Text(f"the check fails on {', '.join(failed)}", "red")
    return Text(f"{YES} verified on {', '.join(check.model for check in own)}" if own else "", "green")


def _parameters(parameters: Iterable[Parameter]) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("default")
    table.add_column("type", style="dim")
    table.add_column("meaning")
    for row in parameters:
        table.add_row(row.name, Text(default_text(row)), Text(row.type), Text(row.description))
    return table if table.row_count else Text("none", "dim")


def _claims(claims: Iterable[Claim], unverified: int) -> RenderableType:
    lines: list[RenderableType] = []
    for claim in claims:
        line = Text(f"{claim.metric}: ")
        line.append(claim.value, "bold")
        if claim.baseline is not None:
            line.append(f" (unmodified: {claim.baseline})")
        setting = " · ".join(part for part in (claim.model, claim.task, claim.budget) if part)
        line.append(f" · {setting}")
        if claim.source:
            line.append(f" [{claim.source}]", "dim")
        lines.append(_claim_bullet(line))
    if unverified:
        lines.append(
            Text(
                f"{counted(unverified, 'recalled figure')} not read from a source: not shown (--json has them)",
                "dim",
            )
        )
    return Group(*lines)


def _claim_bullet(line: Text) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_row("•", line)
    return table


def _measured(page: MethodPage) -> Table:
    rows = []
    for figure in page.measurements[:12]:
        spread = f" ± {figure.spread:.3g}" if figure.spread is not None else ""
        value = f"{figure.median:.4g}{spread} {'×' if figure.arm == 'ratio' else figure.unit}"
        rows.append(
            (
                " ".join(part for part in (figure.quantity, figure.task) if part),
                figure.arm,
                value,
                figure.model,
            )
        )
    return _grid(rows, first="")


def _fidelity(page: MethodPage) -> RenderableType:
    commit = f" at {page.code_commit}" if page.code_commit else ""
    lines = [Text(f"Basis: {BASIS[page.basis]}{commit}.")]
    golden = [check for check in page.checks if check.kind == "golden"]
    if golden:
        passed = sum(check.passed for check in golden)
        lines.append(
            Text(
                f"{passed} of {counted(len(golden), 'golden case')} of the official code reproduced.",
                "green" if passed == len(golden) else "red",
            )
        )
    return Group(*lines)


def _alike(page: MethodPage) -> RenderableType:
    rows = [
        (
            other.slug,
            f"{other.score:.0%} of its facets shared",
            Text(YES, "green") if other.implemented else Text(NO),
        )
        for other in page.similar
    ]
    if not page.related:
        return _grid(rows, first="cyan")
    return Group(_grid(rows, first="cyan"), Text(f"Named on the card: {', '.join(page.related)}", "dim"))


def _use(page: MethodPage) -> RenderableType:
    if not page.implemented:
        return Text(
            f"It has a card only; CONTRIBUTING.md shows how to add zoo/methods/.../{page.slug.replace('-', '_')}.py"
        )
    option = next(
        (row for row in page.parameters if not row.required and isinstance(row.default, int | float)), None
    )
    setting = f" --set {option.name}={default_text(option)}" if option else ""
    keyword = f", {option.name}={default_text(option)}" if option else ""
    return Group(
        Text(f"zoo run {page.slug}{setting}", "cyan"),
        Text(f"zoo results {page.slug}", "cyan"),
        Text(f'zoo.method("{page.slug}"{keyword}).apply(zoo.load_model("..."))', "cyan"),
    )


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """One column per method; what differs is in bold."""
    console = console or terminal()
    columns = [Column("", "dim"), *(Column(page.slug, "") for page in comparison.methods)]
    if not console.is_terminal:
        print_table(columns, [(row.label, *row.values) for row in comparison.rows], console=console)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    table.add_column("", style="dim", overflow="fold")
    for page in comparison.methods:
        table.add_column(Text(page.slug), overflow="fold", ratio=1)
    group = ""
    for row in comparison.rows:
        if row.group != group:
            group = row.group
            table.add_row(Text(f"\n{group}", "bold"))
        table.add_row(row.label, *(Text(value, "" if row.same else "bold") for value in row.values))
    console.print(table)
