"""The explore notebook in a real JupyterLab in a real Chromium, as a person uses it.

`SDXL_SCREENSHOT=docs/explore.png pytest tests/browser/test_jupyterlab.py -k looks` draws the README's image again.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image, ImageOps
from playwright.sync_api import Locator, Page, expect

from sdxl_lab.config import GenerationConfig

ROOT = Path(__file__).parents[2]
SCREENSHOT = os.environ.get("SDXL_SCREENSHOT")
TOKEN = "only-for-this-test"
# Running until the test lets it go: what a long cell is to the panel.
BUSY = """
import time
while not Path(release).exists():
    time.sleep(0.05)
"""

pytestmark = pytest.mark.slow


class Lab:
    """A JupyterLab of its own: port, token, home, settings. `folder` is what it serves."""

    def __init__(self, home: Path) -> None:
        self.folder, self._runtime, self._log = home / "work", home / "runtime", home / "log"
        self.folder.mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
        environment |= {"HOME": str(home), "JUPYTER_RUNTIME_DIR": str(self._runtime), "PYTHONPATH": str(ROOT)}
        environment["OMP_NUM_THREADS"] = "1"  # the browser needs a core too
        command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={self.folder}", "--allow-root"]
        command += ["--no-browser", "--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={TOKEN}"]
        command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
        settings = home / ".jupyter" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
        with self._log.open("w") as log:
            self.server = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        self.address = self._wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.server.poll() is None:
            for file in self._runtime.glob("jpserver-*.json"):
                try:
                    address: str = json.loads(file.read_text())["url"]
                    urllib.request.urlopen(f"{address}api?token={TOKEN}", timeout=5).close()
                except (OSError, ValueError):
                    continue
                return address
            time.sleep(0.1)
        self.close()
        raise AssertionError(f"JupyterLab did not start:\n{self._log.read_text()}")

    def close(self) -> None:
        self.server.send_signal(signal.SIGTERM)
        try:
            self.server.wait(15)
        except subprocess.TimeoutExpired:  # how Jupyter ends is not what is tested here
            self.server.kill()
            self.server.wait()

    def write(self, name: str, *more: str, **parameters: object) -> None:
        """A copy of the explore notebook with `parameters` set as papermill does, and `more` cells at its end."""
        notebook = load_notebook_node(str(ROOT / "notebooks" / "01_explore.ipynb"))
        notebook = parameterize_notebook(notebook, parameters)
        notebook.cells += [nbformat.v4.new_code_cell(source.strip()) for source in more]
        nbformat.write(notebook, self.folder / name)

    def open(self, page: Page, name: str) -> Locator:
        """Open a notebook, run all its cells; its panel."""
        page.goto(f"{self.address}lab/tree/{name}?token={TOKEN}&reset")
        expect(page.get_by_role("button", name="Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        panel = page.locator(".sdxl-explore")
        expect(panel).to_be_visible(timeout=60_000)
        return panel


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


def done(panel: Locator, number: int, seconds: float = 60) -> bytes:
    """Wait until an image is on the panel; its pixels as the browser shows them."""
    expect(panel).to_contain_text(f"#{number}: ", timeout=1000 * seconds)
    return panel.locator(".sdxl-image img").first.screenshot()


def button(panel: Locator, name: str) -> Locator:
    return panel.get_by_role("button", name=name, exact=True)


def seconds_to_stop(panel: Locator) -> float:
    """Start an image of 800 steps, stop it once it is under way; until the panel says so."""
    panel.get_by_label("Steps", exact=True).fill("800")
    button(panel, "Generate").click()
    expect(panel).to_contain_text("of 800", timeout=60_000)
    began = time.monotonic()
    button(panel, "Stop").click()
    expect(panel).to_contain_text("Stopped", timeout=60_000)
    took = time.monotonic() - began
    panel.get_by_label("Steps", exact=True).fill("4")
    return took


def test_the_panel_works_while_a_cell_runs_and_after(
    lab: Lab, page: Page, tiny_config: GenerationConfig, record_testsuite_property: Callable[[str, object], None]
) -> None:
    (lab.folder / "tiny.toml").write_text(tiny_config.to_toml())
    release = lab.folder / "release"
    lab.write("tiny.ipynb", BUSY, config="tiny.toml", steps=4, out="images", release=str(release))
    panel = lab.open(page, "tiny.ipynb")
    running = page.locator(".jp-InputPrompt", has_text="[*]")  # the status bar says Idle whenever a subshell is
    before = done(panel, 6)  # of all the cells that drew
    expect(running).to_have_count(1, timeout=60_000)

    panel.get_by_label("Scheduler", exact=True).select_option("ddim")
    button(panel, "Generate").click()
    during = done(panel, 7)
    assert during != before, "the scheduler changes the image"
    expect(panel).to_contain_text("ddim, 4 steps")
    panel.get_by_label("Guidance scale", exact=True).fill("200")
    panel.get_by_label("Guidance scale", exact=True).press("Enter")
    expect(panel).to_contain_text("guidance_scale must be a number from 0 to 100; received 200")
    panel.get_by_label("Guidance scale", exact=True).fill("5")
    took = seconds_to_stop(panel)
    record_testsuite_property("seconds to stop while a cell runs", took)
    expect(running).to_have_count(1)
    release.touch()
    expect(running).to_have_count(0, timeout=60_000)

    button(panel, "Generate").click()
    assert done(panel, 9) == during, "the same settings and seed, the same image"
    took_idle = seconds_to_stop(panel)
    record_testsuite_property("seconds to stop in an idle kernel", took_idle)
    button(panel, "Save as candidate").click()
    expect(panel).to_contain_text("candidate.toml")
    saved = GenerationConfig.from_toml(lab.folder / "images" / "candidate.toml")
    assert saved == tiny_config.with_(scheduler="ddim")


def test_it_looks_as_the_readme_shows(lab: Lab, page: Page, tmp_path: Path) -> None:
    """HistoryEntry by nano; no label is cut, nothing sticks out, in the light and in the dark theme."""
    steps = 25 if SCREENSHOT else 6
    lab.write("nano.ipynb", steps=steps, seed=6, schedulers=["euler_a"], out="images")
    page.set_viewport_size({"width": 1440, "height": 1560})
    panel = lab.open(page, "nano.ipynb")
    done(panel, 3, seconds=180)
    expect(panel.get_by_text("Difference: largest")).to_be_visible(timeout=60_000)
    panel.get_by_label("Refiner", exact=True).check()
    page.keyboard.press("Control+b")  # the file browser, out of the way
    panel.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    panel.screenshot(path=tmp_path / "light.png")
    if SCREENSHOT:
        framed = ImageOps.expand(Image.open(tmp_path / "light.png").convert("RGB"), 12, "white")
        ImageOps.posterize(framed, 7).save(SCREENSHOT, optimize=True)  # nobody sees the last bit; files do
    assert panel.evaluate(CUT) == []
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.get_by_text("Theme", exact=True).hover()
    page.get_by_text("JupyterLab Dark", exact=True).click()
    expect(page.locator("body[data-jp-theme-light=false]")).to_be_attached(timeout=30_000)
    assert panel.evaluate(CUT) == []
    assert panel.evaluate(COLOURS) == "light on dark"
    panel.screenshot(path=tmp_path / "dark.png")


# Labels and buttons whose text needs more room than they have, and what reaches beyond the panel's right edge.
CUT = """panel => {
  const right = panel.getBoundingClientRect().right + 1
  const cut = [...panel.querySelectorAll('label, button')].filter(e => e.scrollWidth > e.clientWidth + 1)
  const out = [...panel.querySelectorAll('.sdxl-field')].filter(e => e.getBoundingClientRect().right > right)
  return [...cut, ...out].map(e => e.innerText)
}"""

# Whether text and controls have taken the theme's colours.
COLOURS = """panel => {
  const light = (e, what) => getComputedStyle(e)[what].match(/[0-9.]+/g).slice(0, 3).every(part => part > 128)
  const texts = [...panel.querySelectorAll('p, label, input')].every(e => light(e, 'color'))
  const grounds = [...panel.querySelectorAll('input, select, textarea')].some(e => light(e, 'backgroundColor'))
  return texts && !grounds ? 'light on dark' : 'unreadable'
}"""
