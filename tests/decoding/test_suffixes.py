"""Automaton and array against brute force."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.engines.suffixes import START, SuffixArray, SuffixAutomaton

TEXT = st.lists(st.integers(0, 3), max_size=40)


def occurs(part: list[int], text: list[int]) -> list[int]:
    return [place for place in range(len(text) - len(part) + 1) if text[place : place + len(part)] == part]


@settings(max_examples=300)
@given(text=TEXT, query=TEXT)
def test_the_cursor_holds_the_longest_suffix_that_occurs(text: list[int], query: list[int]) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.add(token)
    match = (START, 0)
    for end, token in enumerate(query, start=1):
        match = automaton.follow(match, token)
        longest = next(size for size in range(end, -1, -1) if occurs(query[end - size : end], text))
        assert match[1] == longest
        if longest:
            first = occurs(query[end - longest : end], text)[0] + longest
            assert automaton.behind(match[0], 5) == text[first : first + 5]
    assert len(automaton.link) <= max(2, 2 * len(text))


def test_a_shorter_match_gives_room() -> None:
    automaton = SuffixAutomaton()
    for token in [7, 8, 1, 2, 3, 9, 7, 8, 5]:
        automaton.add(token)
    state, length = automaton.follow(automaton.follow(automaton.follow((START, 0), 9), 7), 8)
    assert length == 3
    assert automaton.behind(state, 4) == [5]
    assert automaton.behind(automaton.with_room(state, 4), 4) == [1, 2, 3, 9]
    assert automaton.with_room(START, 4) == START


@settings(max_examples=300)
@given(text=TEXT, context=TEXT, depth=st.integers(1, 9))
def test_the_array_finds_every_place(text: list[int], context: list[int], depth: int) -> None:
    array = SuffixArray.build(np.array(text, dtype=np.uint16), depth)
    for size in range(1, min(depth, len(context)) + 1):
        assert sorted(array.places(context[:size]).tolist()) == occurs(context[:size], text)
    found, length = array.longest_suffix(context, 1)
    fitting = [size for size in range(1, min(depth, len(context)) + 1) if occurs(context[-size:], text)]
    assert length == max(fitting, default=0)
    assert sorted(found.tolist()) == (occurs(context[len(context) - length :], text) if length else [])


def test_places_are_sorted_by_what_begins_there() -> None:
    text = np.random.default_rng(0).integers(0, 4, 500)
    array = SuffixArray.build(text, 8)
    begun = [text[place : place + 8].tolist() for place in array.order]
    assert begun == sorted(begun)
