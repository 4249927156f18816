"""The retrieved tree against plain counting, and the datastore on disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import build, plain
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo
from zoo.engines.datastore import Datastore, open_datastore
from zoo.engines.drafting import Row
from zoo.errors import BadInput
from zoo.methods.decoding.rest import RestDrafter, frequent_prefixes
from zoo.models import LoadedModel
from zoo.models.tiny import byte_tokenizer

TEXTS = ["the cat sat on the mat. ", "the cat sat on the sofa. ", "the cat ran away. "]


@settings(max_examples=200)
@given(
    rows=st.lists(st.lists(st.integers(-1, 2), min_size=4, max_size=4), max_size=12),
    choices=st.integers(1, 9),
)
def test_the_tree_holds_the_most_frequent_prefixes(rows: list[list[int]], choices: int) -> None:
    rows = [[token if -1 not in row[: place + 1] else -1 for place, token in enumerate(row)] for row in rows]
    tokens, parents, counts = frequent_prefixes(np.array(rows, dtype=np.int64).reshape(len(rows), 4), choices)
    counted: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        for end in range(1, 5):
            if -1 not in row[:end]:
                counted[tuple(row[:end])] += 1
    wanted = sorted(counted, key=lambda prefix: (-counted[prefix], prefix))[:choices]
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert paths == wanted
    assert counts == [counted[path] for path in wanted]


def drafter_of(loaded: LoadedModel, **options: int) -> RestDrafter:
    store = Datastore.build(TEXTS, loaded.tokenizer, 16)
    drafter = zoo.method("rest", **options).apply(loaded, datastore=store).drafter
    assert isinstance(drafter, RestDrafter)
    return drafter


def bytes_model() -> LoadedModel:
    loaded = build(vocab_size=300)
    loaded.processor = byte_tokenizer()
    return loaded


def test_the_longest_end_of_the_context_is_looked_up() -> None:
    loaded = bytes_model()
    tokenizer = loaded.tokenizer
    drafter = drafter_of(loaded, continuation=6)
    ids = tokenizer("so the cat sat on the ", add_special_tokens=False)["input_ids"]
    continuations, length = drafter.retrieve(ids)
    assert length == 16
    assert sorted(tokenizer.decode(row) for row in continuations) == ["mat. t", "sofa. "]
    draft = drafter.propose_row(Row(0, ids, len(ids)))
    assert len(draft.tokens) == 12
    assert draft.parents is not None
    assert draft.parents.count(-1) == 2


def test_nothing_found_is_nothing_drafted() -> None:
    drafter = drafter_of(bytes_model())
    assert drafter.propose_row(Row(0, [3, 4, 5], 3)).tokens == []
    assert drafter.propose_row(Row(0, [3], 1)).tokens == []


def test_the_end_of_the_store_is_an_end() -> None:
    loaded = bytes_model()
    ids = loaded.tokenizer("cat ran aw", add_special_tokens=False)["input_ids"]
    continuations, _ = drafter_of(loaded).retrieve(ids)
    assert continuations[0, -5:].tolist() == [-1] * 5


def test_a_text_that_is_in_the_store_is_drafted_whole() -> None:
    loaded = bytes_model()
    ids = torch.randint(40, 120, (1, 12), generator=torch.Generator().manual_seed(3))
    expected = plain(loaded, ids, max_new_tokens=40)
    store = Datastore.build(TEXTS, loaded.tokenizer, 16)
    tokens = np.array([*expected[0].tolist(), 5], dtype=np.uint16)
    known = Datastore(type(store.array).build(tokens, 16), store.tokenizer, 1)
    applied = zoo.method("rest").apply(loaded, datastore=known)
    assert torch.equal(applied.generate(input_ids=ids, do_sample=False, max_new_tokens=40), expected)
    assert applied.report.decoding is not None
    assert applied.report.decoding.tokens_per_step > 5


def test_a_store_is_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "home"))
    text = tmp_path / "texts.txt"
    text.write_text("\n\n".join(TEXTS), encoding="utf-8")
    first = open_datastore(str(text), byte_tokenizer(), 8)
    (kept,) = (tmp_path / "home" / "datastores").iterdir()
    monkeypatch.setattr(Datastore, "build", None)
    for ref in (str(text), str(kept)):
        again = open_datastore(ref, byte_tokenizer(), 8)
        assert np.array_equal(again.array.tokens, first.array.tokens)
        assert np.array_equal(again.array.order, first.array.order)
        assert (again.array.depth, again.texts, again.tokenizer) == (8, 3, first.tokenizer)


def test_a_store_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    file = tmp_path / "store.safetensors"
    Datastore.build(TEXTS, byte_tokenizer(), 4).save(file)
    with pytest.raises(BadInput, match="lower max_match"):
        open_datastore(str(file), byte_tokenizer(), 8)
    other = byte_tokenizer()
    other.add_tokens(["cat"])
    with pytest.raises(BadInput, match="another tokenizer"):
        open_datastore(str(file), other, 4)
    save_file({"tokens": np.zeros(3)}, file)
    with pytest.raises(BadInput, match="holds no datastore"):
        open_datastore(str(file), byte_tokenizer(), 4)
    file.write_bytes(b"not a store")
    with pytest.raises(BadInput, match="cannot be read"):
        open_datastore(str(file), byte_tokenizer(), 4)
    with pytest.raises(BadInput, match="tokenizer"):
        zoo.method("rest").apply(build())
