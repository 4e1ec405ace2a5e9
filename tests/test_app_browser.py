"""`sdjax app` in headless Chromium: draw, use a picture again, inpaint, train, stop, resume, draw with the result.

Needs the command chromium and playwright. With SDJAX_SCREENSHOTS=DIR it leaves pictures of the page there.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.browser

TINY = Path(__file__).parent.parent / "sdjax" / "tiny"
SLOW = 600_000  # ms; a machine of CI may be busy


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page with folders of its own, and these folders."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as a user has
    with (home / "log").open("wb") as log:
        command = [sys.executable, "-m", "sdjax", "app", "--port", str(port)]
        server = subprocess.Popen(command, cwd=home, env=own, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url).close()
                break
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.2)
        yield url, home
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A new tab with the page. No request may go to another host, and no script may fail."""
    url, _ = address
    tab = browser.new_page(viewport={"width": 1280, "height": 960}, color_scheme="light")
    tab.set_default_timeout(SLOW)
    others, failures = [], []
    tab.on("request", lambda r: others.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
    tab.on("pageerror", lambda error: failures.append(str(error)))
    tab.goto(url)
    tab.wait_for_selector("#draw")
    yield tab
    tab.close()
    assert others == [] and failures == []


def look(tab, name: str, full: bool = False) -> None:
    if folder := os.environ.get("SDJAX_SCREENSHOTS"):
        tab.wait_for_timeout(700)
        tab.screenshot(path=f"{folder}/{name}.png", full_page=full)


def says(tab, place: str, text: str) -> str:
    """Waits until the state at a place matches a text, and returns it. An error there ends the test."""
    tab.wait_for_function(
        "([place, text]) => { const at = document.querySelector(place); return at.querySelector('.problem') "
        "|| new RegExp(text).test(at.innerText) }",
        arg=[place, text],
    )
    assert tab.query_selector(f"{place} .problem") is None, tab.inner_text(place)
    return tab.inner_text(place)


def set_text(tab, place: str, text: str) -> None:
    tab.fill(f"{place} textarea, {place} input", text)


def open_tab(tab, name: str) -> None:
    tab.get_by_role("tab", name=name, exact=True).click()


def test_draw_and_use_the_settings_of_a_picture_again(page, address):
    _, home = address
    look(page, "draw-empty")
    set_text(page, "#prompt", "red heart")
    page.get_by_label("Steps").first.fill("300")  # a picture that is drawn at once has no preview
    page.click("#draw")
    page.wait_for_selector("#preview img")
    look(page, "draw-preview")
    says(page, "#says", "done in")
    page.wait_for_selector("#drawn img")
    look(page, "draw-done")
    (made,) = (home / "outputs").glob("00000-*.png")
    set_text(page, "#prompt", "something else")
    page.get_by_text("Use the settings of a picture").click()
    page.set_input_files("#dropped input[type=file]", made)
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'red heart'")


def test_a_bad_value_has_one_message_beside_its_field(page):
    set_text(page, "#prompt", "red heart")
    page.get_by_label("Steps").first.fill("0")
    page.click("#draw")
    page.locator(".validation-error", has_text="steps = 0: expected at least 1 and at most 1000").wait_for()
    look(page, "draw-bad")


def test_everything_is_reached_by_keyboard_and_ctrl_enter_draws(page):
    page.wait_for_timeout(500)
    expected = page.evaluate(
        """() => { let n = 0; return [...document.querySelectorAll("button, input, textarea, a[href]")]
        .filter(each => each.checkVisibility({visibilityProperty: true}) && !each.disabled && each.tabIndex >= 0
                        && each.type !== "file")
        .map(each => { each.dataset.place = n++; return each.ariaLabel || each.innerText || each.tagName }) }"""
    )
    assert len(expected) > 20
    reached, outlines = [], []
    for _ in range(2 * len(expected)):
        page.keyboard.press("Tab")
        place, outline = page.evaluate(
            "() => { const at = document.activeElement; return [at.dataset.place, getComputedStyle(at).outlineStyle] }"
        )
        if place is not None:
            if int(place) in reached:
                break
            reached.append(int(place))
            outlines.append(outline)
    assert [expected[n] for n in range(len(expected)) if n not in reached] == []
    assert reached == sorted(reached)  # as the page is read
    assert "none" not in outlines
    page.wait_for_function("document.querySelectorAll('[role=option]').length === 0")  # no list is left open
    page.focus("#prompt textarea")
    page.keyboard.type("red heart")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "draw"
    look(page, "draw-focus")
    page.focus("#prompt textarea")
    page.keyboard.press("Control+Enter")
    says(page, "#says", "done in")
    assert page.input_value("#prompt textarea") == "red heart"


def test_pictures_are_right_below_the_button_on_a_phone(browser, address):
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    tab.goto(address[0])
    tab.wait_for_selector("#drawn")
    top, bottom = (tab.locator(place).bounding_box() for place in ("#draw", "#drawn"))
    settings = tab.get_by_label("Steps").first.bounding_box()
    assert top["y"] < bottom["y"] < 844 / 2 + 100 and bottom["y"] + bottom["height"] < settings["y"]
    tab.close()


def test_paint_a_mask_and_inpaint_then_go_on_from_the_result(page, address):
    _, home = address
    open_tab(page, "Redraw")
    set_text(page, "#redraw-prompt", "green apple")
    page.set_input_files("#editor input[type=file]", TINY / "samples" / "1f424.png")
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    page.wait_for_timeout(2000)
    box = page.locator("#editor").bounding_box()
    x, y = box["x"] + 180, box["y"] + box["height"] / 2
    page.mouse.move(x - 15, y)
    page.mouse.down()
    for step in range(12):
        page.mouse.move(x - 15 + 3 * step, y + step % 3)
    page.mouse.up()
    page.wait_for_timeout(500)
    look(page, "redraw-painted")
    page.click("#redraw")
    says(page, "#redraw-says", "done in")
    page.wait_for_selector("#redrawn img")
    look(page, "redraw-done", full=True)
    newest = sorted((home / "outputs").glob("*green-apple*.png"))[-1]
    with Image.open(newest) as image:
        assert "Mask blur" in image.info["parameters"]


def test_train_stop_resume_and_draw_with_the_result(page, address, browser):
    url, home = address
    open_tab(page, "Train")
    set_text(page, "#set-name", "flat")
    pictures = sorted((TINY / "samples").glob("*.png"))[:6]
    page.set_input_files("#set-files input[type=file]", pictures)
    page.wait_for_timeout(1500)
    look(page, "train-dropped")
    assert pictures[0].stem in page.inner_text("#set-files")
    page.click("#set-add")
    page.get_by_text("None of them has a caption").wait_for()
    assert "6 pictures in flat" in page.inner_text("#set-says")
    page.wait_for_selector("#captions")
    look(page, "train-captions", full=True)
    assert len(list((home / "data" / "flat").glob("*.png"))) == 6
    set_text(page, "#run-name", "first")
    set_text(page, "#run-prompts", "red heart\na cat")
    page.get_by_text("Numbers", exact=True).click()
    set_text(page, "#run-steps", "400")
    set_text(page, "#run-batch_size", "2")
    set_text(page, "#run-every", "100")
    look(page, "train-form", full=True)
    page.click("#train")
    says(page, "#run-state", "training, step [1-9]")
    page.wait_for_selector("#run-state svg polyline")
    points = "document.querySelector('#run-state polyline').getAttribute('points').split(' ').length"
    before = page.evaluate(points)
    page.wait_for_function(f"{points} > {before}")  # the curve moves
    look(page, "train-running", full=True)
    page.close()  # a closed tab stops nothing
    tab = browser.new_page(viewport={"width": 1280, "height": 960})
    tab.set_default_timeout(SLOW)
    tab.goto(url)
    open_tab(tab, "Train")
    says(tab, "#run-state", "training, step")
    tab.click("#run-stop")
    says(tab, "#run-state", "stopped, step")
    stopped = int(re.search(r"step (\d+) of 400", tab.inner_text("#run-state"))[1])
    assert 0 < stopped < 400
    tab.click("#run-resume")
    says(tab, "#run-state", "finished, step 400 of 400")
    tab.wait_for_selector("#run-state .strip img")
    look(tab, "train-finished", full=True)
    with tab.expect_download() as download:
        tab.get_by_text("Download style").click()
    assert download.value.suggested_filename == "first-style.safetensors"
    made = home / "runs" / "first" / "export" / "style" / "lora.safetensors"
    assert Path(download.value.path()).read_bytes() == made.read_bytes()
    tab.get_by_text("Push to the Hugging Face hub").click()
    set_text(tab, "#push-repository", "me/first")
    tab.click("#push-go")
    tab.locator("#push-says .problem", has_text="say under which licence").wait_for()
    look(tab, "train-push", full=True)
    tab.get_by_text("Try the result at several weights").click()
    set_text(tab, "#try-prompt", "red heart")
    tab.click("#try-draw")
    tab.wait_for_function("document.querySelectorAll('#tried img').length >= 3")
    look(tab, "train-tried", full=True)
    tab.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "dark")])
def test_the_page_fits_narrow_and_dark_screens(browser, address, width, scheme):
    url, _ = address
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab.goto(url)
    for name in ("Draw", "Redraw", "Train"):
        open_tab(tab, name)
        tab.wait_for_timeout(500)
        look(tab, f"{name.lower()}-{width}-{scheme}", full=True)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()
