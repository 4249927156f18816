"""The command ``zoo``.

Commands are named in a table with their help, and imported when they are used: ``zoo --help`` and shell completion
import none of them, a reading command never imports torch. To add one, write a function with Typer annotations (or a
``typer.Typer`` with sub-commands) and add a line to ``COMMANDS``.

Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted. What goes wrong on purpose (``ZooError``,
``TaxonomyError``) is one line on standard error; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any, ClassVar, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command as click_command

from taxonomy.errors import TaxonomyError
from zoo.errors import ZooError


class Command(NamedTuple):
    """A command that is imported on use: ``place`` is ``module:function`` or ``module:typer_app``."""

    name: str
    place: str
    help: str
    section: str


READ, RUN, KEEP = "Look things up", "Run methods", "Look after the rest"

COMMANDS = (
    Command("list", "zoo.cli.reading:list_", "List the methods.", READ),
    Command("find", "zoo.cli.finding:find", "Find methods by facets and properties.", READ),
    Command("search", "zoo.cli.reading:search", "Search the cards for words.", READ),
    Command("show", "zoo.cli.reading:show", "Show everything about one method.", READ),
    Command("compare", "zoo.cli.reading:compare", "Put methods side by side.", READ),
    Command("pareto", "zoo.cli.evidence_commands:pareto", "Draw quality against realised gain.", READ),
    Command("recommend", "zoo.cli.evidence_commands:recommend", "Say which method to use, and why.", READ),
    Command("papers", "zoo.cli.reading:papers", "Search the bibliography.", READ),
    Command(
        "taxonomy", "zoo.cli.taxonomy_commands:app", "Trees, matrix, glossary and gaps of the field.", READ
    ),
    Command("run", "zoo.cli.running:run", "Run a method on a model and measure both.", RUN),
    Command(
        "gallery", "zoo.cli.gallery:gallery", "Draw what each visual-token method keeps of a photo.", RUN
    ),
    Command("train", "zoo.cli.training:train", "Train what a method has to train, and save the result.", RUN),
    Command("fit", "zoo.cli.fitting:fit", "Find the parameters of a method on samples.", RUN),
    Command("eval", "zoo.cli.evaluating:evaluate", "Score a model on standard tasks, or on a suite.", RUN),
    Command("bench", "zoo.cli.benching:bench", "Measure many methods on many models, as a plan says.", RUN),
    Command("results", "zoo.cli.results_command:results", "List what was measured.", RUN),
    Command("import", "zoo.cli.exchange_commands:import_", "Add the runs of somebody else's export.", RUN),
    Command("reference", "zoo.cli.reference:app", "Train, examine and look into the reference VLM.", RUN),
    Command("models", "zoo.cli.running:models", "List the models that have a short name.", RUN),
    Command("export", "zoo.cli.exchange_commands:export", "Write results, cards or papers to a file.", KEEP),
    Command("catalog", "zoo.cli.catalog_commands:app", "Build, check, query or export the catalogue.", KEEP),
    Command(
        "site", "zoo.cli.site_commands:app", "Build the web pages of the catalogue, or look at them.", KEEP
    ),
    Command("new", "zoo.cli.running:new", "Begin a method: card, module and test.", KEEP),
    Command("doctor", "zoo.cli.running:doctor", "Check this installation.", KEEP),
)


class LazyGroup(TyperGroup):
    """The top-level group: knows names and help of ``COMMANDS``, and imports a command when it is asked for."""

    table: ClassVar[dict[str, Command]] = {command.name: command for command in COMMANDS}

    def list_commands(self, ctx: Any) -> list[str]:
        """Names, in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command."""
        entry = self.table.get(cmd_name)
        return None if entry is None else load(entry)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As usual, but a typo is answered with the nearest names."""
        name = args[0]
        if name not in self.table and not name.startswith("-") and not ctx.resilient_parsing:
            near = get_close_matches(name, self.table, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "zoo --help lists them"
            ctx.fail(f"there is no command '{name}'; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table by section, without importing anything."""
        for section in dict.fromkeys(entry.section for entry in self.table.values()):
            with formatter.section(section):
                rows = [(entry.name, entry.help) for entry in self.table.values() if entry.section == section]
                formatter.write_dl(rows)


def load(entry: Command) -> Any:
    """Import a command of the table."""
    module, _, name = entry.place.partition(":")
    target = getattr(import_module(module), name)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(rich_markup_mode=None, add_completion=False)
        target.command(entry.name, context_settings={"help_option_names": ["-h", "--help"]})(function)
    command = click_command(target)
    command.name = entry.name
    return command


app = typer.Typer(
    cls=LazyGroup,
    name="zoo",
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from zoo import __version__

        typer.echo(f"zoo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Methods that make transformers cheaper: look them up, run them, measure them."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    try:
        try:
            click_command(app).main(args=arguments, prog_name="zoo")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone. Keep Python from complaining again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except KeyboardInterrupt:
        code = 130
    except TaxonomyError as error:
        code = _report(error, 2)
    except ZooError as error:
        code = _report(error, error.exit_code)
    except Exception as error:
        if type(error).__module__ != "sqlite3":  # not imported here: `zoo --help` needs no database
            raise
        code = _report(f"the catalogue is damaged ({error}); rebuild it with: zoo catalog build", 2)
    sys.exit(code)


def _report(error: Exception | str, code: int) -> int:
    """One line on standard error."""
    typer.secho("error: ", fg="red", bold=True, err=True, nl=False, color=_colour_on_stderr())
    typer.echo(" ".join(str(error).split()), err=True)
    return code


def _colour_on_stderr() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")
