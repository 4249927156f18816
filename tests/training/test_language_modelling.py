"""Dialogues from files, token examples, padding, the loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from texts import jsonl

from zoo.dialogues import Dialogue, load_dialogues
from zoo.engines.language_modelling import (
    TokenExample,
    causal_lm_loss,
    collate,
    encode,
    mean_loss,
    prompt_ids,
)
from zoo.errors import BadInput
from zoo.models.tiny import byte_tokenizer, tiny_model

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)


def test_dialogues_of_every_form(tmp_path: Path) -> None:
    rows: list[object] = [
        {"prompt": "a", "response": "b"},
        {"instruction": "add", "input": "1 1", "output": "2"},
        {"instruction": "sing", "input": None, "output": "la"},
        {"prompt": "only a prompt"},
        {"text": "plain"},
        "plainer",
        {"text": "  "},
    ]
    expected = [
        Dialogue("a", "b"),
        Dialogue("add\n\n1 1", "2"),
        Dialogue("sing", "la"),
        Dialogue("only a prompt", ""),
        Dialogue("", "plain"),
        Dialogue("", "plainer"),
    ]
    assert load_dialogues(jsonl(tmp_path / "a.jsonl", rows)) == expected
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert load_dialogues(str(tmp_path / "a.json")) == expected
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert load_dialogues(tmp_path / "a.txt") == [Dialogue("", "one"), Dialogue("", "two")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a"}', r"line 1 of .* must have the fields prompt and response"),
        ('{"prompt": "a", "response": 3}', r"line 1 of .*: the field response must be a string"),
        ('{"prompt": ', "cannot be read as JSON"),
        ("[1, 2]", "must have the fields"),
        ("", "holds nothing to learn from"),
    ],
)
def test_wrong_files_are_told_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        load_dialogues(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_a_response_is_predicted_with_its_end_and_a_text_in_pieces() -> None:
    tokenizer = byte_tokenizer()
    (example,) = encode(tokenizer, Dialogue("hi", "yes"), 64)
    assert tokenizer.decode(example.ids[: example.start]) == "<s>hi\n"
    assert tokenizer.decode(example.ids[example.start :]) == "yes</s>"
    (cut,) = encode(tokenizer, Dialogue("hi", "yes"), 6)
    assert cut.ids == example.ids[:6]
    assert encode(tokenizer, Dialogue("a long prompt", "yes"), 6) == []
    assert encode(tokenizer, Dialogue("no response", ""), 64) == []
    pieces = encode(tokenizer, Dialogue("", "abcdefgh"), 4)  # <s> and eight letters: 4, 4 and a single one
    assert [tokenizer.decode(piece.ids) for piece in pieces] == ["<s>abc", "defg"]
    assert {piece.start for piece in pieces} == {1}


def test_prompts_go_through_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(prompt_ids(tokenizer, "hi")).endswith("[user]hi[bot]")
    assert tokenizer.decode(prompt_ids(tokenizer, "hi", "be nice")).endswith("[system]be nice[user]hi[bot]")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(name: str) -> None:
    model, _ = tiny_model(name)
    examples = [TokenExample((5, 9, 30, 31, 40), 2), TokenExample((7, 8, 9), 1), TokenExample((4, 6), 1)]
    batch = collate(examples, 0, "cpu")
    together = causal_lm_loss(model, batch)
    assert together.terms == 3 + 2 + 1
    expected = 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        scores = model(ids).logits[0].detach().log_softmax(-1)
        expected -= sum(float(scores[at - 1, ids[0, at]]) for at in range(example.start, len(example.ids)))
    assert together.total.item() == pytest.approx(expected, rel=1e-5)
    assert mean_loss(model, examples, 0, batch=2) == pytest.approx(expected / 6, rel=1e-5)
