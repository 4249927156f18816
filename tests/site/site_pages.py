"""Reading rendered pages: a strict HTML parser and what the tests ask of its tree."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element

import html5lib


@dataclass
class Page:
    name: str
    tree: Element

    def all(self, tag: str) -> list[Element]:
        return list(self.tree.iter(tag))

    @property
    def ids(self) -> list[str]:
        return [node.attrib["id"] for node in self.tree.iter() if "id" in node.attrib]

    def links(self) -> Iterator[tuple[str, str]]:
        """``(attribute, address)`` of everything that leads somewhere."""
        for node in self.tree.iter():
            for attribute in ("href", "src", "action", "data-index", "xlink:href", "poster", "srcset"):
                if attribute in node.attrib:
                    yield attribute, node.attrib[attribute]

    def text(self) -> str:
        return " ".join("".join(self.tree.itertext()).split())


def parse(name: str, content: bytes) -> Page:
    """Parse a page with html5lib's strict parser, which raises at the first error."""
    text = content.decode()
    tree = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
    for node in tree.iter():
        if isinstance(node.tag, str):
            node.tag = node.tag.rpartition("}")[2]  # SVG elements keep their namespace
    return Page(name, tree)


def target(page: str, address: str) -> tuple[str, str] | None:
    """File and fragment that a link of ``page`` leads to; ``None`` when it leaves the site."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    path = (
        posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(parts.path)))
        if parts.path
        else page
    )
    return path, unquote(parts.fragment)


def css_colours(css: str) -> dict[str, dict[str, str]]:
    """The custom properties of the light and the dark scheme."""
    light = re.search(r"^:root \{(.*?)\}", css, re.DOTALL | re.MULTILINE)
    dark = re.search(r'^:root\[data-theme="dark"\] \{(.*?)\}', css, re.DOTALL | re.MULTILINE)
    assert light
    assert dark
    return {
        name: dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", found[1]))
        for name, found in (("light", light), ("dark", dark))
    }


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
