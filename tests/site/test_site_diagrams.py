"""The diagram shows every place of a card once, whatever combination of facets a card has."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from taxonomy import diagrams
from taxonomy.card import load_cards
from taxonomy.vocabulary import ARCHITECTURE, OPERATION, TARGET, WHEN, WHERE, Facet


def some(facet: Facet) -> st.SearchStrategy[dict[str, str]]:
    labels = {term.id: term.label for term in facet.terms}
    chosen = st.lists(st.sampled_from(sorted(labels)), unique=True, min_size=1, max_size=len(labels))
    return chosen.map(lambda ids: {name: labels[name] for name in ids})


def numbers(svg: str) -> list[int]:
    return sorted(int(number) for number in re.findall(r'class="d-number"[^>]*>(\d+)<', svg))


@settings(max_examples=100, deadline=None)
@given(
    some(WHERE), some(TARGET), some(OPERATION), some(WHEN), some(ARCHITECTURE), st.booleans(), st.booleans()
)
def test_every_place_is_numbered_once(where, target, operation, when, architecture, shortens, thins) -> None:
    svg = diagrams.pipeline(
        where, target, operation, when, architecture, name="A & <b>", shortens=shortens, thins_cache=thins
    )
    tree = ElementTree.fromstring(svg)  # well-formed
    assert numbers(svg) == list(range(1, len(where) + 1))
    height = float(tree.attrib["viewBox"].split()[3])
    for shape in tree.iter():
        if shape.tag.endswith("rect"):
            x, y, w, h = (float(shape.attrib[key]) for key in ("x", "y", "width", "height"))
            assert x >= 0
            assert y >= 0
            assert x + w <= diagrams.WIDTH
            assert y + h <= height
        if shape.tag.endswith("circle"):
            assert 9 <= float(shape.attrib["cx"]) <= diagrams.WIDTH - 9
    assert "A &amp; &lt;b&gt;" in svg
    assert len(diagrams.strip(where, target)) == len(diagrams.STRIP)


def test_the_places_of_real_cards() -> None:
    def drawn(slug: str) -> str:
        card = load_cards()[slug]
        labels = [
            {term: facet[term].label for term in card.terms(facet.id)}
            for facet in (WHERE, TARGET, OPERATION, WHEN)
        ]
        return diagrams.pipeline(
            *labels,
            card.terms("architecture"),
            name=card.name,
            shortens=card.properties.get("shrinks_sequence", True),
            thins_cache=card.properties.get("shrinks_cache", False),
        )

    divprune, flap, lookup = drawn("divprune"), drawn("flap"), drawn("prompt-lookup")
    assert "Vision encoder" in divprune
    assert "Vision encoder" not in flap
    # Twelve tokens before the projector's gate and fewer behind it; heads and channels leave in FLAP, no tokens.
    assert divprune.count("d-gone") > 7
    assert flap.count("d-gone") == 3 + 8
    assert "d-gone" not in lookup
    assert "d-loop d-on" in lookup
    assert "d-loop d-on" not in flap
    assert diagrams.strip({"before-llm"}, {"visual-tokens"}) == "001000"
    assert diagrams.strip({"attention"}, {"kv-entries"}) == "000010"
    assert diagrams.strip({"outside"}, {"nothing"}) == "000000"
