"""Draw docs/playground.png again: `.venv/bin/python docs/screenshot.py`, a minute on two cores, with Chromium.

The images in it are nano's, drawn through the page. The page's font is Inter where it is installed.
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
PROMPTS = [
    "a red circle left of a blue star on a yellow background",
    "a large green tree on a cyan background",
    "an orange fish on a blue background",
    "a yellow house on a green background",
    "A cat in a hat",
]


def main() -> None:
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as store:
        service = subprocess.Popen(
            [sys.executable, "-m", "service", "--port", "0"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "SDXL_STORE": store, "SDXL_LOG_LEVEL": "error"},
        )  # fmt: skip
        try:
            assert service.stdout is not None
            address = service.stdout.readline().split()[1]
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"]
                )
                page = browser.new_page(viewport={"width": 1280, "height": 820}, base_url=f"{address}/")
                page.set_default_timeout(600_000)
                page.goto("")
                page.locator("#readiness[data-state=ready]").wait_for()
                image = draw_all(page)
                browser.close()
        finally:
            service.terminate()
            service.wait(60)
    Image.open(io.BytesIO(image)).convert("RGB").save(ROOT / "docs" / "playground.png", optimize=True)


def draw_all(page: Page) -> bytes:
    """The gallery through the API, all at once; the last image through the page, with one setting changed."""
    *others, last = PROMPTS
    for seed, prompt in enumerate(others, 3):
        page.request.post("generate", data={"prompt": prompt, "seed": seed}, headers={"Prefer": "respond-async"})
    while len(page.request.get("images").json()["images"]) < len(others):
        page.wait_for_timeout(1000)
    page.locator("#refresh").click()
    page.locator("#prompt").fill(last)
    page.locator("#steps").fill("20")
    page.locator("label", has_text="Fixed").click()
    page.locator("#seed").fill("3")
    page.locator("#generate").click()
    page.locator(f"#image[alt='{last}']").wait_for()
    page.mouse.click(1, 1)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1000)
    return page.screenshot()


if __name__ == "__main__":
    main()
