"""Pages are valid, linked, accessible, and say what the cards say."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from catalog_fixtures import real_sources
from site_pages import Page, contrast, css_colours, target

from taxonomy import paths, queries
from taxonomy.card import Card, load_cards
from taxonomy.site import EXAMPLE, FILTERS
from taxonomy.site.library import Library
from taxonomy.vocabulary import FACETS


@pytest.fixture(scope="session")
def cards() -> dict[str, Card]:
    return load_cards()


def kind_of(name: str) -> str:
    return re.sub(r"[^/]+\.html$", "*", name) if "/" in name else name


def test_every_card_view_and_year_has_a_page(pages: dict[str, Page], cards: dict[str, Card]) -> None:
    assert {f"methods/{slug}.html" for slug in cards} == {
        name for name in pages if name.startswith("methods/")
    }
    for facet in FACETS.values():
        assert facet.view == "core" or f"taxonomy/{facet.view}.html" in pages
    assert {"index.html", "glossary.html", "bibliography.html", "data.html", "about.html"} < pages.keys()


def test_one_heading_landmarks_and_unique_ids(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        twice = [key for key, count in Counter(page.ids).items() if count > 1]
        assert not twice, f"{name}: {twice}"
        for tag in ("h1", "main", "title"):
            outside_svg = [node for node in page.all(tag) if "id" not in node.attrib or tag != "title"]
            assert len(outside_svg) == 1, f"{name}: {len(outside_svg)} <{tag}>"
        body = page.all("body")[0]
        assert [child.tag for child in body] == ["a", "header", "main", "footer"], name
        assert body[0].attrib["href"] == "#main", name
        assert page.tree.attrib.get("lang") == "en" or page.all("html")[0].attrib["lang"] == "en"
        levels = [
            int(n.tag[1])
            for n in page.tree.iter()
            if isinstance(n.tag, str) and re.fullmatch("h[1-6]", n.tag)
        ]
        for above, below in pairwise(levels):
            assert below <= above + 1, f"{name}: h{above} is followed by h{below}"


def test_titles_differ(pages: dict[str, Page]) -> None:
    titles = Counter(page.all("head")[0].find("title").text for page in pages.values())
    assert [title for title, count in titles.items() if count > 1] == []


def test_controls_have_names_and_tables_have_headers(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        labelled = {node.attrib["for"] for node in page.all("label") if "for" in node.attrib}
        inside = {id(node) for label in page.all("label") for node in label.iter()}
        for control in (*page.all("input"), *page.all("select")):
            assert control.attrib.get("id") in labelled or id(control) in inside, name
        for button in page.all("button"):
            assert button.attrib.get("type") == "button", name
            assert "".join(button.itertext()).strip() or button.attrib.get("id") == "more", name
        for header in page.all("th"):
            assert header.attrib.get("scope") in ("col", "row"), name
        for node in page.tree.iter():
            for attribute in ("aria-labelledby", "aria-describedby"):
                for reference in node.attrib.get(attribute, "").split():
                    assert reference in page.ids, f"{name}: {attribute} names {reference}"
        for button in page.all("button"):
            if "data-copy" in button.attrib:
                assert button.attrib["data-copy"] in page.ids, name


def test_every_internal_link_and_anchor_leads_somewhere(
    files: dict[str, bytes], pages: dict[str, Page]
) -> None:
    ids = {name: set(page.ids) for name, page in pages.items()}
    options = {
        (n.attrib["name"], n.attrib["value"]) for n in pages["index.html"].all("input") if "value" in n.attrib
    }
    for name, page in pages.items():
        for _, address in page.links():
            found = target(name, address)
            if found is None:
                continue
            path, fragment = found
            assert path in files, f"{name}: {address} leads nowhere"
            if "=" in fragment:  # a selection of the table of methods
                assert path == "index.html", f"{name}: {address}"
                for key, value in parse_qsl(fragment, strict_parsing=True):
                    assert {(key, part) for part in value.split(",")} <= options, f"{name}: {address}"
            elif fragment:
                assert fragment in ids[path], f"{name}: {address} names no element"


def test_nothing_is_loaded_from_elsewhere(files: dict[str, bytes], pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        for node in page.tree.iter():
            if node.tag in ("script", "link", "img", "iframe", "form", "object", "source", "use", "image"):
                for attribute in ("src", "href", "action"):
                    assert target(name, node.attrib.get(attribute, "")) is not None, name
            assert "style" not in node.attrib, f"{name}: inline style"
            assert node.tag != "script" or not (node.text or "").strip(), f"{name}: inline script"
    for name, content in files.items():
        if name.startswith("assets/") and not name.endswith(".jpg"):
            addresses = set(re.findall(r"https?://[^\s\"')]+", content.decode()))
            assert addresses <= {"http://www.w3.org/2000/svg"}, name
            assert b"@import" not in content
            assert b"url(" not in content


def test_pages_leave_the_site_only_by_web_addresses(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        for _, address in page.links():
            scheme = re.match(r"[a-zA-Z][\w+.-]*:", address)
            assert scheme is None or scheme[0] in ("https:", "http:"), f"{name}: {address}"


def test_no_page_shows_a_figure_that_was_only_recalled(
    pages: dict[str, Page], cards: dict[str, Card]
) -> None:
    checked = 0
    for slug, card in cards.items():
        table = " ".join(
            " ".join("".join(row.itertext()).split()) for row in pages[f"methods/{slug}.html"].all("tr")
        )
        shown = {text(claim.value) for claim in card.claims if claim.verified}
        for claim in card.claims:
            if claim.verified:
                assert " ".join(text(claim.value).split()) in table, f"{slug}: {claim.value}"
            elif text(claim.value) not in shown and len(text(claim.value)) >= 4:
                assert text(claim.value) not in table, f"{slug}: {claim.value} was never read in a source"
                checked += 1
    assert checked > 5


def text(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, int | float) else value


def test_cards_show_their_terms_notes_and_references(pages: dict[str, Page], cards: dict[str, Card]) -> None:
    for slug, card in cards.items():
        page = pages[f"methods/{slug}.html"]
        words = page.text()
        hrefs = {address for _, address in page.links()}
        assert " ".join(card.summary.split()) in words
        for facet, terms in card.facets.items():
            assert {f"../glossary.html#{facet}--{term}" for term in terms} <= hrefs, slug
        for note in (
            *card.notes,
            *card.fidelity.paper_vs_code,
            *card.fidelity.deviations,
            *card.fidelity.reconstructed,
        ):
            assert " ".join(note.split()) in words, f"{slug}: {note}"
        assert {f"https://arxiv.org/abs/{identifier}" for identifier in card.arxiv} <= hrefs
        assert card.code is None or card.code in hrefs
        assert {f"{other}.html" for other in card.related} <= hrefs
        code = next(node for node in page.all("code") if node.attrib.get("id") == "bibtex")
        assert "".join(code.itertext()) == card.bibtex


def test_commands_are_offered_for_what_runs_only(pages: dict[str, Page], library: Library) -> None:
    running = {entry.slug for entry in library.entries if entry.implemented}
    assert running
    for entry in library.entries:
        assert (f"zoo run {entry.slug}" in pages[f"methods/{entry.slug}.html"].text()) == (
            entry.slug in running
        )


def test_ticks_are_given_for_what_was_verified_only(pages: dict[str, Page], library: Library) -> None:
    for entry in library.entries:
        words = pages[f"methods/{entry.slug}.html"].text()
        passed = [check for check in entry.contracts.values() if not check.failed]
        assert words.count("✓ verified") == len(passed), entry.slug
        declared = [name for name in entry.properties if name not in entry.contracts]
        assert words.count("○ declared") == len(declared), entry.slug
        assert not entry.contracts or entry.implemented
    assert "✓ verified on tiny-llama" in pages["methods/flap.html"].text()


def test_measurements_stand_beside_what_was_reported(pages: dict[str, Page]) -> None:
    words = pages["methods/flap.html"].text()
    assert "smollm2-135m" in words
    assert "2 x86-64 cores, cpu, float32; 2026-05-04" in words
    row = next(r for r in pages["methods/flap.html"].all("tr") if "prefill" in "".join(r.itertext()))
    assert ["".join(cell.itertext()) for cell in row if cell.tag == "td"] == ["0.4", "0.2", "2"]


def test_similar_methods_are_those_of_the_command_line(built: Path, library: Library) -> None:
    with closing(queries.open_catalog(built)) as db:
        for entry in library.entries:
            found = [(likeness.entry.slug, round(likeness.score, 4)) for likeness in entry.similar]
            assert found == [(other.slug, other.score) for other in queries.similar(db, entry.slug)]


def test_matrices_are_those_of_the_command_line(built: Path, pages: dict[str, Page]) -> None:
    with closing(queries.open_catalog(built)) as db:
        matrix = queries.matrix(db, "signal", "where")
    rows = pages["taxonomy/signal-by-where.html"].all("tr")[1:]
    shown = [["".join(cell.itertext()).strip() for cell in row if cell.tag == "td"] for row in rows]
    count = {(cell.row, cell.column): cell.count for cell in matrix.cells}
    assert sum(value == "none" for row in shown for value in row) > 100
    assert shown == [[str(count[row, c] or "none") for c in matrix.column_terms] for row in matrix.row_terms]


def test_tree_counts_take_in_what_is_below(pages: dict[str, Page], cards: dict[str, Card]) -> None:
    page = pages["taxonomy/dnn-pruning-survey.html"]
    below = {"score", "magnitude", "norm", "saliency", "loss-change"}
    expected = sum(bool(below & set(card.terms("criterion"))) for card in cards.values())
    node = next(n for n in page.tree.iter() if n.attrib.get("id") == "criterion--score")
    assert "".join(node[1].itertext()) == str(expected)


def test_the_glossary_defines_every_term_and_names_its_methods(
    pages: dict[str, Page], cards: dict[str, Card]
) -> None:
    page = pages["glossary.html"]
    places = {node.attrib["id"]: node for node in page.tree.iter() if "id" in node.attrib}
    for facet in FACETS.values():
        for term in facet.terms:
            place = places[f"{facet.id}--{term.id}"]
            assert term.definition in " ".join("".join(place.itertext()).split())
            named = {node.attrib["href"] for node in place.iter("a")}
            users = {
                f"methods/{slug}.html" for slug, card in cards.items() if term.id in card.terms(facet.id)
            }
            assert users <= named, term.id


def test_the_table_can_be_filtered_by_every_promised_facet(
    pages: dict[str, Page], cards: dict[str, Card]
) -> None:
    page = pages["index.html"]
    rows = {
        row[0][0].attrib["href"]: set(row.attrib["data-t"].split())
        for row in page.all("tr")
        if "data-t" in row.attrib
    }
    assert len(rows) == len(cards)
    for slug, card in cards.items():
        tokens = rows[f"methods/{slug}.html"]
        assert {f"{facet}:{term}" for facet in FILTERS for term in card.terms(facet)} <= tokens
        assert {f"{name}:{'yes' if value else 'no'}" for name, value in card.properties.items()} <= tokens
    boxes = {
        f"{n.attrib['name']}:{n.attrib['value']}" for n in page.all("input") if n.attrib["type"] == "checkbox"
    }
    for token in set().union(*rows.values()):
        assert token in boxes or token == "runs:no", token


def test_every_paper_is_on_one_year_page_and_in_the_search(
    files: dict[str, bytes], pages: dict[str, Page]
) -> None:
    papers = real_sources().papers
    listed = Counter(
        "".join(item.itertext()).split("\n")[0].strip()
        for name, page in pages.items()
        if name.startswith("bibliography/")
        for item in page.all("li")
        if item.find("span") is not None and item.find("span").attrib.get("class") == "sub"
    )
    assert sum(listed.values()) == len(papers)
    script = files["data/bibliography.js"].decode()
    data = json.loads(re.fullmatch(r"window\.zooPapers=(.*);\n", script, re.DOTALL)[1])
    assert sorted(row[0] for row in data["rows"]) == sorted(paper.title for paper in papers)
    years = [row[1] for row in data["rows"]]
    assert years == sorted(years, reverse=True)
    assert len(script) < 1_000_000


def test_the_licence_of_every_source_list_is_named(pages: dict[str, Page]) -> None:
    shown = {
        tuple("".join(cell.itertext()) for cell in row if cell.tag in ("th", "td"))
        for row in pages["bibliography.html"].all("tr")
    }
    rows = [
        json.loads(line) for line in (paths.PACKAGE / "bibliography_sources.jsonl").read_text().splitlines()
    ]
    used = Counter(name for paper in real_sources().papers for name in paper.sources)
    assert {row["name"] for row in rows} == used.keys() - {"efficiency-zoo"}
    for row in rows:
        assert (
            row["name"],
            str(used[row["name"]]),
            row["licence"],
            f"{row['commit']}, {row['date']}",
        ) in shown


def test_the_source_lists_are_those_of_the_bibliography_notes() -> None:
    notes = (paths.PACKAGE / "bibliography.md").read_text(encoding="utf-8")
    for line in (paths.PACKAGE / "bibliography_sources.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        link = f"[{row['name']}](https://github.com/{row['name']})"
        assert f"| {link} | {row['commit']} | {row['date']} | {row['licence']} |" in notes


def test_downloads_hold_what_they_promise(
    files: dict[str, bytes], built: Path, cards: dict[str, Card]
) -> None:
    assert files["data/catalog.sqlite"] == built.read_bytes()
    methods = json.loads(files["data/methods.json"])
    assert {entry["slug"] for entry in methods} == set(cards)
    for entry in methods:
        assert len(entry["reported"]) == sum(claim.verified for claim in cards[entry["slug"]].claims)
        assert entry["facets"] == {name: list(terms) for name, terms in cards[entry["slug"]].facets.items()}
    lines = files["data/methods.csv"].decode().split("\r\n")
    assert len(lines) == len(cards) + 2
    assert files["data/cards.bib"].decode().count("@misc{") == len(cards)
    assert len(json.loads(files["data/papers.json"])) == len(real_sources().papers)
    with closing(queries.open_catalog(built)) as db:
        found = db.execute(EXAMPLE).fetchall()
    free = [
        c
        for c in cards.values()
        if c.terms("training") == ("none",) and c.properties.get("needs_attention_maps") is False
    ]
    assert len(found) == len(free) > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_contrast_is_at_least_aa(files: dict[str, bytes], scheme: str) -> None:
    colours = css_colours(files["assets/site.css"].decode())[scheme]
    pairs = [
        (ink, ground)
        for ink in ("ink", "soft", "accent", "ochre", "bad")
        for ground in ("paper", "sheet", "faint")
    ]
    pairs += [("ink", "wash"), ("ink", "ochre-wash"), ("paper", "ochre"), ("s5-ink", "s5")]
    pairs += [("s-ink", f"s{step}") for step in range(1, 5)]
    pairs += [("accent", "ochre-wash"), ("soft", "ochre-wash")]
    for ink, ground in pairs:
        assert contrast(colours[ink], colours[ground]) >= 4.5, f"{ink} on {ground}"
    assert contrast(colours["focus"], colours["paper"]) >= 3
    assert contrast(colours["ochre-line"], colours["line"]) >= 1.5


def test_the_two_dark_palettes_are_the_same(files: dict[str, bytes]) -> None:
    """The dark scheme is written twice: for those whose system asks for it, and for those who press the button."""
    css = files["assets/site.css"].decode()
    blocks = re.findall(r"color-scheme: dark;(.*?)\}", css, re.DOTALL)
    assert len(blocks) == 2
    assert blocks[0].split() == blocks[1].split()
