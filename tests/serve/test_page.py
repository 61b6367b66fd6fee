"""The web page in a real Chromium: what a person paints, presses and points at, against numpy."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_engine import CHANNELS, FakeEngine
from live_service import Live, live
from painting import Canvas, gray_png, png, random_stroke, replay
from PIL import Image

from flashcocos.bundle.default_model import PAIRS
from flashcocos.config import ModelConfig
from flashcocos.serve.config import read_config
from flashcocos.serve.engine import LocalEngine

NEEDED = "needs Debian's chromium and the package playwright; .ci/run installs them"
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip(NEEDED, allow_module_level=True)
api = pytest.importorskip("playwright.sync_api", reason=NEEDED)

DEMO = PAIRS.parent
FIRST = "lorelei_12"  # the pair that the page begins with
AVATARS = ModelConfig.preset("avatars-128")
KEYS = {"brush": "b", "fill": "f", "line": "l", "rectangle": "r", "pick": "p"}
READY = '#status:text("Translated in")'


class Recorder(FakeEngine):
    """Remembers the labels that reach the model."""

    def __init__(self, config: ModelConfig = AVATARS) -> None:
        super().__init__(config)
        self.labels: list[np.ndarray] = []

    def translate(self, labels: Sequence[Any], exemplars: Sequence[Any]) -> list[Any]:
        self.labels += [label.copy() for label in labels]
        return super().translate(labels, exemplars)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox"]  # for root
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def engine() -> Recorder:
    return Recorder()


@pytest.fixture
def service(engine: Recorder) -> Iterator[Live]:
    with live(engine) as running:
        engine.labels.clear()
        yield running


@pytest.fixture
def allowed() -> list[str]:
    """Parts of error messages that a test expects on the browser's console."""
    return []


@pytest.fixture
def visit(browser: Any, allowed: list[str]) -> Iterator[Callable[..., Any]]:
    """Opens the page of a service; at the end the console holds no error."""
    errors: list[str] = []
    contexts = []

    def visit(running: Live, ready: str = READY, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(running.url)
        page.locator(ready).wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [text for text in errors if not any(part in text for part in allowed)] == []


def use(page: Any, tool: str, number: int) -> None:
    page.keyboard.press(KEYS[tool])
    if number < 10:
        page.keyboard.press(str(number))
    else:
        page.locator(f'input[name="class"][value="{number}"]').check(force=True)


def demo(name: str) -> np.ndarray:
    return np.asarray(Image.open(DEMO / f"{name}.png"))


def file(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


def received(service: Live, engine: Recorder, expected: np.ndarray) -> None:
    """Wait until the label that came last is `expected`."""

    def came() -> bool:
        return bool(engine.labels) and np.array_equal(engine.labels[-1], expected)

    service.until(came, 10)


# strokes as by the mouse, all at once
STROKES = """(strokes) => {
  const canvas = document.getElementById("label"), box = canvas.getBoundingClientRect();
  const fire = (type, [x, y], buttons) => canvas.dispatchEvent(new PointerEvent(type, {
    pointerId: 1, isPrimary: true, button: 0, buttons,
    clientX: box.left + (x + .5) * box.width / 128, clientY: box.top + (y + .5) * box.height / 128,
  }));
  for (const [tool, points, size, number] of strokes) {
    document.querySelector(`input[name="tool"][value="${tool}"]`).click();
    document.querySelector(`input[name="class"][value="${number}"]`).click();
    Object.assign(document.getElementById("brush"), { value: size }).dispatchEvent(new Event("input"));
    fire("pointerdown", points[0], 1);
    for (const point of points.slice(1)) fire("pointermove", point, 1);
    fire("pointerup", points.at(-1), 0);
  }
}"""


def test_200_random_strokes_reach_the_model_exactly(
    service: Live, engine: Recorder, visit: Any, rng: np.random.Generator
) -> None:
    page = visit(service)
    canvas = Canvas(page, "#label")
    ids = demo(FIRST).copy()
    assert np.array_equal(engine.labels[-1], ids)
    for _ in range(10):
        strokes = [random_stroke(rng) for _ in range(20)]
        page.evaluate(STROKES, strokes[:16])
        for tool, points, size, number in strokes[16:]:
            page.locator("#brush").fill(str(size))
            use(page, tool, number)
            canvas.stroke(*points)
        for tool, points, size, number in strokes:
            replay(ids, tool, points, size, number)
        received(service, engine, ids)


def test_hover_shows_the_matches_of_the_model(visit: Any, rng: np.random.Generator) -> None:
    config = read_config()
    engine = LocalEngine(config)
    with live(engine, config) as service:
        page = visit(service)
        picture = Image.open(DEMO / f"{FIRST}_exemplar.png")
        exemplar = engine.encode(picture, demo(f"{FIRST}_exemplar_label"))
        (expected,) = engine.translate([demo(FIRST)], [exemplar])
        stride = engine.describe().config.warp_stride
        points = rng.integers(0, 128, (1000, 2))
        found = page.evaluate(POINT, ["#result-stage .image", "#exemplar-stage canvas", ".ring", points.tolist()])
        matches = expected.matches[points[:, 1] // stride, points[:, 0] // stride]
        assert np.allclose(found["places"], matches, atol=0.05)  # of a pixel; the browser rounds lengths to 1/64
        percents = [float(words.split("confidence ")[1].split()[0]) for words in found["words"]]
        shares = expected.confidence[points[:, 1] // stride, points[:, 0] // stride]
        assert np.abs(np.array(percents) / 100 - shares).max() < 0.005 + 0.5 / 255 + 1e-6

        cells = rng.integers(0, 128 // stride, (200, 2))
        lit = page.evaluate(LIGHT, (stride * cells + rng.integers(0, stride, cells.shape)).tolist())
        for (column, row), places in zip(cells, lit, strict=True):
            wanted = (expected.matches == (stride * (column + 0.5), stride * (row + 0.5))).all(-1)
            assert places == np.flatnonzero(wanted).tolist()
        assert sum(map(len, lit)) > 100

        page.mouse.move(*Canvas(page, "#result-stage .image").at(41, 50))
        x, y = expected.matches[50 // stride, 41 // stride].astype(int)
        page.locator("#result-readout", has_text=f"x 41, y 50 came from x {x}, y {y};").wait_for()
        page.mouse.move(0, 0)
        page.locator("#heat").check()
        page.locator("#threshold").fill("50")
        assert page.evaluate(COLORED) == np.flatnonzero(np.rint(expected.confidence * 255) >= 127.5).tolist()
        engine.close()


# the middle of what is placed over `target`, in its pixels, for each pixel pointed at of `source`; and the words
POINT = """([source, target, mark, points]) => {
  const from = document.querySelector(source), to = document.querySelector(target).getBoundingClientRect();
  const box = from.getBoundingClientRect(), ring = document.querySelector(mark), places = [], words = [];
  for (const [x, y] of points) {
    const [clientX, clientY] = [box.left + (x + .5) * box.width / 128, box.top + (y + .5) * box.height / 128];
    from.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY }));
    const seen = ring.getBoundingClientRect();
    places.push([(seen.left + seen.width / 2 - to.left) / to.width * 128,
                 (seen.top + seen.height / 2 - to.top) / to.height * 128]);
    words.push(document.getElementById("result-readout").value);
  }
  return { places, words };
}"""
# the places of the result that light up for each pixel pointed at of the exemplar
LIGHT = """(points) => {
  const canvas = document.querySelector("#exemplar-stage canvas"), box = canvas.getBoundingClientRect();
  const overlay = document.querySelector(".overlay");
  return points.map(([x, y]) => {
    const [clientX, clientY] = [box.left + (x + .5) * box.width / 128, box.top + (y + .5) * box.height / 128];
    canvas.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY }));
    const { data } = overlay.getContext("2d").getImageData(0, 0, overlay.width, overlay.height);
    return [...Array(data.length / 4).keys()].filter((at) => data[4 * at] > 0);
  });
}"""
# the places that the overlay covers
COLORED = """() => {
  const overlay = document.querySelector(".overlay");
  const { data } = overlay.getContext("2d").getImageData(0, 0, overlay.width, overlay.height);
  return [...Array(data.length / 4).keys()].filter((at) => data[4 * at + 3] > 0);
}"""


def test_a_stroke_on_the_enlarged_label_is_exact(service: Live, engine: Recorder, visit: Any) -> None:
    page = visit(service)
    for key in "++-+":
        page.keyboard.press(key)
    assert page.locator("#zoom").inner_text() == "400 %"
    page.locator("#label-stage").evaluate("(stage) => stage.scrollTo(130, 201)")
    use(page, "brush", 5)
    points = [(20, 30), (31, 25), (30, 36)]
    Canvas(page, "#label").stroke(*points)
    ids = demo(FIRST).copy()
    replay(ids, "brush", points, 6, 5)
    received(service, engine, ids)


# keys as from the keyboard, all at once
PRESS = """([target, keys]) => keys.forEach((text) => {
  const names = text.split("+"), key = names.pop();
  const held = { ctrlKey: names.includes("Control"), shiftKey: names.includes("Shift") };
  document.querySelector(target).dispatchEvent(new KeyboardEvent("keydown", { key, ...held, bubbles: true }));
})"""


def test_undo_goes_back_50_strokes_and_redo_returns(service: Live, engine: Recorder, visit: Any) -> None:
    page = visit(service)
    use(page, "brush", 9)
    page.locator("#brush").fill("3")
    states = [demo(FIRST).copy()]
    for stroke in range(55):
        states.append(states[-1].copy())
        replay(states[-1], "brush", [(2 * stroke, 0)], 3, 9)
    page.evaluate(PRESS, ["#label", ["Enter", "ArrowRight", "ArrowRight"] * 55])
    received(service, engine, states[55])
    page.evaluate(PRESS, ["#undo", ["Control+z"] * 60])
    received(service, engine, states[5])
    assert page.locator("#undo").is_disabled()
    page.evaluate(PRESS, ["#undo", ["Control+Shift+Z"] * 50])
    received(service, engine, states[55])
    page.locator("#undo").click()
    received(service, engine, states[54])
    Canvas(page, "#label").stroke((60, 60), (60, 60))
    assert page.locator("#redo").is_disabled()


def test_an_uploaded_exemplar_is_used_and_a_wrong_one_explained(
    service: Live, engine: Recorder, visit: Any, allowed: list[str]
) -> None:
    allowed.append("status of 422")
    page = visit(service)
    page.locator("#picture").set_input_files(file("red.png", png(np.full((90, 60, 3), (250, 10, 20), np.uint8))))
    assert page.locator("#upload").is_disabled()
    page.locator("#picture-label").set_input_files(file("wrong.png", png(np.full((90, 60), 12, np.uint8))))
    page.locator("#upload").click()
    page.locator("#alert", has_text="class id 12 at row 0, column 0").wait_for()
    page.locator("#picture-label").set_input_files(file("right.png", png(np.full((90, 60), 11, np.uint8))))
    with page.expect_response("**/translate?*") as answer:
        page.locator("#upload").click()
    page.locator('input[aria-label="red.png"]:checked').wait_for(state="attached")
    assert answer.value.ok
    page.locator("#alert").wait_for(state="hidden")
    with page.expect_response("**/translate?size=256*") as answer:
        page.locator("#size").select_option("256")
    assert (answer.value.json()["size"], answer.value.json()["exemplar_size"]) == ([256, 256], [256, 256])
    received(service, engine, demo(FIRST).repeat(2, 0).repeat(2, 1))


def test_an_exemplar_that_the_service_forgot_is_put_again(service: Live, visit: Any, allowed: list[str]) -> None:
    allowed.append("status of 404")
    page = visit(service)
    with page.expect_response("**/v1/exemplars?*") as put:
        page.locator("#size").select_option("64")
    page.locator(READY).wait_for()
    httpx.delete(f"{service.url}/v1/exemplars/{put.value.json()['id']}").raise_for_status()
    with page.expect_response(lambda answer: "translate" in answer.url and answer.ok):
        Canvas(page, "#label").stroke((9, 9), (20, 20))


def test_the_layout_of_an_exemplar_is_edited(service: Live, engine: Recorder, visit: Any) -> None:
    page = visit(service)
    page.get_by_role("button", name="Exemplar's label").click()
    ids = demo(f"{FIRST}_exemplar_label").copy()
    received(service, engine, ids)
    use(page, "rectangle", 7)
    Canvas(page, "#label").stroke((10, 90), (30, 120))
    replay(ids, "rectangle", [(10, 90), (30, 120)], 1, 7)
    received(service, engine, ids)
    page.get_by_role("radio", name="open peeps 26").check(force=True)
    page.get_by_role("button", name="Label of lorelei 39").click()
    received(service, engine, demo("lorelei_39"))
    page.get_by_role("button", name="Blank").click()
    received(service, engine, np.zeros((128, 128), np.uint8))


def test_labels_are_imported_and_exported(
    service: Live, engine: Recorder, visit: Any, rng: np.random.Generator
) -> None:
    page = visit(service)
    for mode in ("L", "P"):
        ids = rng.integers(0, 12, (128, 128), np.uint8)
        ids[40:60] = ids[40]  # rows that a writer filters
        page.locator("#import").set_input_files(file("label.png", png(ids, mode)))
        received(service, engine, ids)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    image = Image.open(download.value.path())
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), ids)
    assert image.getpalette()[6:9] == [2, 0, 0]  # as the engine says


def test_png_files_of_every_filter_are_read(service: Live, visit: Any, rng: np.random.Generator) -> None:
    page = visit(service)
    ids = (np.add.outer(np.arange(40), np.arange(33)) + rng.integers(0, 9, (40, 33))).astype(np.uint8)
    rows = bytearray()
    for y, row in enumerate(ids.astype(int)):
        above = ids[y - 1].astype(int) if y else np.zeros(33, int)
        left, corner = np.append(0, row[:-1]), np.append(0, above[:-1])
        guesses = [abs(left + above - corner - near) for near in (left, above, corner)]
        paeth = np.choose(np.argmin(guesses, 0), [left, above, corner])
        predicted = [0, left, above, (left + above) // 2, paeth][y % 5]
        rows += bytes([y % 5]) + ((row - predicted) % 256).astype(np.uint8).tobytes()
    read = """async (file) => {
      const { decode } = await import("/page/png.js");
      return [...(await decode(Uint8Array.from(file))).ids];
    }"""
    assert page.evaluate(read, list(gray_png(bytes(rows), 33, 40))) == ids.ravel().tolist()


def test_an_overtaken_request_is_aborted_and_the_newest_shown(service: Live, engine: Recorder, visit: Any) -> None:
    page = visit(service)
    canvas = Canvas(page, "#label")
    asked: list[Any] = []
    ended: list[Any] = []
    page.on("request", lambda request: asked.append(request) if "translate" in request.url else None)
    for event in ("requestfinished", "requestfailed"):
        page.on(event, lambda request: ended.append(request) if "translate" in request.url else None)
    engine.gate.clear()
    use(page, "brush", 4)
    ids = demo(FIRST).copy()
    page.locator("#brush").fill("5")
    for stroke in range(4):
        point = (20 + 20 * stroke, 110)
        canvas.stroke(point, point)
        replay(ids, "brush", [point], 5, 4)
        page.wait_for_timeout(300)
        assert (len(asked), len(ended)) == (stroke + 1, stroke)  # one in flight
    assert page.locator("#result-stage").get_attribute("aria-busy") == "true"
    engine.gate.set()
    page.locator('#result-stage[aria-busy="false"]').wait_for()
    assert [request.failure for request in asked] == ["net::ERR_ABORTED"] * 3 + [None]
    received(service, engine, ids)
    assert len(engine.labels) <= 3  # the first picture, the one that was running, the newest


def test_a_busy_service_is_asked_again(service: Live, engine: Recorder, visit: Any, allowed: list[str]) -> None:
    allowed.append("status of 429")
    page = visit(service)
    problem = {"error": {"code": "queue_full", "message": "32 requests wait already.", "request_id": "0" * 16}}
    page.route("**/translate?*", lambda route: route.fulfill(status=429, json=problem, headers={"Retry-After": "1"}))
    Canvas(page, "#label").stroke((64, 64), (70, 70))
    page.locator("#alert", has_text="32 requests wait already. Trying again in 1 s.").wait_for()
    page.unroute("**/translate?*")
    page.locator("#alert").wait_for(state="hidden")
    page.locator(READY).wait_for()


def test_a_service_with_tokens_asks_for_one(visit: Any, engine: Recorder, tmp_path: Path, allowed: list[str]) -> None:
    allowed.append("status of 401")
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("painter 0123456789abcdef\n")
    with live(engine, read_config({"token_file": str(tokens)})) as service:
        page = visit(service, ready="#sign-in[open]")
        page.locator("#token").fill("fedcba9876543210")
        page.keyboard.press("Enter")
        page.locator("#sign-in[open]").wait_for()
        page.locator("#token").fill("0123456789abcdef")
        page.keyboard.press("Enter")
        page.locator(READY).wait_for()


def test_everything_works_without_a_pointer(service: Live, engine: Recorder, visit: Any) -> None:
    page = visit(service)
    keys = page.keyboard

    def tab_to(selector: str) -> None:
        for _ in range(80):
            keys.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab never reaches {selector}")

    tab_to("#label")
    ids = demo(FIRST).copy()
    for key in ("b", "7", "[", "[", "Shift+ArrowRight", "Shift+ArrowDown", "ArrowDown", "Space"):
        keys.press(key)
    for key in ("Shift+ArrowRight", "ArrowUp", "Space", "ArrowRight", "ArrowRight"):
        keys.press(key)
    replay(ids, "brush", [(8, 9), (16, 9), (16, 8)], 4, 7)
    received(service, engine, ids)
    assert page.locator("#label-readout").inner_text() == "x 18, y 8: class 0"
    for key in ("l", "Space", "Shift+ArrowDown", "Escape", "r", "3", "Space", "Shift+ArrowDown", "ArrowRight", "Space"):
        keys.press(key)
    replay(ids, "rectangle", [(18, 16), (19, 24)], 1, 3)
    received(service, engine, ids)
    for key in ("f", "5", "Enter"):
        keys.press(key)
    replay(ids, "fill", [(19, 24)], 1, 5)
    received(service, engine, ids)
    keys.press("Control+z")

    tab_to("#result-stage .image")
    keys.press("Shift+ArrowLeft")
    assert page.locator("#result-readout").inner_text() == "x 32, y 64 came from x 2, y 2; confidence 50 %"
    tab_to("#split")
    for _ in range(30):
        keys.press("ArrowRight")
    assert page.locator(".divider").evaluate("(divider) => divider.style.left") == "30%"
    keys.press("c")
    assert page.locator("#heat").is_checked()
    tab_to("#exemplar-stage canvas")
    keys.press("ArrowLeft")
    assert page.locator("#exemplar-readout").inner_text() == "x 60, y 64: no place of the result came from here"
    tab_to('input[name="exemplar"]')
    with page.expect_response("**/translate?*"):
        keys.press("ArrowRight")
    keys.press("?")
    page.locator("#help[open]").wait_for()
    keys.press("Escape")
    assert page.locator("#help").is_hidden()


def test_a_phone_paints_by_touch(service: Live, engine: Recorder, visit: Any) -> None:
    page = visit(service, viewport={"width": 390, "height": 640}, has_touch=True, is_mobile=True)
    wide = """() => [...document.querySelectorAll("body *")].filter((element) => {
      const box = element.getBoundingClientRect();
      return box.width > 1 && (box.left < 0 || box.right > innerWidth + 0.5);
    }).map((element) => element.outerHTML)"""
    for width in (390, 320):
        page.set_viewport_size({"width": width, "height": 640})
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        assert page.evaluate(wide) == []
    page.locator("#label").scroll_into_view_if_needed()
    page.locator('#tools input[value="fill"]').check(force=True)
    page.touchscreen.tap(*Canvas(page, "#label").at(3, 3))
    ids = demo(FIRST).copy()
    replay(ids, "fill", [(3, 3)], 1, 2)
    received(service, engine, ids)


def test_controls_have_names_and_text_stands_out_in_light_and_dark(service: Live, visit: Any) -> None:
    page = visit(service)
    nameless = """() => [...document.querySelectorAll("button, input, select, canvas[tabindex]")].filter((control) =>
      !(control.getAttribute("aria-label") || control.textContent.trim() ||
        [...control.labels ?? []].some((label) => label.textContent.trim()))).map((control) => control.outerHTML)"""
    assert page.evaluate(nameless) == []
    read = """() => ["--panel", "--ground", "--soft", "--text", "--quiet", "--alarm", "--accent"].map((name) => {
      const probe = document.body.appendChild(document.createElement("i"));
      probe.style.color = `var(${name})`;
      return getComputedStyle(probe).color.match(/\\d+/g).map(Number);
    })"""
    darkest = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colors = np.array(page.evaluate(read)) / 255
        linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
        light = linear @ (0.2126, 0.7152, 0.0722) + 0.05
        grounds, texts = light[:3, None], light[3:]
        assert (np.maximum(grounds / texts, texts / grounds) >= 4.5).all()  # WCAG 2.2, level AA
        darkest.append(light.argmin())
    assert darkest == [3, 1]  # the text, the ground


def test_labels_of_planes_are_uploaded_and_the_page_says_why(visit: Any, rng: np.random.Generator) -> None:
    engine = Recorder(CHANNELS)
    side = CHANNELS.image_size
    planes = rng.integers(0, 256, (CHANNELS.label_channels, side, side), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, label=planes)
    with live(engine) as service:
        page = visit(service, ready='#status:text("Upload an exemplar")')
        assert page.locator("#label").is_hidden()
        page.locator("#planes-why", has_text=f"{CHANNELS.label_channels} planes of values").wait_for()
        page.locator("#planes").set_input_files(file("edges.npz", buffer.getvalue()))
        page.locator("#picture").set_input_files(file("face.png", png(np.full((side, side, 3), 90, np.uint8))))
        if CHANNELS.condition_on_label:
            page.locator("#picture-label").set_input_files(file("face.npz", buffer.getvalue()))
        page.locator("#upload").click()
        page.locator(READY).wait_for()
        received(service, engine, planes)
