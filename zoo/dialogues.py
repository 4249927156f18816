"""Text to learn from: prompts with responses, or plain texts, from packaged data and files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.data import TEXTS, load_texts
from zoo.errors import BadInput

_FIELDS = ("prompt", "instruction", "input", "response", "output", "text")


@dataclass(frozen=True)
class Dialogue:
    """A prompt and its response. A plain text is a response without a prompt."""

    prompt: str
    response: str


def load_dialogues(ref: str | Path) -> list[Dialogue]:
    """Dialogues by packaged name or from a file.

    Args:
        ref: a name in ``zoo.data.TEXTS`` (its calibration part: the held-out part stays unseen), or a file: ``.jsonl``
            (an object per line) or ``.json`` (a list of them) with fields ``prompt`` and ``response``, or
            ``instruction``, ``input`` (optional) and ``output``; ``response`` may be left out where only prompts
            matter. Objects with a field ``text``, strings, and all other files of ``load_texts`` are plain texts.

    Raises:
        BadInput: no such name or file, or an item of another form.
        NeedsExtra, DownloadFailed: as ``load_texts``.
    """
    path = Path(ref).expanduser()
    if str(ref) in TEXTS:
        return [Dialogue("", text) for text in load_texts(str(ref), "calibration")]
    if path.suffix.lower() not in (".jsonl", ".json") or not path.is_file():
        return [Dialogue("", text) for text in load_texts(path)]
    found = [dialogue for item, where in _items(path) if (dialogue := _dialogue(item, where))]
    if not found:
        raise BadInput(f"{path} holds nothing to learn from")
    return found


def _items(path: Path) -> Iterator[tuple[Any, str]]:
    """The items of a file, each with its place for messages."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            items = json.loads(content)
            if not isinstance(items, list):
                raise BadInput(f"{path} must hold a list of objects with the fields prompt and response")
            yield from ((item, f"item {index} of {path}") for index, item in enumerate(items))
            return
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                yield json.loads(line), f"line {number} of {path}"
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON: {error}") from None


def _dialogue(item: Any, where: str) -> Dialogue | None:
    """One item; ``None`` when it is blank."""
    fields = {"text": item} if isinstance(item, str) else item
    if not isinstance(fields, Mapping) or not {"prompt", "instruction", "text"} & fields.keys():
        raise BadInput(f"{where} must have the fields prompt and response, instruction and output, or text")
    values = {name: fields.get(name) or "" for name in _FIELDS}
    wrong = next((name for name, value in values.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise BadInput(f"{where}: the field {wrong} must be a string")
    prompt = values["prompt"] or "\n\n".join(filter(None, (values["instruction"], values["input"])))
    if prompt.strip():
        return Dialogue(prompt, values["response"] or values["output"])
    return Dialogue("", values["text"]) if values["text"].strip() else None
