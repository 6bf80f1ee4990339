"""What `pip install` leaves: the packages with their data, the command, the public names, and no package too few."""

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import sdxl_lab

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DATA = (
    "sdxl_lab/__init__.pyi",
    "sdxl_lab/nano/base/model_index.json",
    "sdxl_lab/nano/base/unet/diffusion_pytorch_model.fp16.safetensors",
    "sdxl_lab/nano/loras/neon.safetensors",
    "service/page/index.html",
    "service/promoted/nano/config.toml",
    "service/promoted/nano/evidence.json",
)


def normal(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=]", name)[0]).lower()


def locked(name: str) -> set[str]:
    return set(re.findall(r"^([\w.-]+)==", (ROOT / "locks" / f"{name}.lock").read_text(), re.M))


def imported(package: str) -> dict[str, Path]:
    """The top-level modules that a package's files import, wherever in the file, each with one such file."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.partition(".")[0]: path for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names}


@pytest.mark.parametrize(("package", "extra"), [("sdxl_lab", "lab"), ("service", "service")])
def test_every_import_is_declared(package, extra):
    declared = {normal(each) for each in PROJECT["dependencies"] + EXTRAS[extra]} | {"pydantic-core"}  # pydantic's pin
    owners = packages_distributions()
    for module, path in imported(package).items():
        if module not in ("sdxl_lab", "service"):
            assert declared & set(map(normal, owners[module])), f"{path} imports {module}: add it to pyproject.toml"


@pytest.mark.parametrize("pin", PROJECT["dependencies"] + [pin for pins in EXTRAS.values() for pin in pins])
def test_every_dependency_is_pinned(pin):
    assert re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", pin)


# --- public names ----------------------------------------------------------------------------------------------------


def test_the_public_names_come_from_their_modules():
    from sdxl_lab import Engine, load_slot
    from sdxl_lab.diffusion import engine
    from sdxl_lab.release import slot

    assert Engine is engine.Engine
    assert load_slot is slot.load_slot
    assert {"Explorer", "GenerationConfig", "ImageRequest", "Job", "promote"} <= {*dir(sdxl_lab)}
    for name in sdxl_lab.__all__:
        assert getattr(sdxl_lab, name) is not None


def test_a_configuration_and_a_job_come_without_torch():
    program = "import sys; from sdxl_lab import GenerationConfig, ImageRequest, Job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_a_name_that_is_not_public_is_refused():
    with pytest.raises(ImportError, match="Enigne"):
        from sdxl_lab import Enigne  # noqa: F401


@pytest.mark.parametrize("package", ["sdxl_lab", "service"])
def test_our_own_modules_take_no_name_from_the_top(package):
    """The top imports every room: a room that imports it back makes a circle."""
    for path in (ROOT / package).rglob("*.py"):
        assert not re.search(r"^\s*from sdxl_lab import ", path.read_text(), re.M), path


# --- installed -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a command in an environment that has our dependencies, and us by what `install` is given."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    # The packages of this environment, pip and hatchling among them, but not what was made editable here.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*command):
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(elsewhere), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [folder / "bin" / command[0], *command[1:]], cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.install = lambda *what: run(
        *("python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"), *what
    )
    return run


USE = """
from sdxl_lab import GenerationConfig, load_slot
from service.settings import PROMOTED
import sdxl_lab, service.app
print(sdxl_lab.__file__)
assert load_slot(PROMOTED / "nano").goldens
assert service.app.create_app()
"""


@pytest.mark.slow
def test_an_editable_install_is_the_tree(installed):
    installed.install("--editable", str(ROOT))
    assert installed("sdxl-lab", "--version").strip() == sdxl_lab.__version__
    assert installed("sdxl-lab", "--help").startswith("usage: sdxl-lab ")
    assert installed("python", "-m", "sdxl_lab", "--help").startswith("usage: python -m sdxl_lab ")
    assert installed("python", "-c", USE).strip() == str(ROOT / "sdxl_lab" / "__init__.py")


@pytest.mark.slow
def test_a_wheel_holds_all_that_is_needed(installed, tmp_path):
    program = (
        f"import os; os.chdir({str(ROOT)!r}); from hatchling.build import build_wheel; build_wheel({str(tmp_path)!r})"
    )
    installed("python", "-c", program)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names.issuperset(DATA)
    assert {name.split("/")[0] for name in names} == {
        "sdxl_lab",
        "service",
        f"sdxl_lab-{sdxl_lab.__version__}.dist-info",
    }
    installed.install("--force-reinstall", str(wheel))
    assert "site-packages" in installed("python", "-c", USE)


# --- locks -----------------------------------------------------------------------------------------------------------

# As where only a lock was installed: modules and metadata of all other packages are not to be found.
ONLY = """
import re, sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
owners, present = packages_distributions(), set(sys.argv[1].split())
locked = lambda name: re.sub("[-_.]+", "-", name).lower() in present
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        names = owners.get(name.partition(".")[0])
        return None if names and not any(map(locked, names)) else PathFinder.find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, *context):
        return (found for found in PathFinder.find_distributions(*context) if locked(found.name))
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""
SERVE = """
import service.__main__, service.server.process
from service.app import create_app
from service.settings import Settings
from sdxl_lab import Engine, GenerationConfig, ImageRequest
create_app(Settings()).openapi()
config = GenerationConfig(steps=2, width=128, height=128)
with Engine.load(config) as engine:
    print(engine.draw(ImageRequest(config, "a cat", 7)).image.size)
assert not {"pandas", "optuna", "papermill", "matplotlib", "ipywidgets", "jupyterlab"} & sys.modules.keys()
"""
RESEARCH = """
import importlib, pkgutil
import sdxl_lab, jupyterlab, papermill, nbformat, pyarrow
for found in pkgutil.walk_packages(sdxl_lab.__path__, "sdxl_lab."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
"""


def only(lock: str, program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", ONLY + program, " ".join(locked(lock))]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("lock", "program"), [("service", SERVE), ("lab", RESEARCH), ("lab", SERVE)])
def test_a_lock_is_enough(lock, program):
    done = only(lock, program)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_service_s_lock_is_not_enough_for_research_and_the_command_says_what_to_install():
    done = only("service", "from sdxl_lab.cli import main; sys.exit(main(['sweep', 'studies/first_sweep.toml']))")
    assert done.returncode == 1
    assert done.stderr == "error: pandas is missing; the lab's packages bring it: pip install -e .[lab]\n"


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "locks" / f"{name}.lock").read_text(), re.M))


def test_the_service_s_lock_is_a_small_part_of_the_lab_s():
    assert pins("service").items() < pins("lab").items(), "the same versions of what both have"
    assert len(pins("service")) < 100
    notebooks = {"jupyterlab", "ipywidgets", "ipykernel", "papermill", "pandas", "pyarrow", "optuna", "matplotlib"}
    assert not notebooks & locked("service")
    assert notebooks <= locked("lab")


@pytest.mark.parametrize(("lock", "extras"), [("service", ["service"]), ("lab", ["service", "lab"])])
def test_a_lock_has_what_is_pinned_each_package_with_its_hash(lock, extras):
    text = (ROOT / "locks" / f"{lock}.lock").read_text()
    found = re.findall(r"^([\w.-]+==\S+) \\\n(    --hash=sha256:)?", text, re.M)
    assert all(hashed for _, hashed in found)
    assert len(found) == len(locked(lock))
    declared = set(PROJECT["dependencies"]).union(*(EXTRAS[extra] for extra in extras))
    assert declared <= {pin for pin, _ in found}, "run: make lock"
