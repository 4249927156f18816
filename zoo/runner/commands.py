"""A run as words of the command line: the command that repeats it, and values as they are typed."""

from __future__ import annotations

import json
import shlex
from typing import Any

from zoo.bench.settings import Settings
from zoo.errors import BadParameter
from zoo.runner.request import CALIBRATION_WINDOWS, Request


def command_line(name: str, ref: str, request: Request, settings: Settings) -> str:
    """The shell command that repeats a run."""
    words = ["zoo", "run", name, "--model", ref]
    for key, value in request.parameters.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    flags: list[tuple[str, Any, Any]] = [
        ("--prompt", request.prompt, None),
        ("--calibration", request.calibration, None),
        ("--calibration-windows", request.calibration_windows, CALIBRATION_WINDOWS),
        ("--draft", request.draft, None),
        ("--device", request.device, None),
        ("--dtype", request.dtype, None),
        ("--seed", request.seed, 0),
        ("--video", request.video, None),
        ("--frames", request.frames, None),
        ("--max-new-tokens", settings.new_tokens, None),
        ("--repeats", settings.repeats, Settings().repeats),
        ("--seconds", settings.seconds, Settings().seconds),
        *(("--image", image, None) for image in request.images),
    ]
    for flag, value, default in flags:
        if value != default:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    if request.raw:
        words.append("--raw")
    return shlex.join(words)


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """``["sparsity=0.3", "layers=3,6,9"]`` -> ``{"sparsity": 0.3, "layers": [3, 6, 9]}``.

    Values are JSON where they can be (numbers, true, false, null, lists), comma-separated lists of such, else text;
    the method's own types have the last word.

    Raises:
        BadParameter: no ``=``, an empty name, or a name given twice.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_") if "." not in name else name.strip()
        if not equals or not name:
            raise BadParameter(f"--set takes NAME=VALUE, as in --set sparsity=0.3; given: '{assignment}'")
        if name in values:
            raise BadParameter(f"--set {name} is given twice")
        values[name] = _value(text.strip())
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    if "," in text:
        return [_value(part.strip()) for part in text.split(",") if part.strip()]
    return text
