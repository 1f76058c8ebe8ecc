"""The web page in a real browser: draw a box, see it move. Needs Chromium and Playwright."""

from __future__ import annotations

import shutil
from pathlib import Path
from time import monotonic
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from asymtrack_edge.geometry import iou
from tests.runtime.simulated import write_video

pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")

from tests.runtime.test_web import TRUTH, Running  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Options for a container; with them Chromium contacts nothing but the page.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

#: The position of a frame's point on the screen; there may be bars beside the picture on the canvas.
_PLACE = """([x, y]) => {
  const shown = canvas.getBoundingClientRect(), [width, height] = header.size;
  const fit = Math.min(shown.width / width, shown.height / height);
  const left = shown.left + (shown.width - width * fit) / 2, top = shown.top + (shown.height - height * fit) / 2;
  return [left + x * fit, top + y * fit];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p, p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS) as opened:
        yield opened


@pytest.fixture()
def run(tmp_path: Path) -> Iterator[Running]:
    write_video(tmp_path / "in.avi", 400)
    running = Running(tmp_path / "in.avi", pause=0.02)
    yield running
    running.close()


@pytest.fixture()
def open_page(browser: Any, run: Running) -> Iterator[Callable[..., Any]]:
    problems: List[str] = []
    contexts = []

    def opened(**options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.goto(run.view.url)
        until(page, "header !== null")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


def until(page: Any, condition: str) -> None:
    """Waits until an expression is true. (The page's security policy blocks Playwright's own method.)"""
    deadline = monotonic() + 20
    while not page.evaluate(condition):
        assert monotonic() < deadline, f"never became true: {condition}"
        page.wait_for_timeout(30)


def corners(page: Any, box: Any) -> Tuple[List[float], List[float]]:
    x, y, w, h = box
    return page.evaluate(_PLACE, [x, y]), page.evaluate(_PLACE, [x + w, y + h])


def drag(page: Any, box: Any) -> None:
    start, end = corners(page, box)
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=2)
    page.mouse.up()


def follow(page: Any, frame: int) -> Dict[str, Any]:
    """Resumes until a later frame than ``frame`` is shown, pauses, and returns the page's header."""
    page.click("#pause")
    until(page, f"header.frame > {frame}")
    page.click("#pause")
    until(page, "document.querySelector('#pause').dataset.paused === 'true'")
    return page.evaluate("header")


def test_draw_two_boxes_and_see_them_move(open_page: Callable[..., Any], run: Running) -> None:
    page = open_page(viewport={"width": 1200, "height": 800})
    drag(page, TRUTH[0][0])
    page.wait_for_selector("li[data-id='0']")
    drag(page, TRUTH[0][1])
    page.wait_for_selector("li[data-id='1']")
    page.click("#step")
    until(page, "header.frame === 1")
    header = follow(page, 25)
    for target in header["targets"]:
        assert iou(target["box"], TRUTH[header["frame"]][target["id"]]) > 0.7
        assert iou(target["box"], TRUTH[0][target["id"]]) < 0.7, "the box did not move"
    # Checks the painted pixels, not only the data: the outline of box 0 has the colour (230, 159, 0).
    x, y, w, h = header["targets"][0]["box"]
    pixel = "([x, y]) => [...context.getImageData(x, y, 1, 1).data]"
    scale = page.evaluate("canvas.width / header.size[0]")
    red, green, blue, _ = page.evaluate(pixel, [scale * (x + w / 2), scale * (y + h)])
    assert red > 150 and 90 < green < 210 and blue < 110
    page.click("button[aria-label='Remove target 0']")
    page.wait_for_selector("li[data-id='0']", state="detached")
    assert run.run.tracker.ids == [1]
    with page.expect_download() as download:
        page.click("#download")
    assert Path(download.value.path()).read_text().startswith("frame,x,y,w,h,score,state,target\n1,")


def test_keyboard_alone(open_page: Callable[..., Any], run: Running) -> None:
    page = open_page(viewport={"width": 1000, "height": 700})
    page.focus("#picture")
    page.keyboard.press("Enter")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowDown")
    box = page.evaluate("drawn()")
    assert box[0] == pytest.approx(0.44 * 320 - 4 * 3.2, abs=0.5) and box[3] > 0.16 * 240
    page.keyboard.press("Escape")
    assert page.evaluate("drawing") is None
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    page.wait_for_selector("li[data-id='0']")
    order = []
    for _ in range(8):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
    assert {"pause", "step", "download", "end", "Move target 0", "Remove target 0"} <= set(order)
    page.focus("button[aria-label='Move target 0']")
    page.keyboard.press("Enter")
    assert page.evaluate("moving") == 0 and page.evaluate("document.activeElement.id") == "picture"


def test_touch_on_a_phone(open_page: Callable[..., Any], run: Running) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=3)
    start, end = corners(page, TRUTH[0][2])
    session = page.context.new_cdp_session(page)
    for kind, points in (("touchStart", [start]), ("touchMove", [end]), ("touchEnd", [])):
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})
    page.wait_for_selector("li[data-id='0']")
    header = follow(page, 15)
    assert iou(header["targets"][0]["box"], TRUTH[header["frame"]][2]) > 0.7
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page is too wide"


def test_a_page_reconnects_to_the_view_and_ends_the_run(browser: Any, run: Running, tmp_path: Path) -> None:
    """After the end it must not reconnect: that would fill the console with errors."""
    page = browser.new_page()
    page.goto(run.view.url)
    until(page, "header !== null")
    run.close()
    until(page, "document.querySelector('#connection').dataset.state === 'lost'")
    again = Running(tmp_path / "in.avi", port=int(run.address.rpartition(":")[2]))
    until(page, "document.querySelector('#connection').dataset.state === 'open'")
    drag(page, TRUTH[0][0])
    page.wait_for_selector("li[data-id='0']")
    problems: List[str] = []
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.click("#end")
    again.thread.join(10)
    assert not again.thread.is_alive() and again.run.ended
    again.run.close()
    until(page, "document.querySelector('#connection').dataset.state === 'ended'")
    page.wait_for_timeout(1500)
    assert "has ended" in page.inner_text("#connection") and not problems
    page.close()
