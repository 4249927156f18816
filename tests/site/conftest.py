from __future__ import annotations

from pathlib import Path

import pytest
from catalog_fixtures import built
from site_pages import Page, parse

from taxonomy.site import render
from taxonomy.site.library import Library
from taxonomy.site.loading import load

__all__ = ["built"]


@pytest.fixture(scope="session")
def library(built: Path) -> Library:
    return load(built)


@pytest.fixture(scope="session")
def files(built: Path, library: Library) -> dict[str, bytes]:
    """The whole site of the real cards, as rendered."""
    return dict(render(library, built.read_bytes()))


@pytest.fixture(scope="session")
def pages(files: dict[str, bytes]) -> dict[str, Page]:
    """Every page, parsed by an HTML parser that accepts no error."""
    return {name: parse(name, content) for name, content in files.items() if name.endswith(".html")}
