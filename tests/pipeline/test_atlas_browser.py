"""The atlas in a real browser, headless and without a network: what it shows, how it is used, whom it shuts out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pipeline.atlas import Options, build
from pipeline.runs import file_stem
from tests.pipeline.synthetic import HOSTILE, LAYERS, make_run, write_class_maps, write_detection

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")

BROWSER = next(filter(None, map(shutil.which, (os.environ.get("CHROMIUM", ""), "chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium on this machine; CHROMIUM names one")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    other = make_run(folder / "other", without=("others",))
    run = make_run(folder / "a run's <i>folder</i>")
    write_detection(run, ["plain", HOSTILE])
    write_class_maps(run)
    index = build(run, Options(against=str(other.location))).local
    assert index is not None
    return index.parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page, and everything that went wrong on it."""

    def __init__(self, browser: Any, site: Path, **context: Any) -> None:
        self.site = site
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("requestfailed", self.failed)
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left while it loaded
            self.wrong.append(f"failed: {request.url}: {request.failure}")

    def open(self, page: str) -> Any:
        self.page.goto("about:blank")  # else another fragment is no new visit
        path, _, fragment = page.partition("#")
        self.page.goto((self.site / path).as_uri() + (f"#{fragment}" if fragment else ""))
        return self.page

    @property
    def address(self) -> str:
        """The page's own word: the driver's `page.url` hears of a new fragment a moment later."""
        return str(self.page.evaluate("location.href"))

    def shown(self, items: str) -> list[str]:
        """The identities of the visible items, in the order in which they are seen."""
        return self.page.eval_on_selector_all(items, "all => all.filter(item => !item.hidden).map(item => item.id)")


@pytest.fixture
def visit(browser: Any, site: Path) -> Iterator[Visit]:
    found = Visit(browser, site)
    yield found
    found.context.close()
    assert not found.wrong


PAGES = (
    "index.html",
    "run.html",
    "layers/conv1.html",
    "maps/conv1/0.html",
    "images/occlusion-1.html",
    "tables/confusion.html",
)
MORE_PAGES = (
    "maps.html",
    "images.html",
    "comparison.html",
    "maps/conv1/2.html",
    f"maps/{file_stem(LAYERS[2])}/3.html",
    "images/occlusion-2.html",
    "tables/feature_maps.html",
    "tables/unheard_of.html",
    "tables/detection.html",
    "tables/dense_maps.html",
)


@pytest.mark.parametrize(
    ("pages", "scheme", "width"),
    [
        (PAGES, "light", 1280),
        pytest.param(MORE_PAGES, "light", 1280, marks=pytest.mark.slow),
        pytest.param(PAGES + MORE_PAGES, "dark", 390, marks=pytest.mark.slow),
    ],
)
def test_pages_render_without_errors_and_shut_nobody_out(
    browser: Any, site: Path, pages: tuple[str, ...], scheme: str, width: int
) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed: pip install -e .[dev]"
    )
    visit = Visit(browser, site, color_scheme=scheme, viewport={"width": width, "height": 850})
    for name in pages:
        page = visit.open(name)
        assert page.evaluate("[...document.images].every(image => !image.complete || image.naturalWidth > 0)"), name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than the window"
        found = axe.Axe().run(page, options={"preload": False}).response["violations"]
        serious = [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]
        assert not serious, f"{name}: {serious}"
    visit.context.close()
    assert not visit.wrong


@pytest.mark.slow
def test_every_page_opens_from_a_web_server_without_errors(browser: Any, site: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    visit = Visit(browser, site)
    for path in sorted(site.rglob("*.html")):
        address = f"http://127.0.0.1:{server.server_port}/{path.relative_to(site).as_posix()}"
        assert visit.page.goto(address).status == 200
        links = visit.page.eval_on_selector_all("a[href]", "all => all.map(a => new URL(a.href))")
        assert links
    server.shutdown()
    visit.context.close()
    assert not visit.wrong


def test_names_with_markup_are_shown_as_text(visit: Visit) -> None:
    page = visit.open("images/occlusion-1.html")
    one_line = " ".join(HOSTILE.split())
    assert one_line in " ".join(page.text_content("h1").split())
    assert page.evaluate("document.scripts.length") == 1
    page.keyboard.press("Tab")
    page.focus(".stage")
    for _ in range(3):
        page.keyboard.press("ArrowRight")  # the class map goes through all classes, hostile ones among them
    assert page.evaluate("document.scripts.length") == 1
    options = visit.open("layers/conv1.html").eval_on_selector_all(
        "select[name=class] option", "all => all.map(o => o.value)"
    )
    assert HOSTILE in options


def test_maps_are_filtered_sorted_and_searched_and_the_address_remembers(visit: Visit) -> None:
    page = visit.open("layers/conv1.html")
    items = "#map-list > li"
    assert visit.shown(items) == ["map-0", "map-1", "map-2", "map-3"]
    page.select_option("select[name=state]", "dead")
    assert visit.shown(items) == ["map-2"]
    page.select_option("select[name=state]", "alive")
    page.fill("input[name=share]", "5")  # 22.5, 7.5 and 2.5 % of the images
    assert visit.shown(items) == ["map-0", "map-1"]
    assert page.text_content(".found") == "2 of 4 maps"
    page.select_option("select[name=sort]", "share:up")
    assert visit.shown(items) == ["map-1", "map-0"]
    address = visit.address
    page.click("button[type=reset]")
    page.wait_for_function("document.querySelector('.found').textContent === '4 of 4 maps'")
    assert "#" not in visit.address
    page = visit.open("layers/conv1.html#" + address.partition("#")[2])
    assert visit.shown(items) == ["map-1", "map-0"]
    page.click("button[type=reset]")
    page.fill("input[type=search]", "dog")  # of class dog are ranks 2 and 6, of which rank 2 has lost its label
    assert visit.shown(items) == ["map-0"]
    page.fill("input[type=search]", "no such thing")
    assert visit.shown(items) == []
    page.fill("input[type=search]", "")
    page.select_option("select[name=class]", "cat")
    assert visit.shown(items) == ["map-0"]
    page.select_option("select[name=class]", HOSTILE)
    assert visit.shown(items) == ["map-0", "map-1", "map-3"]
    page = visit.open("layers/conv1.html#" + visit.address.partition("#")[2])
    assert visit.shown(items) == ["map-0", "map-1", "map-3"]


def test_the_keys_walk_select_and_share_a_selection(visit: Visit) -> None:
    page = visit.open("layers/conv1.html")
    for key, at in (("j", "map-0"), ("j", "map-1"), ("ArrowRight", "map-2"), ("k", "map-1"), ("ArrowLeft", "map-0")):
        page.keyboard.press(key)
        assert visit.address.endswith(f"#{at}"), key
        assert page.evaluate("document.activeElement.closest('li').id") == at
    page.keyboard.press("x")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("x")
    assert "selected=map-0+map-2" in visit.address
    page.check("input[name=only]")
    assert visit.shown("#map-list > li") == ["map-0", "map-2"]
    page = visit.open("layers/conv1.html#" + visit.address.partition("#")[2])
    assert visit.shown("#map-list > li") == ["map-0", "map-2"]
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.type("jk")  # letters in a search are letters
    assert page.input_value("input[type=search]") == "jk"
    page = visit.open("layers/conv1.html#map-3")
    assert page.evaluate("document.activeElement.closest('li').id") == "map-3"
    page.keyboard.press("Enter")
    page.wait_for_url("**/maps/conv1/3.html")
    page.keyboard.press("k")
    page.wait_for_url("**/maps/conv1/2.html")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/maps/conv1/3.html")
    page.keyboard.press("u")
    page.wait_for_url("**/layers/conv1.html")
    page = visit.open("maps/conv1/3.html")
    page.keyboard.press("/")
    page.wait_for_url("**/maps.html")


def test_a_click_on_a_maps_picture_opens_its_page_and_one_on_its_box_selects_it(visit: Visit) -> None:
    page = visit.open("layers/conv1.html")
    page.locator("#map-1 .select").click()
    assert visit.address.endswith("#selected=map-1")
    box = page.locator("#map-1 img").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_url("**/maps/conv1/1.html")


def test_all_maps_are_found_from_one_page(visit: Visit) -> None:
    page = visit.open("maps.html")
    page.fill("input[type=search]", "conv1 2")
    assert page.text_content(".found") == "1 of 12 maps"
    page.fill("input[type=search]", "")
    page.select_option("select[name=sort]", "share:down")
    assert page.text_content("#all-maps tr th").split() == ["conv1", "0"]


def test_one_scale_for_all_tiles_lowers_the_contrast_of_the_faint(visit: Visit) -> None:
    page = visit.open("maps/conv1/0.html")
    filters = "all => all.map(tile => getComputedStyle(tile).filter)"
    assert set(page.eval_on_selector_all(".projection", filters)) == {"none"}
    page.check("input[value=shared]")
    assert set(page.eval_on_selector_all(".projection", filters)) == {
        "contrast(1)",
        "contrast(0.2)",
    }  # the nine; epoch 1
    assert visit.address.endswith("#scale=shared")
    page = visit.open("maps/conv1/3.html#scale=shared")
    assert page.eval_on_selector_all(".projection", filters) == ["contrast(0)"]  # its projection is zero


def test_the_square_says_what_the_network_sees_wherever_it_is(visit: Visit) -> None:
    page = visit.open("images/occlusion-1.html")

    def readout(name: str) -> str:
        return page.text_content(f"[data-read={name}]").replace("\u00a0", " ")

    assert (readout("row"), readout("col"), readout("probability")) == ("0", "0", "10.0 %")
    box = page.locator(".stage svg").bounding_box()
    scale = box["width"] / 32
    # The square's position (2, 3) is centred at row 2 * 6 + 4, column 3 * 6 + 4 of the input.
    page.mouse.move(box["x"] + 22 * scale, box["y"] + 16 * scale)
    assert (readout("row"), readout("col")) == ("2", "3")
    assert readout("probability") == f"{100 * (0.1 + 0.8 * 13 / 24):.1f} %"
    assert " ".join(readout("class").split()) == " ".join(HOSTILE.split())  # position 13 is of class 1
    assert readout("activation") == "13.0"
    page.focus(".stage")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert (readout("row"), readout("col")) == ("1", "4")
    assert visit.address.endswith("occlusion-1.html")  # the arrows moved the square, not the page
    square = page.locator("[data-square]").first
    assert (square.get_attribute("x"), square.get_attribute("y")) == ("24", "6")
    page.locator("input[type=range]").fill("20")
    page.check("input[value=class]")
    shown = page.eval_on_selector_all(
        ".overlay", "all => all.map(i => [i.dataset.map, i.getAttribute('visibility'), i.getAttribute('opacity')])"
    )
    assert shown == [["probability", "hidden", "0.2"], ["activation", "hidden", "0.2"], ["class", "visible", "0.2"]]


def test_kinds_of_boxes_are_shown_and_hidden_and_images_found_by_what_became_of_them(visit: Visit) -> None:
    page = visit.open("tables/detection.html")
    assert page.locator(".kind-1:visible").count() == 2
    assert page.locator(".kind-5:visible").count() == 1
    page.uncheck("[data-kind='1']")
    assert page.locator(".kind-1:visible").count() == 0
    assert page.locator(".kind-5:visible").count() == 1
    page.select_option("select[name=fate]", "missed")
    assert visit.shown("#boxed-list > li") == ["boxed-2"]
    page.fill("#row-list-search", "confused")  # the page's other list
    assert page.locator("#row-list > tr:visible").count() == 1
    page = visit.open("tables/detection.html#" + visit.address.partition("#")[2])
    assert visit.shown("#boxed-list > li") == ["boxed-2"]
    assert page.locator("#row-list > tr:visible").count() == 1


def test_pages_are_whole_without_script(browser: Any, site: Path) -> None:
    visit = Visit(browser, site, java_script_enabled=False)
    page = visit.open("layers/conv1.html")
    assert page.locator("#map-list > li:visible").count() == 4
    assert page.locator("form:visible").count() == 0  # what would do nothing is not shown
    visit.open("images/occlusion-1.html")
    assert page.locator(".panels figure:visible").count() == 5
    visit.context.close()
