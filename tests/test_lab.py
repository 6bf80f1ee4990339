"""`make lab`: JupyterLab comes up on the notebooks."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_jupyterlab_starts_on_the_notebooks(tmp_path: Path) -> None:
    recipe = (ROOT / "Makefile").read_text()
    line = next(line for line in recipe.splitlines() if "jupyterlab" in line)
    assert "notebooks/01_explore.ipynb" in line
    command = [sys.executable, "-m", "jupyterlab", "--ServerApp.root_dir=.", "--allow-root", "--no-browser", "--port=0"]
    environment = os.environ | {"JUPYTER_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        names: list[str] = []
        while not names:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
            for file in tmp_path.glob("jpserver-*.json"):
                with suppress(OSError, ValueError):  # it does not listen yet, or is still writing
                    running = json.loads(file.read_text())
                    address = f"{running['url']}api/contents/notebooks?token={running['token']}"
                    with urllib.request.urlopen(address, timeout=60) as answer:
                        names = [item["name"] for item in json.load(answer)["content"]]
        assert "01_explore.ipynb" in names
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:  # how Jupyter ends is not what is tested here
            server.kill()
            server.wait()
