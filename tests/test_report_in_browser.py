"""The report as a browser shows it: opened from disk in headless Chromium, with nothing asked of anyone else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from edgecompress.reporting.comparison import comparison_document
from edgecompress.reporting.report_page import write_pages, write_report
from edgecompress.run_directory import RunDirectory
from edgecompress.searching import search_page
from report_runs import full_run, hostile_run
from search_documents import search_document

pytestmark = pytest.mark.slow
NAMES = (
    "<img src=x onerror=\"document.title='executed'\">",
    "<script>document.title='executed'</script>",
    "a very long name " * 40,
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f680 astronaut",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here; Debian's package chromium is enough")
    with sync_playwright() as playwright:
        # The sandbox wants rights that a container has not; the pages are our own.
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """One page opened from disk, with everything that it said or asked for."""

    def __init__(self, browser: Browser, path: Path, *, width: int = 1280, scheme: Any = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.goto(path.resolve().as_uri())
        self.own = path.resolve().as_uri()

    @property
    def asked_outside(self) -> list[str]:
        return [url for url in self.asked if url != self.own and not url.startswith("data:image/png;base64,")]


def _report(run: RunDirectory) -> Path:
    page = write_report(run, "x86", ["html"]).html
    assert page is not None
    return page


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _report(full_run(tmp_path_factory.mktemp("full") / "run"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _report(full_run(tmp_path_factory.mktemp("hostile") / "run", names=NAMES))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    runs = [full_run(folder / name) for name in ("one run", "another run of a rather long name", "third")]
    page = write_pages(comparison_document(runs), folder / "comparison.html", "comparison", ["html"]).html
    assert page is not None
    return page


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("searched") / "search.html"
    path.write_text(search_page.page(search_document(recipe=NAMES[1])))
    return path


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["compared", "searched"])
def test_the_other_pages_open_in_peace_and_without_barriers(
    browser: Browser, request: Any, name: str, width: int
) -> None:
    visit = Visit(browser, request.getfixturevalue(name), width=width)
    assert visit.page.title() != "executed"
    assert visit.page.locator("svg.plot").count() == 2
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert (visit.said, visit.asked_outside) == ([], [])
    found = Axe().run(visit.page).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    visit.page.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["full", "hostile"])
def test_it_opens_from_disk_in_peace(browser: Browser, request: Any, name: str, width: int, scheme: str) -> None:
    visit = Visit(browser, request.getfixturevalue(name), width=width, scheme=scheme)
    page = visit.page
    measure = "all => all.map(s => { const b = s.getBBox(); return [b.width, b.height] })"
    boxes = page.locator("svg.plot").evaluate_all(measure)
    assert len(boxes) >= 13
    assert all(across > 50 and down > 50 for across, down in boxes), boxes
    images = page.locator("img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert len(images) == 32
    assert set(images) == {96}
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.said == []
    assert visit.asked_outside == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, full: Path, scheme: str) -> None:
    visit = Visit(browser, full, scheme=scheme)
    visit.page.locator("details").evaluate_all("all => all.forEach(d => d.open = true)")
    found = Axe().run(visit.page).response
    assert len(found["passes"]) > 20
    bad = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [node["html"][:200] for node in v["nodes"][:3]]) for v in bad] == []
    visit.page.close()


def test_hostile_names_are_shown_and_not_run(browser: Browser, hostile: Path) -> None:
    visit = Visit(browser, hostile)
    page = visit.page
    assert page.title() == "prune_kd on x86 \u2013 edgecompress"
    shown = page.locator("#classes").locator("xpath=..").locator("tbody th").all_inner_texts()
    kept = [re.sub(r"\s+", " ", name)[:79].strip() for name in NAMES]
    for name in kept:
        assert any(text.startswith(name) for text in shown), (name, shown)
    assert page.locator("img:not([src^='data:image/png'])").count() == 0
    assert page.locator("script").count() == 1
    page.close()


def test_hostile_texts_everywhere_do_not_run_either(browser: Browser, tmp_path: Path) -> None:
    visit = Visit(browser, _report(hostile_run(tmp_path / "run")), width=390)
    assert visit.said == []
    assert visit.asked_outside == []
    assert visit.page.locator("img").count() == 0
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    visit.page.close()


def test_a_table_sorts_by_the_column_that_is_pressed(browser: Browser, full: Path) -> None:
    page = Visit(browser, full).page
    table = page.locator("#stages").locator("xpath=..")
    table.get_by_role("button", name="Params").click()
    assert table.locator("tbody th").all_inner_texts() == ["dense", "pruned", "int8"]
    table.get_by_role("button", name="Params").click()
    assert table.locator("tbody th").all_inner_texts()[-1] == "dense"
    assert table.locator("[aria-sort=ascending]").inner_text().startswith("Params")
    page.close()


def test_it_prints(browser: Browser, full: Path) -> None:
    page = Visit(browser, full, scheme="dark").page
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("details pre").first.is_visible()
    page.close()


def test_525_classes_fit_and_open_quickly(browser: Browser, tmp_path: Path) -> None:
    path = _report(full_run(tmp_path / "run", classes=525))
    assert path.stat().st_size < 5_000_000
    seconds = []
    for _ in range(3):
        page = Visit(browser, path).page
        seconds.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000)
        page.close()
    assert 0 < min(seconds) < 2.0, seconds
