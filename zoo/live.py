"""A generation as it happens, for the terminal: accepted drafts in colour, and the draft tree of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from zoo.panels import clean

if TYPE_CHECKING:
    from zoo.engines.decoding import Step

ACCEPTED = "bold green"


class LiveText:
    """Prints the tokens of a generation as they are committed, and remembers its steps.

    Args:
        console: where to print.
        stream: print at all; otherwise the steps are only remembered.
        pause: entered while text is printed, so that nothing else draws on the terminal.
    """

    def __init__(
        self,
        console: Console,
        *,
        stream: bool = True,
        pause: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.console = console
        self.stream = stream
        self.pause = pause
        self.steps: list[Step] = []
        self._decode: Callable[[Sequence[int]], str] = str
        self._ids: list[int] = []
        self._shown = ""

    @contextmanager
    def follow(self, tokenizer: Any) -> Iterator[Callable[[Step], None]]:
        """Yields what is to be called with every step (batch size 1)."""
        self.steps, self._ids, self._shown = [], [], ""
        self._decode = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)
        if not self.stream:
            yield self.steps.append
            return
        with self.pause():
            try:
                yield self._show
            finally:
                self.console.print()
                self.console.print(Text("accepted drafts are in green; now measuring", style="dim"))

    def _show(self, step: Step) -> None:
        self.steps.append(step)
        self._print(step.tokens[: step.accepted], ACCEPTED)
        self._print(step.tokens[step.accepted :], "")

    def _print(self, tokens: Sequence[int], style: str) -> None:
        """What ``tokens`` add to the text. Half a character waits for its other half."""
        if not tokens:
            return
        self._ids += tokens
        text = self._decode(self._ids).rstrip("\ufffd")
        if text.startswith(self._shown):
            self.console.print(Text(clean(text[len(self._shown) :]), style=style), end="")
            self._shown = text

    def tree(self) -> RenderableType:
        """The draft of the step that accepted most: its trunk downwards, what branches off beside it.

        The trunk is the accepted path and, below it, the way to the deepest node. In brackets behind a branch stand
        its own branches.
        """
        drafted = [step for step in self.steps if step.draft.tokens]
        if not drafted:
            return Text("Nothing was drafted, so there is no tree to draw.")
        step = max(drafted, key=lambda step: (step.accepted, step.drafted))
        number = self.steps.index(step)
        ascii_only = self.console.options.ascii_only
        grid = Table.grid(padding=(0, 1))
        grid.add_column()
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis", style="dim")
        grid.add_row("", Text(self._token(step.root)), "")
        parents = step.draft.parents
        for node, siblings, below in trunk(
            list(range(-1, step.drafted - 1)) if parents is None else parents, step.path
        ):
            accepted = node in step.path
            mark = ("+" if ascii_only else "✓") if accepted else ("|" if ascii_only else "│")
            token = Text(self._token(step.draft.tokens[node]), style=ACCEPTED if accepted else "")
            beside = "  ".join(self._branch(step, sibling, below) for sibling in siblings)
            grid.add_row(Text(mark, style=ACCEPTED if accepted else "dim"), token, Text(beside))
        title = f"step {number}: {step.accepted} of {step.drafted} draft tokens accepted"
        return Group(Text(title, style="bold"), grid)

    def _branch(self, step: Step, node: int, below: list[list[int]]) -> str:
        own = self._token(step.draft.tokens[node])
        inner = " ".join(self._branch(step, child, below) for child in below[node + 1])
        return f"{own} [{inner}]" if inner else own

    def _token(self, token: int | None) -> str:
        return "" if token is None else repr(clean(self._decode([token])))


def trunk(parents: Sequence[int], path: Sequence[int]) -> Iterator[tuple[int, list[int], list[list[int]]]]:
    """The nodes of the trunk from the top, each with its siblings and the children of all nodes.

    Args:
        parents: see ``zoo.engines.trees``.
        path: accepted nodes, with which the trunk begins.
    """
    from zoo.engines.trees import children

    below = children(parents)
    height = [0] * (len(parents) + 1)
    for node in range(len(parents) - 1, -1, -1):
        height[parents[node] + 1] = max(height[parents[node] + 1], height[node + 1] + 1)
    place = 0
    accepted = list(path)
    while below[place]:
        options = below[place]
        node = accepted.pop(0) if accepted else max(options, key=lambda option: height[option + 1])
        yield node, [option for option in options if option != node], below
        place = node + 1
