"""Draw README's picture from a real run: ``python docs/make_picture.py`` writes ``docs/zoo-run-flap.svg``."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

import zoo
from zoo.panels import draw


def main() -> None:
    """Run FLAP on the default model and export what the terminal shows."""
    record = zoo.run("flap")
    console = Console(
        record=True, width=100, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    draw(record, console)
    picture = console.export_svg(title="zoo run flap")
    # The export fetches a font from a public server; readers' own monospace font does as well.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    Path(__file__).with_name("zoo-run-flap.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
