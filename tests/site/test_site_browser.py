"""The scripts and the layout in a real browser. Skipped where Chromium is not installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from taxonomy.site import build

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

PAGES = [
    "index.html", "methods/flap.html", "methods/prompt-lookup.html", "methods/tokenizer-information.html",
    "taxonomy/index.html", "taxonomy/dnn-pruning-survey.html", "taxonomy/signal-by-where.html", "glossary.html",
    "bibliography.html", "bibliography/2025.html", "data.html", "about.html", "results/index.html",
    "results/environments.html", "findings/ratio-dominates.html", "compare.html",
]  # fmt: skip

HARNESS = """<!DOCTYPE html><title>harness</title><body><script>
const results = {};
function open(address, width) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    frame.onload = () => setTimeout(() => done(frame), 60);
    frame.src = address;
    document.body.append(frame);
  });
}
const shown = page => [...page.querySelectorAll("#methods tbody tr")].filter(row => !row.hidden)
  .map(row => row.querySelector("th a").textContent);
async function all() {
  results.wide = {};
  for (const name of PAGES) for (const width of [390, 1280]) {
    const frame = await open("site/" + name, width);
    results.wide[name + " " + width] = frame.contentDocument.documentElement.scrollWidth - width;
    frame.remove();
  }
  const frame = await open("site/index.html#where=before-llm,attention&training=none&query_aware=no&sort=-year", 1280);
  const page = frame.contentDocument, view = frame.contentWindow;
  results.filtered = shown(page);
  results.years = [...page.querySelectorAll("#methods tbody tr")].filter(row => !row.hidden)
    .map(row => +row.cells[5].textContent);
  results.sort = page.querySelector("[aria-sort]").textContent + " " + page.querySelector("[aria-sort]").ariaSort;
  results.status = page.getElementById("status").textContent;
  results.chips = [...page.querySelectorAll(".chip")].map(chip => chip.textContent);
  page.querySelector(".chip").click();
  results.afterChip = view.location.hash;
  page.querySelector("#methods thead button").click();
  results.afterSort = view.location.hash;
  page.getElementById("reset").click();
  const box = page.getElementById("q");
  box.value = "max-min";
  box.dispatchEvent(new view.Event("input", {bubbles: true}));
  results.searched = shown(page);
  results.afterSearch = view.location.hash;
  page.querySelector("[data-theme-toggle]").click();
  results.theme = page.documentElement.dataset.theme;
  results.ground = view.getComputedStyle(page.body).backgroundColor;
  frame.remove();
  const list = await open("site/bibliography.html#q=divprune", 1280);
  await new Promise(done => setTimeout(done, 500));
  results.papers = [...list.contentDocument.querySelectorAll("#papers li > a")].map(a => a.textContent);
  results.found = list.contentDocument.getElementById("status").textContent;
  const versus = await open("site/compare.html#flap,no-such-card,cfsp", 1280);
  await new Promise(done => setTimeout(done, 500));
  const rows = [...versus.contentDocument.querySelectorAll("#versus tr")];
  results.compared = rows.map(row => [...row.cells].map(cell => cell.textContent));
  document.title = "done";
}
addEventListener("error", event => { results.error = event.message; });
all().catch(error => { results.error = String(error); }).then(() => {
  const place = document.createElement("pre");
  place.id = "results";
  place.textContent = JSON.stringify(results);
  document.body.append(place);
});
</script>"""


@pytest.fixture(scope="module")
def results(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Everything the pages did, from one start of the browser; pages are opened from the folder, not from a server."""
    assert CHROMIUM
    folder = tmp_path_factory.mktemp("browser")
    build(built, folder / "site")
    (folder / "harness.html").write_text(HARNESS.replace("of PAGES", f"of {json.dumps(PAGES)}"))
    said = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            "--allow-file-access-from-files", "--virtual-time-budget=60000", f"--user-data-dir={folder / 'profile'}",
            "--dump-dom", (folder / "harness.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    found = re.search(r'<pre id="results">(.*?)</pre>', said, re.DOTALL)
    assert found, said[-2000:]
    values: dict[str, object] = json.loads(html.unescape(found[1]))
    assert "error" not in values, values["error"]
    return values


def test_no_page_is_wider_than_the_screen(results: dict[str, dict[str, int]]) -> None:
    assert len(results["wide"]) == 2 * len(PAGES)
    assert {place: extra for place, extra in results["wide"].items() if extra > 0} == {}


def test_a_linked_selection_filters_and_sorts(results: dict[str, list[object]], library) -> None:
    expected = {
        entry.name
        for entry in library.entries
        if {"before-llm", "attention"} & entry.ids("where")
        and "none" in entry.ids("training")
        and entry.properties.get("query_aware") is False
    }
    assert expected
    assert set(results["filtered"]) == expected
    assert results["years"] == sorted(results["years"], reverse=True)
    assert str(results["sort"]).split() == ["Year", "descending"]
    assert results["status"] == f"{len(expected)} of {len(library.entries)} entries"
    assert results["chips"] == [
        "Where: Before the LLM",
        "Where: In attention",
        "Training: None",
        "Query-aware: no",
    ]


def test_the_address_follows_what_is_chosen(results: dict[str, object]) -> None:
    assert results["afterChip"] == "#where=attention&training=none&query_aware=no&sort=-year"
    assert results["afterSort"] == "#where=attention&training=none&query_aware=no&sort=name"
    assert results["afterSearch"] == "#q=max-min&sort=name"
    assert "DivPrune" in results["searched"]
    assert "FLAP" not in results["searched"]


def test_the_colour_scheme_can_be_switched(results: dict[str, object]) -> None:
    assert results["theme"] == "dark"
    assert results["ground"] == "rgb(20, 24, 23)"


def test_the_bibliography_is_searched_in_the_page(results: dict[str, object]) -> None:
    assert any("DivPrune" in title for title in results["papers"])
    assert "newest first" in str(results["found"])


def test_two_methods_stand_side_by_side(results: dict[str, list[list[str]]], library) -> None:
    table = {row[0]: row[1:] for row in results["compared"]}
    assert table[""] == ["FLAP", "CFSP"]
    assert table["Idea"] == [library[slug].first_sentence for slug in ("flap", "cfsp")]
    assert table["Lossless"] == ["no", "no"]
    assert "minutes on one GPU: 3-5" in table["Reported"][0]
    assert table["Measured"] == ["nothing", "nothing"]
