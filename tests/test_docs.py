"""The documentation is executed: commands, snippets, links, generated parts, and the map of the tree."""

import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from sdxl_lab.images import open_image
from sdxl_lab.release.slot import load_slot

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / name).read_text()
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{page}.md" for page in ("research", "client", "operate", "deploy", "architecture")),
    )
}
# A block "sh" is of commands that succeed, a block "sh refused" of those that must fail with a reason.
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"```([\w ]+)\n(.*?)```", page, re.S)]
READ = PAGES | {"bench/README.md": (ROOT / "bench" / "README.md").read_text()}  # whose commands are measurements
COMMANDS = [line for language, block in BLOCKS if language.startswith("sh") for line in block.strip().splitlines()]
REFUSED = [line for language, block in BLOCKS if language == "sh refused" for line in block.strip().splitlines()]
SNIPPETS = [block for language, block in BLOCKS if language == "python"]
PORT = "127.0.0.1:8000"
SERVED = [snippet for snippet in SNIPPETS if PORT in snippet]  # they ask the service

# Who executes what this file does not.
ELSEWHERE = {
    "make demo": "test_demo.py",
    "make lab": "test_lab.py",
    "make serve": "the fixture `served`",
    "make check": ".ci/run",
    "make test": ".ci/run",
    "make test-fast": "a part of make test",
    "make notebooks": "notebooks/, one by one, through sdxl_lab/notebook/runner.py",
    "make bench": "test_bench.py",
    "make train": "recipes/test_recipe.py, with --tiny",
    "accelerate launch --multi_gpu --num_processes 2 -m sdxl_lab sweep studies/first_sweep.toml": (
        "lab/research/test_sweep.py, on the random model"
    ),
    **{
        f"dstack apply -f {path.name}": "test_dstack.py, dstack's parser and server: applying takes a GPU"
        for path in ROOT.glob("*.dstack.yml")
    },
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The tree as a user has it: clean, since `promote` asks for that, with `.venv/bin/python` this interpreter."""
    ours = ["ls-files", "--cached", "--others", "--exclude-standard"]
    for name in git(ROOT, *ours).splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "-c", "user.name=docs", "-c", "user.email=docs@localhost", "commit", "--quiet", "--message", "copy")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_every_command_is_executed_somewhere() -> None:
    ours = [line for line in COMMANDS if line.startswith((".venv/bin/python -m ", "curl ", "cp "))]
    assert sorted(set(COMMANDS) - set(ours)) == sorted(ELSEWHERE)


def test_every_page_is_looked_after() -> None:
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {Path(name).name for name in PAGES if "/" in name}


@pytest.mark.parametrize("name", READ)
def test_what_the_code_knows_better_is_what_the_code_says(name: str) -> None:
    from docs.generated import renewed

    assert renewed(READ[name]) == READ[name], "run: python -m docs.generated"


@pytest.mark.parametrize("name", READ)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", READ[name]):
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], link


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    assert {line.removeprefix("make ") for line in COMMANDS if line.startswith("make ")} <= targets


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some twenty commands, most of which load torch
def test_the_command_lines_run_in_order(clone: Path) -> None:
    """The README's first promotion is refused by its gates, and the second passes them."""
    commands = [line for line in COMMANDS if line.startswith((".venv/bin/python", "cp "))]
    for line in commands:
        done = subprocess.run(shlex.split(line), cwd=clone, capture_output=True, text=True, check=False)
        if line in REFUSED:
            assert (done.returncode, "failed: clip_score: at most 1 worse" in done.stderr) == (1, True), done.stderr
        else:
            assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert REFUSED
    images = {"cat.png", "house.png", "again.png", "eight.png", "neon.png", "weighted.png"}
    folders = {"cache", "sweeps", "studies", "first", ".replaced"}
    assert {path.name for path in (clone / "runs").iterdir()} == images | folders
    assert load_slot(clone / "runs" / "first").config.steps == 8


@pytest.mark.slow
def test_the_python_snippets_run(clone: Path) -> None:
    for snippet in set(SNIPPETS) - set(SERVED):
        subprocess.run([sys.executable, "-c", snippet], cwd=clone, check=True)
    assert (clone / "runs" / "boat.png").exists()


@pytest.mark.slow
def test_what_asks_the_service_is_answered(clone: Path) -> None:
    """`make serve` itself, on a free port."""
    import json
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # make's set-up is CI's own; here only the recipe's last line counts.
    recipe = subprocess.run(
        ["make", "-s", "-n", "-o", ".venv/.installed", "-o", "system", "serve", f"PORT={port}"],
        cwd=clone, capture_output=True, text=True, check=True,
    ).stdout.strip().splitlines()[-1]  # fmt: skip
    server = subprocess.Popen(shlex.split(recipe), cwd=clone)
    try:
        for _ in range(2000):  # it is attested first
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                assert server.poll() is None, "the service ended"
            time.sleep(0.1)
        for line in COMMANDS:
            if line.startswith("curl "):
                command = [*shlex.split(line.replace(PORT, f"127.0.0.1:{port}")), "--fail", "--silent"]
                done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True)
                if "-o" in command:
                    assert open_image(clone / command[command.index("-o") + 1]).size == (256, 256)
                elif "-N" in command:
                    assert "event: done" in done.stdout
                else:
                    assert json.loads(done.stdout)
        for snippet in SERVED:
            command = [sys.executable, "-c", snippet.replace(PORT, f"127.0.0.1:{port}")]
            done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=True)
            assert done.stdout.split()[::2] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
            assert open_image(clone / "runs" / "openai-1.png").size == (256, 256)
    finally:
        server.terminate()
        assert server.wait(60) == 0


def test_the_map_is_the_tree() -> None:
    """Each line of the map names something that exists, and every room is on it."""
    tree = README.split("## Map\n\n```text\n")[1].split("```")[0]
    folder = Path()
    named = set()
    for line in tree.strip().splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            path = folder / name
        else:
            folder = path = Path(name)
        assert (ROOT / path).exists(), f"the README's map names {path}"
        named.add(path)
    rooms = [*(ROOT / "sdxl_lab").iterdir(), *(ROOT / "service").iterdir()]
    modules = {p.relative_to(ROOT) for p in rooms if (p.suffix == ".py" or p.is_dir()) and not p.name.startswith("__")}
    modules = {p for p in modules if p.suffix != ".py" or p.parts[0] == "sdxl_lab"}
    notebooks = {p.relative_to(ROOT) for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert modules | notebooks <= named
