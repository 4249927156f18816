"""A suite file, and rows for it."""

from __future__ import annotations

import json
from pathlib import Path

SUITE = """
name = "mini"
title = "A small suite"
budgets = [0.5]
notes = ["everything is made up"]

[[datasets]]
name = "colours"
ability = "recognition"
path = "colours.jsonl"
rule = "yes-no"
per = "kind"
groups = [["number"]]

[[datasets]]
name = "shapes"
ability = "recognition"
path = "shapes"
prompt = "Context: {hint}\\n{question}\\n{choices}\\nThe letter."
choices = "options"
answer_as = "index"
rule = "letter"

[[datasets]]
name = "signs"
ability = "text reading"
path = "signs.jsonl"
answer = "answers"
rule = "anls"
note = "only two of them"

[[datasets]]
name = "rare"
ability = "text reading"
path = "signs.jsonl"
answer = "answers"
rule = "contains"
optional = true

[[datasets]]
name = "essays"
ability = "writing"
hub = "somebody/essays"
judge = "a teacher"
"""


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
