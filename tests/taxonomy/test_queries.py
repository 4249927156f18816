"""Queries answer as a slow reading of the cards does."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from catalog_fixtures import real_sources
from hypothesis import given
from hypothesis import strategies as st

from taxonomy import queries
from taxonomy.card import Card
from taxonomy.catalog import FACET_WEIGHTS
from taxonomy.errors import QueryError
from taxonomy.vocabulary import FACETS, PROPERTIES


@pytest.fixture(scope="module")
def db(built: Path) -> Iterator[sqlite3.Connection]:
    connection = queries.open_catalog(built)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def cards() -> dict[str, Card]:
    return dict(real_sources().cards)


def acting(cards: dict[str, Card]) -> list[Card]:
    return [card for _, card in sorted(cards.items()) if card.kind in queries.ACTING]


def has(card: Card, facet: str, term: str) -> bool:
    """Whether the card has the term or one below it, by walking up from each of its terms."""
    for own in card.terms(facet):
        above: str | None = own
        while above is not None:
            if above == term:
                return True
            above = FACETS[facet][above].parent
    return False


def test_list_is_complete_and_carries_facets(db: sqlite3.Connection, cards: dict[str, Card]) -> None:
    rows = queries.list_methods(db, kinds=queries.KINDS)
    assert [row.slug for row in rows] == sorted(cards)
    assert all(row.facets == dict(cards[row.slug].facets) for row in rows)
    assert all(row.properties == cards[row.slug].properties for row in rows)
    assert [row.slug for row in queries.list_methods(db)] == [card.slug for card in acting(cards)]


def test_every_single_term_finds_its_cards(db: sqlite3.Connection, cards: dict[str, Card]) -> None:
    for facet in FACETS.values():
        for term in facet.terms:
            expected = [card.slug for card in acting(cards) if has(card, facet.id, term.id)]
            others = [card.slug for card in acting(cards) if not has(card, facet.id, term.id)]
            assert [row.slug for row in queries.find(db, include={facet.id: [[term.id]]})] == expected
            assert [row.slug for row in queries.find(db, exclude={facet.id: [term.id]})] == others


def test_conditions_combine(db: sqlite3.Connection, cards: dict[str, Card]) -> None:
    rows = queries.find(
        db,
        include={"where": [["before-llm", "inside-llm"]], "signal": [["similarity"], ["attention"]]},
        exclude={"training": ["fine-tune", "from-scratch"]},
        properties={"needs-attention-maps": False},
        years=(2024, 2025),
    )
    expected = [
        card.slug
        for card in acting(cards)
        if (has(card, "where", "before-llm") or has(card, "where", "inside-llm"))
        and has(card, "signal", "similarity")
        and has(card, "signal", "attention")
        and not {"fine-tune", "from-scratch"} & set(card.terms("training"))
        and card.properties.get("needs_attention_maps") is False
        and 2024 <= card.year <= 2025
    ]
    assert [row.slug for row in rows] == expected
    assert expected


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property_left_out_is_neither_yes_nor_no(
    db: sqlite3.Connection, cards: dict[str, Card], name: str
) -> None:
    for value in (True, False):
        expected = [card.slug for card in acting(cards) if card.properties.get(name) is value]
        assert [row.slug for row in queries.find(db, properties={name: value})] == expected


def test_names_labels_and_typos(db: sqlite3.Connection) -> None:
    assert [row.slug for row in queries.find(db, name="FLAP")] == ["flap"]
    by_label = queries.find(db, include={"where": [["Before the LLM"]]})
    assert by_label == queries.find(db, include={"where": [["before_llm"]]})
    for broken in (
        {"include": {"where": [["befor-llm"]]}},
        {"include": {"wher": [["before-llm"]]}},
        {"properties": {"query-awar": True}},
    ):
        with pytest.raises(QueryError, match="did you mean"):
            queries.find(db, **broken)
    with pytest.raises(QueryError, match="kind of card 'methods'"):
        queries.find(db, kinds=["methods"])
    assert queries.resolve(db, " FLAP ") == "flap"
    assert queries.resolve(db, "prompt_lookup") == queries.resolve(db, "Prompt Lookup") == "prompt-lookup"
    with pytest.raises(QueryError, match="did you mean flap"):
        queries.resolve(db, "flpa")
    with pytest.raises(QueryError, match="zoo list"):
        queries.resolve(db, "zzzzqqqq")
    assert ("flap", "FLAP") in queries.complete(db, "fl")
    assert queries.complete(db, "f%") == []


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("2024", (2024, 2024)),
        ("2024..", (2024, None)),
        ("..2022", (None, 2022)),
        (" 2023..2025 ", (2023, 2025)),
    ],
)
def test_years(text: str, years: tuple[int | None, int | None]) -> None:
    assert queries.parse_years(text) == years


@pytest.mark.parametrize("text", ["", "..", "24", "2024 2025", "2025..2024", "x", "2024-2025"])
def test_years_that_are_none(text: str) -> None:
    with pytest.raises(QueryError):
        queries.parse_years(text)


def test_search_ranks_the_name_first_and_needs_all_words(db: sqlite3.Connection) -> None:
    assert queries.search(db, "flap")[0].slug == "flap"
    assert queries.search(db, "fluctuat")[0].slug == "flap"  # the last word may be unfinished
    both = {row.slug for row in queries.search(db, "attention diversity", 1000)}
    assert both <= {row.slug for row in queries.search(db, "diversity", 1000)}
    assert queries.search(db, "zzzzqqqq") == []
    with pytest.raises(QueryError):
        queries.search(db, " -- * ")


def test_a_phrase_keeps_its_order(db: sqlite3.Connection) -> None:
    loose = {paper.title for paper in queries.papers(db, "merging token", limit=None)}
    exact = {paper.title for paper in queries.papers(db, '"token merging"', limit=None)}
    assert exact < loose
    assert queries.match_expression('"top-k" attent') == '"top k" AND "attent" *'


@given(st.text(max_size=40))
def test_whatever_is_typed_is_searched_for_and_never_syntax(built: Path, words: str) -> None:
    with closing(queries.open_catalog(built)) as db:
        if any(letter.isalnum() for letter in words):
            queries.search(db, words)
            queries.papers(db, words)
        else:
            with pytest.raises(QueryError, match="word"):
                queries.search(db, words)


@given(st.text(alphabet="ab \"*-^:(){}AND OR NOT NEAR+.,'\\%_", max_size=30))
def test_fts_syntax_is_plain_text(built: Path, words: str) -> None:
    expression = queries.match_expression(words)
    with closing(queries.open_catalog(built)) as db:
        if expression is not None:
            db.execute("SELECT count(*) FROM method_fts WHERE method_fts MATCH ?", (expression,)).fetchone()


def test_show_separates_what_was_read_from_what_was_recalled(
    db: sqlite3.Connection, cards: dict[str, Card]
) -> None:
    page = queries.show(db, "FLAP")
    card = cards["flap"]
    assert len(page.claims) == sum(claim.verified for claim in card.claims)
    assert len(page.unverified_claims) == sum(not claim.verified for claim in card.claims)
    assert page.notes["paper_vs_code"] == card.fidelity.paper_vs_code
    assert page.bibtex == card.bibtex
    assert page.related == card.related
    assert [check.subject for check in page.checks] == ["case-1", "deterministic"]
    assert {figure.arm for figure in page.measurements} == {"dense", "method", "ratio"}
    assert [paper.arxiv for paper in page.papers] == ["2312.11983"]


def test_every_card_can_be_shown(db: sqlite3.Connection, cards: dict[str, Card]) -> None:
    for slug, card in cards.items():
        page = queries.show(db, slug)
        assert (page.title, page.facets, page.arxiv) == (card.title, dict(card.facets), card.arxiv)


def test_similar_is_weighted_jaccard(db: sqlite3.Connection, cards: dict[str, Card]) -> None:
    def terms(card: Card) -> dict[tuple[str, str], float]:
        return {(f, t): FACET_WEIGHTS.get(f, 1.0) for f, ts in card.facets.items() for t in ts}

    own = terms(cards["flap"])
    scores = {}
    for slug, card in cards.items():
        other = terms(card)
        shared = sum(own[key] for key in own.keys() & other.keys())
        scores[slug] = shared / sum({**own, **other}.values())
    del scores["flap"]
    expected = sorted(scores, key=lambda slug: (-round(scores[slug], 9), slug))[:5]
    found = queries.similar(db, "flap")
    assert [row.slug for row in found] == expected
    assert [row.score for row in found] == [round(scores[slug], 4) for slug in expected]


def test_compare_marks_what_is_equal(db: sqlite3.Connection) -> None:
    comparison = queries.compare(db, ["flap", "cfsp", "FLAP"])
    assert [page.slug for page in comparison.methods] == ["flap", "cfsp"]
    rows = {row.label: row for row in comparison.rows}
    assert rows["Year"].values == ("2023", "2024")
    assert not rows["Year"].same
    assert rows["Family"].same
    with pytest.raises(QueryError, match="two different"):
        queries.compare(db, ["flap", "FLAP"])


def test_papers_filter_and_sort(db: sqlite3.Connection) -> None:
    everything = queries.papers(db, limit=None)
    assert len(everything) == 3718
    assert [paper.year or 0 for paper in everything] == sorted(
        (p.year or 0 for p in everything), reverse=True
    )
    early = queries.papers(db, topic="early-exit", years=(None, 2020), code=True, limit=None)
    assert early == [
        paper
        for paper in everything
        if "early-exit" in paper.topics and paper.year and paper.year <= 2020 and paper.code
    ]
    assert early
    carded = queries.papers(db, carded=True, limit=None)
    assert carded == [paper for paper in everything if paper.cards]
    assert len(queries.papers(db, carded=False, limit=None)) == len(everything) - len(carded)
    assert len(queries.papers(db, "cache", limit=3)) == 3
    with pytest.raises(QueryError, match="did you mean early-exit"):
        queries.papers(db, topic="earlyexit")
    assert queries.papers(db, source="horseee/Awesome-Efficient-LLM", limit=1)


def test_tree_counts_what_is_below(db: sqlite3.Connection, cards: dict[str, Card]) -> None:
    (tree,) = queries.tree(db, facet="target")
    assert tree.nodes[0].id == "tokens"

    def walk(nodes: tuple[queries.Node, ...]) -> Iterator[queries.Node]:
        for node in nodes:
            yield node
            yield from walk(node.children)

    for node in walk(tree.nodes):
        expected = sorted(slug for slug, card in cards.items() if has(card, "target", node.id))
        assert list(node.methods) == expected
        assert node.count == len(expected)
    assert {t.facet for t in queries.tree(db, "generation-refinement")} == {
        "generation", "refinement", "acceptance", "topology",
    }  # fmt: skip
    with pytest.raises(QueryError, match="known: core"):
        queries.tree(db, "nonsense")


def test_matrix_has_every_cell_once(db: sqlite3.Connection, cards: dict[str, Card]) -> None:
    crossed = queries.matrix(db, "where", "operation")
    assert len(crossed.cells) == len(crossed.row_terms) * len(crossed.column_terms)
    for cell in crossed.cells:
        both = [
            card.slug
            for card in acting(cards)
            if cell.row in card.terms("where") and cell.column in card.terms("operation")
        ]
        assert list(cell.methods) == both
        assert crossed.cell(cell.row, cell.column) == cell
    assert any(not cell.count for cell in crossed.cells)
    with pytest.raises(QueryError, match="two different facets"):
        queries.matrix(db, "where", "where")


def test_gaps(db: sqlite3.Connection) -> None:
    found = queries.gaps(db)
    assert all(cell.count and not cell.implemented for cell in found.unimplemented)
    assert all(not cell.count for cell in found.empty)
    assert [cell.expected for cell in found.empty] == sorted((c.expected for c in found.empty), reverse=True)
    rest = [row.papers - row.cards for row in found.topics]
    assert rest == sorted(rest, reverse=True)


def test_glossary(db: sqlite3.Connection, cards: dict[str, Card]) -> None:
    rows = queries.terms(db)
    assert len(rows) == sum(len(facet.terms) for facet in FACETS.values())
    flap = next(row for row in queries.terms(db, "family") if row.id == "weight-pruning")
    assert flap.count == sum("weight-pruning" in card.terms("family") for card in cards.values())


def test_paper_bibtex_escapes() -> None:
    paper = queries.PaperRow("50% of {A}_B & C", None, None, None, "arXiv", 2024, None, (), ())
    entry = queries.paper_bibtex(paper)
    assert r"{{50\% of \{A\}\_B \& C}}" in entry
    assert entry.startswith("@misc{50ofabc,")
    assert "note" not in entry


def test_reading_is_reading(built: Path) -> None:
    db = queries.open_catalog(built)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.execute("DELETE FROM method")


def test_every_public_name_is_found_where_it_lives() -> None:
    assert all(getattr(queries, name) is not None for name in queries.__all__)
    with pytest.raises(AttributeError, match="no attribute 'find_nothing'"):
        queries.find_nothing  # noqa: B018
