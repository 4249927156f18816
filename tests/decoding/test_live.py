"""What the terminal shows of a generation while it runs, and the tree of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO

import pytest
from decoders import VOCABULARY, Fixed, build, plug, prompts
from rich.console import Console

from zoo.cli import main
from zoo.engines.decoding import Step
from zoo.engines.drafting import Context, Draft, Row
from zoo.live import LiveText, trunk
from zoo.models.tiny import byte_tokenizer


def terminal(width: int = 60, *, colour: bool = True) -> Console:
    return Console(
        file=StringIO(), width=width, force_terminal=True, color_system="standard" if colour else None
    )


def printed(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def ids(text: str) -> tuple[int, ...]:
    return tuple(byte_tokenizer()(text, add_special_tokens=False)["input_ids"])


def step(accepted: str, own: str, draft: Draft | None = None, path: tuple[int, ...] = ()) -> Step:
    draft = draft or Draft(list(ids(accepted)))
    return Step(0, ids(accepted) + ids(own), len(accepted), len(draft.tokens), ids("x")[0], draft, path)


def test_accepted_tokens_are_in_colour() -> None:
    console = terminal()
    live = LiveText(console)
    with live.follow(byte_tokenizer()) as on_step:
        on_step(step("", "a"))
        on_step(step("bc", "d"))
    shown = printed(console)
    assert "a" in shown
    assert "\x1b[1;32mbc\x1b[0m" in shown
    assert shown.index("bc") < shown.index("d")


def test_half_a_character_waits_for_its_other_half() -> None:
    console = terminal(colour=False)
    first, second = ids("é")
    with LiveText(console).follow(byte_tokenizer()) as on_step:
        on_step(Step(0, (first,), 0, 0))
        assert "\ufffd" not in printed(console)
        on_step(Step(0, (second,), 0, 0))
    assert "é" in printed(console)


def test_control_characters_do_not_reach_the_terminal() -> None:
    console = terminal(colour=False)
    with LiveText(console).follow(byte_tokenizer()) as on_step:
        on_step(step("", "\x1b[31m"))
    assert "\x1b" not in printed(console)


def test_the_rest_of_the_terminal_pauses_also_after_an_error() -> None:
    events: list[str] = []

    @contextmanager
    def pause() -> Iterator[None]:
        events.append("paused")
        try:
            yield
        finally:
            events.append("goes on")

    live = LiveText(terminal(), pause=pause)
    with pytest.raises(RuntimeError), live.follow(byte_tokenizer()):
        raise RuntimeError
    assert events == ["paused", "goes on"]


def test_steps_can_be_remembered_in_silence() -> None:
    console = terminal()
    live = LiveText(console, stream=False)
    with live.follow(byte_tokenizer()) as on_step:
        on_step(step("ab", "c"))
    assert printed(console) == ""
    assert [one.accepted for one in live.steps] == [2]


def test_the_trunk_is_the_accepted_path_and_then_the_deepest_way() -> None:
    parents = [-1, -1, 0, 1, 1, 4, 3]
    assert [(node, beside) for node, beside, _ in trunk(parents, (1, 3))] == [(1, [0]), (3, [4]), (6, [])]
    assert [node for node, _, _ in trunk(parents, ())] == [1, 3, 6]
    assert list(trunk([], ())) == []


def test_the_tree_of_the_best_step() -> None:
    console = terminal(colour=False)
    live = LiveText(console, stream=False)
    tree = Draft(list(ids("abcde")), [-1, -1, 0, 1, 2])
    with live.follow(byte_tokenizer()) as on_step:
        on_step(step("", "q", Draft(list(ids("rst")))))
        on_step(step("ac", "q", tree, (0, 2)))
    console.print(live.tree())
    lines = [line.rstrip() for line in printed(console).splitlines()]
    assert lines == [
        "step 1: 2 of 5 draft tokens accepted",
        "  'x'",
        "✓ 'a' 'b' ['d']",
        "✓ 'c'",
        "│ 'e'",
    ]


def test_without_any_draft_there_is_no_tree() -> None:
    console = terminal()
    console.print(LiveText(console).tree())
    assert "no tree" in printed(console)


def test_steps_of_a_real_generation_carry_their_drafts() -> None:
    loaded = build(vocab_size=300)

    def say(context: Context, row: Row) -> Draft:
        return Draft([5, 6, row.tokens[-1] % VOCABULARY], [-1, -1, 0])

    live = LiveText(terminal(), stream=False)
    applied = plug(loaded, Fixed(say, tree=True))
    with live.follow(byte_tokenizer()) as on_step:
        applied.on_step = on_step
        out = applied.generate(input_ids=prompts(), do_sample=False, max_new_tokens=12)[0].tolist()
    assert live.steps[0].draft.tokens == []
    place = len(prompts()[0]) + 1
    for one in live.steps[1:]:
        assert one.root == out[place - 1]
        assert len(one.draft.tokens) == one.drafted
        assert [one.draft.tokens[node] for node in one.path] == list(one.tokens[: one.accepted])
        place += len(one.tokens)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["run", *words, "-m", "tiny-llama", "--no-record"])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_the_command_draws_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "goose", "--draw-tree", "--prompt", "one two one two one two", "-n", "12", "-r", "1"
    )
    assert code == 0
    assert "draft tokens accepted\n" in out.split("repeat:")[1]
    code, _, err = run(capsys, "flap", "--draw-tree")
    assert code == 2
    assert "no tree to draw" in err
    assert err.count("\n") == 1
