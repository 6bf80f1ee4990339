"""Imports point one way. The contracts themselves stand in pyproject.toml, under tool.importlinter."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "fastapi", "ipywidgets")


def lint(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(LINT, cwd=folder, capture_output=True, text=True)


def test_imports_point_one_way():
    answer = lint(ROOT)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.fixture
def tree(tmp_path):
    """The modules of our tree without their contents: a blank ground for one forbidden import."""
    for package in ("sdxl_lab", "service", "recipes"):
        for source in (ROOT / package).rglob("*.py"):
            target = tmp_path / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_modules_without_imports_keep_every_contract(tree):
    answer = lint(tree)
    assert answer.returncode == 0, answer.stdout + answer.stderr


FORBIDDEN = [
    ("sdxl_lab/config.py", "import service"),
    ("sdxl_lab/diffusion/engine.py", "import notebooks"),
    ("sdxl_lab/config.py", "from sdxl_lab.diffusion import schedulers"),
    ("sdxl_lab/diffusion/models.py", "from sdxl_lab.evaluation import metrics"),
    ("sdxl_lab/config.py", "import torch"),
    ("sdxl_lab/job.py", "import diffusers"),
    ("sdxl_lab/job.py", "import sdxl_lab.release.slot"),
    ("sdxl_lab/utils.py", ""),
    ("service/__init__.py", "from sdxl_lab import cli"),
    ("service/__init__.py", "import sdxl_lab.evaluation.metrics"),
    ("service/__init__.py", "import bench"),
    ("service/jobs/registry.py", "import service.api.problems"),
    ("service/jobs/leases.py", "import service.server.logging"),
    ("service/deployment.py", "from service.api import schemas"),
    ("service/api/images.py", "import service.server.middleware"),
    ("service/jobs/registry.py", "import service.jobs.manager"),
    ("sdxl_lab/cli.py", "import recipes.nano"),
]


@pytest.mark.parametrize(("module", "line"), FORBIDDEN, ids=[f"{module}: {line}" for module, line in FORBIDDEN])
def test_a_forbidden_import_is_noticed(tree, module, line):
    (tree / module).write_text(line + "\n")
    answer = lint(tree)
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert "BROKEN" in answer.stdout or "not listed as layers" in answer.stdout


@pytest.mark.parametrize("module", ["sdxl_lab", "sdxl_lab.config", "sdxl_lab.errors", "sdxl_lab.job"])
def test_a_configuration_and_a_job_are_had_without_the_models_libraries(module):
    program = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == []
