"""Result pages: points, tables and links are those of the measurements; charts are sound SVG."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from catalog_fixtures import make_run, proof_of, real_sources, timed_on
from site_pages import Page, parse

from taxonomy import charts
from taxonomy.catalog import Measurement as Figure
from taxonomy.catalog import Run, build
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


def drafters(method: str, *, model: str = "small", same: float = 1.0, **gains: float) -> list[Run]:
    return [
        timed_on(task, gain, same=same, method=method, model=model, key=f"{method}{model}{task}")
        for task, gain in gains.items()
    ]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    runs = [
        measured("flap", 0.2, 1.2, 11.0),
        measured("flap", 0.3, 1.5, 12.0),
        measured("cfsp", 0.2, 1.3, 10.5),
        measured("wanda-sp", 0.3, 2.9, 13.0),  # above its bound
        measured("cfsp", 0.2, 1.1, 10.1, model="model-two"),
        measured("flap+prompt-lookup", 0.2, 1.4, 30.0),
        *drafters("goose", chat=1.02, rag=1.4, qa=0.7),
        *drafters("prompt-lookup", chat=1.0, rag=1.6, qa=1.3),
        proof_of("goose", 50, 50),
        proof_of("prompt-lookup", 20, 20),
        *drafters("medusa", model="lossy", same=0.5, chat=2.0, rag=2.0, qa=2.0),
        *drafters("eagle", model="lossy", chat=1.5, rag=1.01, qa=1.2),
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


def test_lossless_methods_are_told_task_by_task(rendered: dict[str, bytes]) -> None:
    page = parse("results/decoding.html", rendered["results/decoding.html"])
    (front,) = (node for node in page.all("section") if node.attrib.get("data-model") == "small")
    head, *rows = [[" ".join(" ".join(cell.itertext()).split()) for cell in row] for row in front.iter("tr")]
    assert head[1:5] == ["All tasks decoding, times faster", "chat ±5.0%", "qa ±5.0%", "rag ±5.0%"]
    assert [row[0] for row in rows] == ["Prompt Lookup Decoding (PLD) defaults", "Goose defaults"]
    assert [row[1].split("×")[0] for row in rows] == ["1.25", "0.96"]
    assert rows[0][2:5] == ["1.00× 1.00 a pass", "1.30× 1.60 a pass", "1.60× 2.20 a pass"]
    assert [row[6].split(" run")[0] for row in rows] == ["20 of 20", "50 of 50"]
    leading = [node.text for node in front.iter("td") if node.attrib.get("class") == "lead"]
    assert leading == ["1.30×", "1.60×"], "on no other task is there a gain beyond the noise"
    assert len(list(front.iter("svg"))) == 1, "no plane whose points would all lie at one height"


def test_methods_that_lose_something_are_marked(rendered: dict[str, bytes]) -> None:
    page = parse("results/decoding.html", rendered["results/decoding.html"])
    (front,) = (node for node in page.all("section") if node.attrib.get("data-model") == "lossy")
    medusa, _ = front.find(".//tbody")
    assert "50.0% not all kept" in " ".join(" ".join(medusa.itertext()).split())
    assert [td.text for td in front.iter("td") if td.attrib.get("class") == "lead"] == ["1.50×", "1.20×"]
    names = [node.text for node in front.iter("text") if node.attrib["class"] == "c-label"]
    assert "Medusa (not all kept)" in names
    assert len(list(front.iter("svg"))) == 2, "by task, and in the plane"


def test_a_drafter_has_its_chart_by_task(rendered: dict[str, bytes]) -> None:
    text = rendered["methods/goose.html"].decode()
    svg = ElementTree.fromstring(re.search(r'<svg class="chart".*?</svg>', text, re.DOTALL)[0])
    kinds = [node.attrib["class"] for node in svg.iter("circle")]
    assert (kinds.count("c-best"), kinds.count("c-other")) == (3, 3)
    assert [node.text for node in svg.iter("text") if node.attrib["class"] == "c-lane"] == [
        "chat",
        "qa",
        "rag",
    ]


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
    known = {node.attrib["value"]: node.attrib["data-file"] for node in page.all("option")}
    found = {
        (data["slug"], Path(name).stem): data
        for name, script in rendered.items()
        if name.startswith("data/methods/")
        for data in map(json.loads, re.findall(r"^zooMethod\((.*)\);$", script.decode(), re.MULTILINE))
    }
    assert found.keys() == set(known.items())
    assert 1 < len(set(known.values())) < len(known) / 20, "some dozens in each file"
    data, goose = (found[slug, known[slug]] for slug in ("flap", "goose"))
    assert [point["times"] for point in data["points"]] == [1.2, 1.5]
    assert [point["tasks"] for point in data["points"]] == [{}, {}]
    assert [point["tasks"] for point in goose["points"]] == [{"chat": 1.02, "qa": 0.7, "rag": 1.4}]
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


def test_lanes_keep_their_points_apart_and_in_place() -> None:
    dots = [charts.Dot(gain, place, "", "") for place in (0, 1, 2) for gain in (0.9, 1.0, 1.001, 1.002, 1.5)]
    names = ("<b>", "two", "a name that is far too long to fit beside the lanes of a chart")
    drawing = charts.lanes(dots, names, noise=0.1, title="", across="gain", base="")
    tree = ElementTree.fromstring(drawing)
    circles = [tuple(float(c.attrib[name]) for name in ("cx", "cy")) for c in tree.iter("circle")]
    bounds = [
        float(line.attrib["d"].partition(" ")[2].partition("H")[0])
        for line in tree.iter("path")
        if "H" in line.attrib["d"]
    ]
    assert len(circles) == 15
    assert all(0 < x < charts.WIDTH for x, _ in circles)
    assert [sum(y < bounds[0] for _, y in circles), sum(y > bounds[1] for _, y in circles)] == [5, 5]
    for n, (x, y) in enumerate(circles):
        assert all(abs(x - a) + abs(y - b) > 6 for a, b in circles[:n])
    (band,) = tree.iter("rect")
    left = float(band.attrib["x"])
    one = left + float(band.attrib["width"]) / 2
    assert one == pytest.approx(circles[1][0], abs=0.1), "the band is about the unmodified model"
    assert left == pytest.approx(circles[0][0], abs=0.1)


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
