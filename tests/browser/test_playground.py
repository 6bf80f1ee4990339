"""The playground, in Chromium, against a live service with the tiny model."""

import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from sdxl_lab.images import open_image, read_record
from service.settings import Settings
from tests.service import conftest as shared
from tests.service.conftest import serving, wait_for

promoted, slot, live = shared.promoted, shared.slot, shared.live  # its fixtures serve here too

pytestmark = pytest.mark.slow

PROMPT = "a red circle on a blue background"
LONG = {"steps": 100, "width": 512, "height": 512}
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)


class Visit(NamedTuple):
    page: Page
    context: BrowserContext
    expected: list[str]  # what the console may say: parts of its messages


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Open the playground and wait until the service is ready; in the end no error may stand in the console."""
    contexts: list[BrowserContext] = []
    visits: list[Visit] = []
    errors: list[str] = []

    def start(address: str, *, ready: bool = True, width: int = 1280, **options: object) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        opened = Visit(page, context, [])
        visits.append(opened)
        page.goto(address)
        if ready:
            page.locator("#readiness[data-state=ready]").wait_for()
        return opened

    yield start
    for context in contexts:
        context.close()
    expected = [part for opened in visits for part in opened.expected]
    assert [error for error in errors if not any(part in error for part in expected)] == []


@pytest.fixture
def home(live):
    return f"http://127.0.0.1:{live.port}/"


def draw(page, prompt=PROMPT, **settings):
    """Generate through the form and wait for the image; its id."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Generate").click()
    return shown(page, prompt)


def shown(page, prompt=PROMPT):
    """The id of the image that is shown large once it is loaded."""
    expect(page.locator("#making")).to_be_hidden()
    image = page.locator("#image")
    expect(image).to_be_visible()
    expect(image).to_have_attribute("alt", prompt)
    page.wait_for_function("document.querySelector('#image').naturalWidth > 0")
    return page.locator(".tile[aria-current=true]").get_attribute("data-id")


def fact(page, term):
    return page.locator("#facts div", has=page.locator("dt", has_text=term)).locator("dd").inner_text()


def fetched(home, path, **headers):
    with urllib.request.urlopen(urllib.request.Request(home + path, headers=headers)) as answer:
        return answer.read()


def posted(home, path, body):
    headers = {"Content-Type": "application/json", "X-API-Key": KEY}
    request = urllib.request.Request(home + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def pixels(png):
    return np.asarray(open_image(png))


def test_a_changed_setting_and_a_fixed_seed_make_the_image_they_name(home, visit, promoted):
    page = visit(home).page
    assert page.locator("#steps").input_value() == str(promoted.steps)
    expect(page.locator("#changes")).to_have_text("As promoted")
    page.locator("#steps").fill("3")
    expect(page.locator("#changes")).to_have_text("1 overridden")
    expect(page.get_by_role("button", name=f"Reset to {promoted.steps}: steps")).to_be_visible()
    page.get_by_text("Fixed", exact=True).click()
    page.locator("#seed").fill(str(2**63 - 1))
    page.get_by_label("Scheduler", exact=True).select_option("ddim")
    image = draw(page)
    record = read_record(fetched(home, f"download/{image}"))
    assert (record.prompt, record.seed) == (PROMPT, 2**63 - 1)
    assert (record.config.steps, record.config.scheduler) == (3, "ddim")
    assert sorted(record.overridden) == ["scheduler", "steps"]
    assert fact(page, "Seed") == str(2**63 - 1)  # JavaScript's own numbers would end in ...808
    assert fact(page, "Steps") == f"3 (promoted {promoted.steps})"
    page.get_by_role("button", name=f"Reset to {promoted.steps}: steps").click()
    page.get_by_role("button", name=f"Reset to {promoted.scheduler}: scheduler").click()
    expect(page.locator("#changes")).to_have_text("As promoted")
    assert page.locator("#steps").input_value() == str(promoted.steps)


def test_the_digest_and_the_attestation_are_in_sight(home, visit, promoted):
    page = visit(home).page
    served = json.loads(fetched(home, "config"))
    chip = page.locator("#about-open")
    expect(chip).to_contain_text(promoted.short_digest)
    expect(chip).to_contain_text("Attested" if served["attested"] else "Not attested")
    chip.click()
    expect(page.get_by_role("dialog", name="What is served")).to_contain_text(promoted.short_digest)


def test_steps_and_previews_come_in_and_cancel_stops_the_image(home, live, visit):
    page = visit(home).page
    for name, value in LONG.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#making-title")).to_have_text(re.compile(r"Step \d+ of 100"))
    expect(page.locator("#preview")).to_have_attribute("src", re.compile("^data:image/jpeg;base64,"))
    assert 0 < page.get_by_role("progressbar", name="Steps done").evaluate("bar => bar.value") < 1
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#making")).to_be_hidden()
    expect(page.locator("#toast")).to_have_text("Cancelled")
    wait_for(lambda: not live.jobs.active)
    assert json.loads(fetched(home, "images"))["images"] == []
    expect(page.locator("#problem")).to_be_hidden()
    draw(page, steps=2, width=64, height=64)


def test_what_the_service_refuses_stands_at_its_field(home, visit):
    page, _, expected = visit(home)
    expected.append("422")
    page.locator("#steps").fill("400")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    steps = page.get_by_label("Steps", exact=True)
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(steps).to_be_focused()
    expect(steps).to_have_accessible_description(re.compile("from 1 to 100; received 400"))
    steps.fill("2")
    expect(steps).not_to_have_attribute("aria-invalid", "true")
    draw(page)
    page.get_by_label("Prompt", exact=True).fill(" ")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_attribute("aria-invalid", "true")


def test_a_full_queue_is_waited_for_and_a_lost_connection_is_asked_again_under_the_same_key(home, visit):
    page, _, expected = visit(home)
    expected += ["429", "ERR_FAILED"]
    keys, failures = [], ["full", "lost"]

    def trouble(route):
        keys.append(route.request.headers["idempotency-key"])
        if not failures:
            route.continue_()
        elif failures.pop(0) == "full":
            problem = {"title": "The queue is full", "status": 429, "detail": "100 images wait"}
            headers = {"Retry-After": "1", "Content-Type": "application/problem+json"}
            route.fulfill(status=429, headers=headers, body=json.dumps(problem))
        else:
            route.abort()

    page.route("**/generate*", trouble)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#making-title")).to_have_text("The queue is full")
    expect(page.locator("#making-detail")).to_have_text(re.compile(r"100 images wait\. Trying again in [01] s\."))
    expect(page.locator("#making-title")).to_have_text("The connection was lost")
    page.get_by_role("button", name="Try again now").click()
    shown(page)
    assert len(keys) == 3
    assert len(set(keys)) == 1


def test_a_image_is_refined(home, visit):
    page = visit(home).page
    first = draw(page)
    page.get_by_role("button", name="Refine", exact=True).click()
    form = page.get_by_role("form", name="Refine this image")
    form.get_by_label("Prompt for the refiner").fill("a green star")
    form.get_by_label("Strength", exact=True).fill("0.5")
    form.get_by_role("button", name="Refine").click()
    second = shown(page, "a green star")
    assert second != first
    record = read_record(fetched(home, f"download/{second}"))
    assert (record.source.id, record.strength, record.prompt) == (first, 0.5, "a green star")
    page.get_by_role("button", name=first[:8]).click()
    expect(page.locator("#caption")).to_have_text(PROMPT)
    assert shown(page) == first


def test_use_these_settings_makes_the_image_again(home, visit):
    page = visit(home).page
    first = draw(page, "a small <b>cat</b>", steps=3, width=72, negative_prompt="blue")
    draw(page, "a ring", steps=2, width=64, negative_prompt="")
    page.locator(f"[data-id='{first}']").click()
    expect(page.locator("#caption")).to_have_text("a small <b>cat</b>")
    page.get_by_role("button", name="Use these settings").click()
    expect(page.locator("#changes")).to_have_text("3 overridden")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".tile")).to_have_count(3)
    again = shown(page, "a small <b>cat</b>")
    assert again != first
    assert np.array_equal(*(pixels(fetched(home, f"download/{id}")) for id in (first, again)))


QUOTED = 'it\'s "a cat"\nin a $HAT `hat` \\ !! ‮é🐈'


def test_the_copied_command_makes_the_same_pixels(home, visit, tmp_path):
    page = visit(home, permissions=["clipboard-read", "clipboard-write"]).page
    first = draw(page, QUOTED, steps=3, negative_prompt="don't\nblur")
    page.get_by_role("button", name="Refine", exact=True).click()
    form = page.get_by_role("form", name="Refine this image")
    form.get_by_label("Strength", exact=True).fill("0.6")
    form.get_by_role("button", name="Refine").click()
    expect(page.locator(".tile")).to_have_count(2)
    second = shown(page, QUOTED)
    for image in (second, first):
        page.locator(f"[data-id='{image}']").click()
        expect(page.locator("#download-png")).to_have_attribute("download", f"sdxl-lab-{image[:8]}.png")
        page.get_by_role("button", name="Copy as curl").click()
        expect(page.locator("#toast")).to_have_text("Copied the command")
        command = page.evaluate("navigator.clipboard.readText()")
        subprocess.run([shutil.which("bash"), "-c", command], cwd=tmp_path, check=True, capture_output=True)
        made = (tmp_path / f"sdxl-lab-{image[:8]}.png").read_bytes()
        assert read_record(made).prompt == QUOTED
        assert np.array_equal(pixels(made), pixels(fetched(home, f"download/{image}")))


def test_images_are_listed_page_by_page_downloaded_and_deleted(home, visit):
    for seed in range(26):
        body = json.dumps({"prompt": f"image {seed}", "steps": 1, "seed": seed}).encode()
        request = urllib.request.Request(home + "generate", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
    page = visit(home).page
    tiles = page.locator(".tile")
    expect(tiles).to_have_count(24)
    page.get_by_role("button", name="Show older").click()
    expect(tiles).to_have_count(26)
    expect(tiles.nth(24)).to_be_focused()
    page.get_by_role("button", name="image 0", exact=True).click()
    image = shown(page, "image 0")
    for form in ("png", "webp", "jpeg"):
        with page.expect_download() as download:
            page.locator(f"#download-{form}").click()
        assert open_image(download.value.path()).format == form.upper()
    page.get_by_role("button", name="Delete").click()
    dialog = page.get_by_role("dialog", name="Delete this image?")
    dialog.get_by_role("button", name="Keep it").click()
    expect(dialog).to_be_hidden()
    assert fetched(home, f"download/{image}")
    page.get_by_role("button", name="Delete").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(tiles).to_have_count(25)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(home, f"download/{image}")


def test_the_keyboard_is_enough(home, live, visit):
    page = visit(home).page
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    first = shown(page)
    page.keyboard.press("Tab")
    for control in ("negative_prompt", "generate"):
        expect(page.locator(f"#{control}")).to_be_focused()
        page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # over the settings' head
    expect(page.locator("#steps")).to_be_focused()
    assert page.locator("#steps").evaluate("input => getComputedStyle(input).outlineStyle") == "solid"
    page.keyboard.press("Control+A")
    page.keyboard.type("100")
    for _ in range(40):
        if page.evaluate("document.activeElement.dataset.id") == first:
            break
        page.keyboard.press("Tab")
    expect(page.locator(f"[data-id='{first}']")).to_be_focused()
    page.keyboard.press("Enter")
    for name in ("width", "height"):
        page.locator(f"#{name}").fill("512")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#making-title")).to_have_text(re.compile("Step"))
    page.keyboard.press("Escape")
    expect(page.locator("#making")).to_be_hidden()
    wait_for(lambda: not live.jobs.active)
    assert len(json.loads(fetched(home, "images"))["images"]) == 1


def test_controls_have_names_and_progress_is_told_now_and_then(home, visit):
    page = visit(home).page
    page.evaluate("""() => {
        const news = document.querySelector("#progress-news");
        window.told = [];
        new MutationObserver(() => told.push(news.textContent)).observe(news, { childList: true });
    }""")
    draw(page, steps=30)
    told = page.evaluate("told")
    assert told[0] == "Drawing begins"
    assert told[-1] == f"The image is ready: {PROMPT}"
    assert len(told) < 10
    assert page.locator("main, header, nav").count() == 3
    snapshot = page.locator("body").aria_snapshot()
    for line in (
        "- banner:",
        "- main:",
        '- form "New image":',
        '- textbox "Prompt"',
        '- spinbutton "Steps": "30"',
        '- combobox "Scheduler"',
        '- switch "Refiner makes the last steps"',
        '- radio "Random" [checked]',
        '- region "Recent images":',
        f'- img "{PROMPT}"',
    ):
        assert line in snapshot, snapshot
    unnamed = [
        line
        for line in snapshot.splitlines()
        if re.fullmatch(r"\s*- (button|link|textbox|img|spinbutton|checkbox)\W*", line)
    ]
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_in_either_theme(home, visit, scheme):
    page = visit(home, width=360, color_scheme=scheme, reduced_motion="reduce").page
    draw(page, "w" * 300)
    page.locator("#settings").evaluate("settings => { settings.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 380) == (scheme == "dark")


def test_the_parser_takes_any_line_ends_in_any_pieces(home, visit):
    page = visit(home).page
    text = (
        ': hello\r\nevent: step\r\ndata: {"step": 1,\r\ndata: "seed": 9223372036854775807}\r\n\r\n'
        "event: done\rdata:{}\r\r"
    )
    for size in (1, 2, 7, 1000):
        events = page.evaluate(
            """async ([text, size]) => {
                const { parser } = await import(new URL('page/api.js', document.baseURI));
                const parse = parser();
                const found = [];
                for (let at = 0; at < text.length; at += size) found.push(...parse(text.slice(at, at + size)));
                return [...found, ...parse('\\n')];
            }""",
            [text, size],
        )
        assert events == [
            {"event": "step", "data": {"step": 1, "seed": "9223372036854775807"}},
            {"event": "done", "data": {}},
        ]


def test_what_is_pressed_twice_is_drawn_once(home, visit):
    page = visit(home).page
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.locator("#steps").fill("20")
    for _ in range(3):
        page.keyboard.press("Control+Enter")
    shown(page)
    expect(page.locator(".tile")).to_have_count(1)


PREFIX = "/proxy/services/main/sdxl"


def behind(app):
    """A proxy that takes its prefix off, as dstack's does: to the service the prefix is unknown."""

    async def proxy(scope, receive, send):
        if scope["type"] == "http":
            assert scope["path"].startswith(f"{PREFIX}/"), f"asked beside the prefix: {scope['path']}"
            path = scope["path"].removeprefix(PREFIX)
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await app(scope, receive, send)

    return proxy


@pytest.fixture(params=["taken off by the proxy", "told to the service"])
def prefixed(request, slot, tmp_path):
    told = request.param == "told to the service"
    prefix = {"root_path": PREFIX} if told else {}
    settings = Settings(slot=slot, store=tmp_path / "images", **prefix)
    with serving(settings, *([] if told else [behind])) as live:
        yield f"http://127.0.0.1:{live.port}{PREFIX}/"


def test_it_works_behind_a_prefix(prefixed, visit):
    page = visit(prefixed).page
    first = draw(page, steps=3)
    page.get_by_role("button", name="Refine", exact=True).click()
    page.get_by_role("form", name="Refine this image").get_by_role("button", name="Refine").click()
    expect(page.locator(".tile")).to_have_count(2)
    shown(page)
    page.locator(f"[data-id='{first}']").click()
    expect(page.locator(f"[data-id='{first}']")).to_have_attribute("aria-current", "true")
    expect(page.locator("#download-webp")).to_have_attribute("href", re.compile(f"^{prefixed}download/"))
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".tile")).to_have_count(1)


def test_the_root_without_its_slash_leads_to_the_page(slot, tmp_path, visit):
    with serving(Settings(slot=slot, store=tmp_path / "images", root_path=PREFIX)) as live:
        page = visit(f"http://127.0.0.1:{live.port}{PREFIX}").page
        assert page.url == f"http://127.0.0.1:{live.port}{PREFIX}/"


KEY = "a-key-of-many-letters"


@pytest.fixture
def locked(slot, tmp_path):
    with serving(Settings(slot=slot, store=tmp_path / "images", api_keys=(KEY,))) as live:
        yield f"http://127.0.0.1:{live.port}/"


def test_where_a_key_is_asked_for_it_is_entered_once_and_sent_in_a_header(locked, visit, tmp_path):
    page, _, expected = visit(locked, ready=False, permissions=["clipboard-read", "clipboard-write"])
    expected.append("401")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    form = page.get_by_role("form", name="This service asks for an API key")
    form.get_by_label("API key").fill("another-key-of-many-letters")
    form.get_by_role("button").click()
    form = page.get_by_role("form", name="The service does not know this API key")
    form.get_by_label("API key").fill(KEY)
    form.get_by_role("button").click()
    expect(form).to_be_hidden()
    expect(page.locator("#readiness")).to_have_text("Ready")
    image = draw(page)
    assert page.locator("#image").get_attribute("src").startswith("blob:")
    page.wait_for_function("document.querySelector('.tile img').naturalWidth > 0")
    with page.expect_download() as download:
        page.locator("#download-webp").click()
    assert open_image(download.value.path()).format == "WEBP"
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#toast")).to_have_text("Copied the command")
    command = page.evaluate("navigator.clipboard.readText()")
    assert KEY not in command
    environment = {"PATH": os.environ["PATH"], "SDXL_API_KEY": KEY}
    subprocess.run(
        [shutil.which("bash"), "-c", command], cwd=tmp_path, check=True, capture_output=True, env=environment
    )
    made = (tmp_path / f"sdxl-lab-{image[:8]}.png").read_bytes()
    assert np.array_equal(pixels(made), pixels(fetched(locked, f"download/{image}", **{"X-API-Key": KEY})))
    assert not [url for url in asked if KEY in url]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(page.locator(".tile")).to_have_count(2)  # the key is still there
    page.get_by_role("button", name="Forget key").click()
    page.get_by_role("form", name="This service asks for an API key").wait_for()
    assert page.evaluate("sessionStorage.length") == 0


def test_until_the_service_is_ready_the_page_says_why_and_asks_on(home, visit):
    page, _, expected = visit(home)
    expected.append("503")
    problem = {"title": "The service is not ready", "status": 503, "detail": "the golden images differ"}
    answer = {"status": 503, "content_type": "application/problem+json", "body": json.dumps(problem)}
    page.route("**/readyz", lambda route: route.fulfill(**answer))
    page.reload()
    expect(page.locator("#readiness")).to_have_text("Not ready")
    expect(page.get_by_text("The golden images differ")).to_be_visible()
    page.unroute("**/readyz")
    expect(page.locator("#readiness")).to_have_text("Ready")
    expect(page.get_by_text("The golden images differ")).to_be_hidden()


def test_a_image_that_comes_late_does_not_take_the_place_of_the_one_chosen_since(locked, visit):
    """What is seen is what "Delete" deletes. With a key images are fetched, and one may take longer."""
    late, other = (posted(locked, "generate", {"prompt": prompt})["id"] for prompt in ("a late ring", "a boat"))
    page, _, expected = visit(locked, ready=False)
    expected.append("401")
    held = []
    page.route(f"**/download/{late}*", lambda route: held.append(route))
    form = page.get_by_role("form", name="This service asks for an API key")
    form.get_by_label("API key").fill(KEY)
    form.get_by_role("button").click()
    page.locator(f".tile[data-id='{late}']").click()
    expect(page.locator("#image")).to_have_attribute("alt", "a late ring")
    page.locator(f".tile[data-id='{other}']").click()
    assert shown(page, "a boat") == other
    before = page.locator("#image").get_attribute("src")
    assert held
    with page.expect_response(f"**/download/{late}") as answer:
        for route in held:
            route.continue_()
    answer.value.finished()
    page.evaluate("new Promise((done) => setTimeout(done, 200))")  # time for the page to do it wrong
    page.unroute(f"**/download/{late}*")
    assert page.locator("#image").get_attribute("src") == before
    page.locator(f".tile[data-id='{late}']").click()
    assert shown(page, "a late ring") == late
    assert page.locator("#image").get_attribute("src") != before
