"""The bibliography is read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from taxonomy.bibliography import load_bibliography, parse_paper
from taxonomy.errors import CatalogError


def test_whole_bibliography_is_sound() -> None:
    papers = load_bibliography()
    assert len(papers) == 3718
    assert all(paper.topics and paper.sources for paper in papers)
    assert sum(bool(paper.cards) for paper in papers) == 120


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"title": " "}', "'title'"),
        ('{"title": "A", "colour": 1}', "unknown field 'colour'"),
        ('{"title": "A", "year": "2024"}', "'year'"),
        ('{"title": "A", "year": true}', "'year'"),
        ('{"title": "A", "doi": 3}', "'doi'"),
        ('{"title": "A", "topics": "x"}', "'topics'"),
        ('{"title": "A", "topics": ["x", "x"]}', "repeats"),
    ],
)
def test_wrong_lines_are_named(line: str, said: str) -> None:
    with pytest.raises(CatalogError, match=said) as error:
        parse_paper(line, "papers.jsonl line 4")
    assert str(error.value).startswith("papers.jsonl line 4: ")


def test_an_arxiv_id_occurs_once(tmp_path: Path) -> None:
    path = tmp_path / "papers.jsonl"
    path.write_text('{"title": "A", "arxiv": "2401.00001"}\n\n{"title": "B", "arxiv": "2401.00001"}\n')
    with pytest.raises(CatalogError, match=r"line 3: arXiv 2401\.00001 is already on line 1"):
        load_bibliography(path)
    with pytest.raises(CatalogError, match="cannot be read"):
        load_bibliography(tmp_path / "none.jsonl")
