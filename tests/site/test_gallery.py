"""The recorded choices of visual-token methods, and the pictures that are drawn of them."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError
from site_pages import Page

from taxonomy.card import load_cards
from taxonomy.gallery import FOLDER, Drawing, Gallery, bits_of, load_gallery


def small(kept: str, merged: str = "0") -> Gallery:
    drawing = Drawing(parameters="", kept=kept, merged=merged)
    return Gallery(
        photo="", licence="", model="", question="", rows=2, columns=3, methods={"divprune": drawing}
    )


def cells(path: str) -> set[tuple[int, int]]:
    """Row and column of every patch that a path covers."""
    runs = re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path)
    assert "".join(f"M{x} {y}h{n}v1h-{m}z" for x, y, n, m in runs) == path
    assert all(n == m for *_, n, m in runs)
    return {(int(y), column) for x, y, n, _ in runs for column in range(int(x), int(x) + int(n))}


def test_flags_survive_the_record() -> None:
    flags = [True, False, False, False, True, True]
    assert bits_of(flags) == "23"
    assert small("23").flags("23") == flags
    assert small("23", "08").counts("divprune") == (3, 1, 6)


def test_paths_cover_the_patches_and_no_others() -> None:
    gallery = small("23", "08")
    assert cells(gallery.left_path("divprune")) == {(0, 1), (1, 0)}
    assert cells(gallery.merged_path("divprune")) == {(0, 2)}
    assert gallery.left_path("divprune") == "M1 0h1v1h-1zM0 1h1v1h-1z"


@pytest.mark.parametrize("kept", ["40", "xyz", ""])
def test_a_record_that_does_not_fit_is_noticed(kept: str) -> None:
    with pytest.raises(ValidationError):
        small(kept)


def test_the_record_is_of_methods_that_have_a_card() -> None:
    gallery = load_gallery()
    assert gallery.methods.keys() <= load_cards().keys()
    assert "visual-token-pruning" in load_cards()["divprune"].terms("family")
    for slug in gallery.methods:
        kept, merged, total = gallery.counts(slug)
        assert 0 < kept < total
        assert kept + merged <= total
        assert len(cells(gallery.left_path(slug))) == total - kept - merged


def test_each_method_has_its_picture_on_its_page_and_in_the_gallery(
    pages: dict[str, Page], files: dict[str, bytes]
) -> None:
    gallery = load_gallery()
    assert files["assets/gallery.jpg"] == (FOLDER / "photo.jpg").read_bytes()
    everyone = files["gallery.html"].decode()
    for slug in gallery.methods:
        drawn = gallery.left_path(slug) or gallery.merged_path(slug)
        assert drawn in everyone
        assert drawn in files[f"methods/{slug}.html"].decode()
        assert f'href="methods/{slug}.html"' in everyone
    assert 'href="gallery.html"' in files["index.html"].decode()
    assert "gallery.jpg" not in files["methods/flap.html"].decode()
    assert "gallery.html" in pages
