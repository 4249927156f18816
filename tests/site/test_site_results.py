"""Result pages: points, tables and links are those of the measurements; charts are sound SVG."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from catalog_fixtures import make_run, real_sources
from site_pages import Page, parse

from taxonomy import charts
from taxonomy.catalog import Measurement as Figure
from taxonomy.catalog import build
from taxonomy.errors import TaxonomyError
from taxonomy.site import build as build_site
from taxonomy.site import render
from taxonomy.site.loading import load


def measured(method: str, sparsity: float, gain: float, perplexity: float, **changes: object) -> object:
    figures = (
        Figure("prefill-time", "ratio", "times", gain, None, 1, "128 tokens"),
        Figure("prefill-time-bound", "ratio", "times", 2.0, None, 1, "128 tokens"),
        Figure("perplexity", "dense", "1", 10.0, None, 1, "news"),
        Figure("perplexity", "method", "1", perplexity, None, 1, "news"),
    )
    key = f"{method}{sparsity}{changes.get('model', '')}"
    values = {"key": key, "model": "model-one", "measurements": figures, **changes}
    return make_run(method=method, parameters={"sparsity": sparsity}, **values)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    runs = [
        measured("flap", 0.2, 1.2, 11.0),
        measured("flap", 0.3, 1.5, 12.0),
        measured("cfsp", 0.2, 1.3, 10.5),
        measured("wanda-sp", 0.3, 2.9, 13.0),  # above its bound
        measured("cfsp", 0.2, 1.1, 10.1, model="model-two"),
        measured("flap+prompt-lookup", 0.2, 1.4, 30.0),
    ]
    path = tmp_path_factory.mktemp("results") / "catalog.sqlite"
    build(replace(real_sources(), runs=runs), path)
    return dict(render(load(path), path.read_bytes()))


@pytest.fixture(scope="module")
def family(rendered: dict[str, bytes]) -> Page:
    return parse("results/weight-pruning.html", rendered["results/weight-pruning.html"])


def test_tables_hold_the_measurements(family: Page) -> None:
    tables = [
        [" ".join("".join(row.itertext()).split()) for row in table.iter("tr")][1:]
        for table in family.all("table")
    ]
    rows = tables[0]  # the largest group: model-one
    assert [row.split()[0] for row in rows if "(best)" in row] == ["Wanda-sp", "FLAP", "CFSP"]
    assert any(row.startswith("Wanda-sp") and "2.90× !" in row and "2.00×" in row for row in rows)
    assert any(row.startswith("flap+prompt-lookup") and "33.3%" in row for row in rows)
    assert len(rows) == 5


def test_groups_can_be_chosen_by_model_and_hardware(family: Page) -> None:
    options = {node.text for node in family.all("option")}
    assert {"model-one", "model-two", "2 x86-64 cores"} <= options
    fronts = [node for node in family.all("section") if node.attrib.get("class") == "front"]
    assert [node.attrib["data-model"] for node in fronts] == ["model-one", "model-two"]


def test_a_stack_is_with_both_families(rendered: dict[str, bytes]) -> None:
    assert b"flap+prompt-lookup" in rendered["results/weight-pruning.html"]
    assert b"flap+prompt-lookup" in rendered["results/decoding.html"]


def test_every_figure_leads_to_its_environment(rendered: dict[str, bytes], family: Page) -> None:
    page = parse("results/environments.html", rendered["results/environments.html"])
    anchors = {address.partition("#")[2] for _, address in family.links() if "environments.html#" in address}
    assert anchors
    assert anchors <= set(page.ids)
    assert "2.13.0" in page.text()


def test_links_of_the_new_pages_lead_somewhere(rendered: dict[str, bytes]) -> None:
    for name, content in rendered.items():
        if name.startswith(("results/", "findings/", "compare")):
            for _, address in parse(name, content).links():
                path, _, fragment = address.partition("#")
                found = (
                    (Path("/") / name).parent.joinpath(path).resolve().relative_to("/")
                    if path
                    else Path(name)
                )
                if "://" not in address:
                    assert found.as_posix() in rendered, f"{name}: {address}"
                    assert not fragment or fragment in parse("x", rendered[found.as_posix()]).ids


def test_reported_stands_beside_measured(family: Page) -> None:
    row = next(row for row in family.all("tr") if "minutes on one GPU" in "".join(row.itertext()))
    assert "3-5" in "".join(row.itertext())
    assert "1.50×" in "".join(row.itertext())
    assert "14.62" not in family.text(), "recalled, never read in a source"


def test_a_method_has_its_chart(rendered: dict[str, bytes]) -> None:
    text = rendered["methods/flap.html"].decode()
    svg = re.search(r'<svg class="chart".*?</svg>', text, re.DOTALL)
    assert svg
    assert svg[0].count('class="c-best"') == 2
    assert '<svg class="chart"' not in rendered["methods/tome.html"].decode()


def test_the_compare_page_knows_every_card_and_its_data(rendered: dict[str, bytes]) -> None:
    page = parse("compare.html", rendered["compare.html"])
    known = {node.attrib["value"] for node in page.all("option")}
    assert {f"data/methods/{slug}.js" for slug in known} == {
        n for n in rendered if n.startswith("data/methods/")
    }
    script = rendered["data/methods/flap.js"].decode()
    data = json.loads(re.fullmatch(r"zooMethod\((.*)\);\n", script)[1])
    assert [point["times"] for point in data["points"]] == [1.2, 1.5]
    assert data["claims"] == [
        ["LLaMA family", "pruning", "minutes on one GPU", None, None, "3-5", "repository read-me"]
    ]


def test_findings_say_what_was_found(rendered: dict[str, bytes]) -> None:
    page = parse("f", rendered["findings/cfsp-over-flap-and-wanda-sp.html"])
    assert "Not measured yet" in page.text()
    assert "Only 1 cell to answer with" in page.text()
    index = parse("r", rendered["results/index.html"]).text()
    assert "Random token pruning is a strong baseline" in index


def test_charts_escape_and_stay_inside() -> None:
    hostile = '"><script>alert(1)</script>'
    dots = [
        charts.Dot(n / 3, 1 / n, hostile, hostile, "best" if n % 2 else "other", hostile) for n in range(1, 9)
    ]
    drawing = charts.scatter(dots, title=hostile, across=hostile, up=hostile, base=hostile)
    assert "<script" not in drawing
    tree = ElementTree.fromstring(drawing)
    circles = list(tree.iter("circle"))
    assert len(circles) == 9
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < charts.WIDTH
        assert 0 < float(circle.attrib["cy"]) < charts.HEIGHT
    assert drawing == charts.scatter(dots, title=hostile, across=hostile, up=hostile, base=hostile)


def test_right_is_more_and_up_is_more() -> None:
    dots = [charts.Dot(1.5, 0.5, "a", "a"), charts.Dot(2.0, 0.9, "b", "b")]
    tree = ElementTree.fromstring(charts.scatter(dots, title="", across="", up="", base=""))
    (ax, ay), (bx, by) = [
        (float(c.attrib["cx"]), float(c.attrib["cy"]))
        for c in tree.iter("circle")
        if c.attrib["class"] == "c-plain"
    ]
    assert bx > ax
    assert by < ay


def test_axes_end_at_round_numbers_and_take_their_colours_from_the_style_sheet() -> None:
    dots = [charts.Dot(1.83, 0.004, "a", "a"), charts.Dot(0.79, 1.04, "b", "b")]
    drawing = charts.scatter(dots, title="", across="times $faster$", up="kept", base="")
    texts = list(ElementTree.fromstring(drawing).iter("text"))
    numbers = [node.text for node in texts if node.attrib["class"] == "c-tick"]
    assert [number for number in numbers if "×" in number] == [f"{n / 5:g}×" for n in range(3, 11)]
    assert [number for number in numbers if "×" not in number] == [
        "0",
        "0.2",
        "0.4",
        "0.6",
        "0.8",
        "1",
        "1.2",
    ]
    assert [node.text for node in texts if node.attrib["class"] == "c-name"] == ["times $faster$", "kept"]
    assert "style=" not in drawing
    assert "id=" not in drawing


def test_charts_do_not_follow_the_readers_settings() -> None:
    import matplotlib

    def drawn() -> str:
        charts._axis.cache_clear()
        return charts.scatter([charts.Dot(2.0, 0.5, "a", "a")], title="", across="x", up="y", base="")

    before = drawn()
    with matplotlib.rc_context({"axes.xmargin": 0.4, "font.size": 31, "svg.fonttype": "path"}):
        assert drawn() == before


def test_without_matplotlib_the_site_says_what_to_install(
    rendered: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charts._axis.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(rendered["data/catalog.sqlite"])
    with pytest.raises(TaxonomyError, match=r"pip install 'efficiency-zoo\[site\]'"):
        build_site(path, tmp_path / "site")
    assert not (tmp_path / "site").exists()
