"""Chromium, and pages whose console must stay free of errors."""

import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.service.conftest import Live, live, promoted, slot  # their fixtures serve here too

__all__ = ["Live", "live", "promoted", "slot"]
BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_MS = 20_000
QUIET = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Visit(NamedTuple):
    page: Page
    context: BrowserContext
    expected: list[str]  # what the console may say: parts of its messages


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Ends with its module: while it lives, this thread cannot run another event loop."""
    if BINARY is None:
        pytest.fail("Chromium is missing: on Debian, `apt-get install chromium`")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BINARY, args=["--no-sandbox", *QUIET])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Open the playground and wait until the service is ready; in the end no error may stand in the console."""
    contexts, visits, errors = [], [], []

    def note(text: str) -> None:
        errors.append(text)

    def start(address: str, *, ready: bool = True, width: int = 1280, **options: object) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", lambda message: note(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: note(str(error)))
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
