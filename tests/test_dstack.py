"""The dstack files, judged by dstack's own parser and by its own rules for what it uploads.

Both live under dstack._internal: pyproject.toml pins dstack, and an upgrade has to look here first.
"""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sdxl_lab.release.slot import load_slot

ROOT = Path(__file__).parents[1]
FILES = sorted(path.name for path in ROOT.glob("*.dstack.yml") if not path.name.startswith("fleet"))
LOCK = {name: "service" if name.startswith("service") else "lab" for name in FILES}
MULTIPART_OVERHEAD = 4096  # the limit is on the whole HTTP request


@pytest.fixture(scope="module")
def dstack() -> SimpleNamespace:
    from dstack._internal.core.errors import ConfigurationError
    from dstack._internal.core.models.configurations import parse_apply_configuration
    from dstack._internal.server.settings import SERVER_CODE_UPLOAD_LIMIT
    from dstack._internal.utils.files import create_file_archive

    return SimpleNamespace(
        parse=parse_apply_configuration,
        error=ConfigurationError,
        archive=create_file_archive,
        limit=SERVER_CODE_UPLOAD_LIMIT,
    )


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def fits(size: int, limit: int) -> bool:
    return size + MULTIPART_OVERHEAD <= limit


def upload(dstack: SimpleNamespace, folder: Path) -> tuple[int, dict[str, int]]:
    """The archive's bytes, and the size of each file in it by its path below `folder`."""
    buffer = io.BytesIO()
    dstack.archive(folder, buffer)
    size = buffer.tell()
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        members = {m.name.removeprefix(f"{folder.name}/"): m.size for m in archive.getmembers() if not m.isdir()}
    return size, members


def test_the_service_and_the_dev_environment_are_there():
    assert {f"{name}.dstack.yml" for name in ("dev", "service", "service.gateway", "sweep")} == set(FILES)


def test_dstack_accepts_the_fleet_and_it_is_fit_for_the_sweep(dstack):
    assert dstack.parse(read("fleet.dstack.yml")).placement.value == "cluster"


def test_the_sweep_spreads_the_readme_s_command_over_nodes(dstack):
    sweep = dstack.parse(read("sweep.dstack.yml"))
    assert sweep.nodes == 2
    assert sweep.stop_criteria.value == "master-done"
    assert sweep.commands[-1].startswith("accelerate launch --multi_gpu --num_processes=$DSTACK_GPUS_NUM ")
    assert "-m sdxl_lab sweep studies/sdxl_sweep.toml --cache /data/cells " in sweep.commands[-1]
    assert (ROOT / "studies" / "sdxl_sweep.toml").exists()
    assert [volume.path for volume in sweep.volumes if not volume.optional] == ["/data"]


def test_the_gateway_s_service_has_replicas_over_one_store(dstack):
    service = dstack.parse(read("service.gateway.dstack.yml"))
    assert service.env["SDXL_STORE"].startswith("s3://")
    assert service.scaling.metric == "rps"
    assert service.commands == dstack.parse(read("service.dstack.yml")).commands


@pytest.mark.slow
def test_the_plans_in_the_guide_are_those_of_the_real_server():
    done = subprocess.run([sys.executable, ROOT / "docs" / "plan.py"], capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / "plan.txt").read_text()


@pytest.mark.parametrize("name", FILES)
def test_dstack_accepts(dstack, name):
    dstack.parse(read(name))


def test_the_service_is_what_the_container_must_run(dstack):
    service = dstack.parse(read("service.dstack.yml"))
    *_, trap, start = service.commands
    assert trap == "trap '' HUP"
    assert start == "exec python -m service --host 127.0.0.1 --port 8000"
    assert service.port.container_port == 8000
    assert service.auth
    assert service.env["SDXL_CONFIG"] == "sdxl"
    assert [probe.url for probe in service.probes] == ["/readyz"]
    assert set(service.retry.on_events) == {"no-capacity", "interruption", "error"}
    assert service.retry.duration >= 7 * 24 * 3600


def test_the_service_is_strict_as_soon_as_its_slot_has_goldens():
    environment = read("service.dstack.yml")["env"]
    assert "SDXL_CONFIG=sdxl" in environment
    assert ("SDXL_ATTEST=warn" in environment) == (not load_slot(ROOT / "service" / "promoted" / "sdxl").goldens)


def test_the_dev_environment_forwards_jupyterlab_and_takes_its_token_from_the_caller(dstack):
    environment = dstack.parse(read("dev.dstack.yml"))
    assert [port.container_port for port in environment.ports] == [8888]
    assert "JUPYTER_TOKEN" in read("dev.dstack.yml")["env"]
    assert any("jupyter lab" in command and '"$JUPYTER_TOKEN"' in command for command in environment.init)


@pytest.mark.parametrize("name", FILES)
def test_one_nvidia_gpu_with_24_gb_is_understood(dstack, name):
    # A word that dstack cannot read, such as a size without its unit, becomes the name of a GPU nobody has.
    gpu = dstack.parse(read(name)).resources.gpu
    assert (gpu.vendor.value, gpu.name, gpu.memory.min, gpu.count.min, gpu.count.max) == ("nvidia", None, 24, 1, 1)


@pytest.mark.parametrize("name", FILES)
def test_commands_start_where_the_files_are_put_and_no_volume_lies_below(dstack, name):
    configuration = dstack.parse(read(name))
    assert [mapping.local_path for mapping in configuration.files] == ["."]
    assert configuration.working_dir == configuration.files[0].path
    assert not [v for v in configuration.volumes if Path(v.path).is_relative_to(configuration.files[0].path)]


@pytest.mark.parametrize("name", FILES)
def test_opencv_finds_its_libraries_before_the_locked_packages_are_installed(dstack, name):
    configuration = dstack.parse(read(name))
    commands = getattr(configuration, "commands", None) or configuration.init
    libraries = next(i for i, command in enumerate(commands) if "libgl1" in command)
    packages = next(
        i for i, command in enumerate(commands) if f"--require-hashes -r locks/{LOCK[name]}.lock" in command
    )
    assert libraries < packages


SCALED = {"replicas": "1..4", "scaling": {"metric": "rps", "target": 0.1, "window": "5m"}}

REFUSED = [
    ("an unknown key", "service.dstack.yml", {"gpus": 1}),
    ("an unknown key of resources", "service.dstack.yml", {"resources": {"gpus": 1}}),
    ("ports on a service", "service.dstack.yml", {"ports": [8000]}),
    ("python together with image", "service.dstack.yml", {"image": "python:3.11"}),
    ("python with a patch level", "service.dstack.yml", {"python": "3.11.7"}),
    ("a range of replicas without scaling", "service.dstack.yml", {"replicas": "1..4"}),
    ("scaling with one replica", "service.dstack.yml", SCALED | {"replicas": 1}),
    ("scaling by another metric", "service.dstack.yml", SCALED | {"scaling": SCALED["scaling"] | {"metric": "gpu"}}),
    ("scaling over another window", "service.dstack.yml", SCALED | {"scaling": SCALED["scaling"] | {"window": "2m"}}),
    ("a probe without a slash", "service.dstack.yml", {"probes": [{"type": "http", "url": "readyz"}]}),
    ("a probe that runs a command", "service.dstack.yml", {"probes": [{"type": "exec", "url": "/readyz"}]}),
    ("a GPU's memory the wrong way round", "service.dstack.yml", {"resources": {"gpu": "80GB..24GB:1"}}),
    ("a GPU of no vendor", "service.dstack.yml", {"resources": {"gpu": {"vendor": "acme"}}}),
    ("a retry on another event", "service.dstack.yml", {"retry": {"on_events": ["no_capacity"], "duration": "30d"}}),
    ("a relative volume", "service.dstack.yml", {"volumes": [{"instance_path": "hf", "path": "data/hf"}]}),
    ("a model that is no chat model", "service.dstack.yml", {"model": {"type": "image", "name": "sdxl"}}),
    ("jupyter as ide", "dev.dstack.yml", {"ide": "jupyter"}),
    ("commands of a dev environment", "dev.dstack.yml", {"commands": ["sleep 1"]}),
    ("port of a dev environment", "dev.dstack.yml", {"port": 8888}),
    ("replicas of a dev environment", "dev.dstack.yml", {"replicas": 1}),
    ("an unknown type", "dev.dstack.yml", {"type": "notebook"}),
]


@pytest.mark.parametrize(("name", "change"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_dstack_refuses(dstack, name, change):
    with pytest.raises(dstack.error):
        dstack.parse(read(name) | change)


def test_dstack_accepts_the_scaling_that_the_service_file_suggests(dstack):
    dstack.parse(read("service.dstack.yml") | SCALED)


def test_the_upload_limit_is_2_mib(dstack):
    assert dstack.limit == 2 * 1024 * 1024


def test_the_upload_fits_and_holds_what_a_gpu_needs(dstack):
    size, members = upload(dstack, ROOT)
    largest = sorted(members.items(), key=lambda item: -item[1])[:10]
    assert fits(size, dstack.limit), f"{size} bytes; exclude in .dstackignore what a GPU does not need of {largest}"
    assert {"locks/service.lock", "locks/lab.lock"} <= members.keys()
    for folder in ("sdxl_lab", "service"):
        here = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert here <= members.keys()
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("service/promoted/sdxl/*.*")} <= members.keys()
    at_home = ("sdxl_lab/nano/base", "sdxl_lab/nano/refiner", "sdxl_lab/nano/clip", "tests", "runs", ".git", ".venv")
    assert not [member for member in members if member.startswith(tuple(f"{folder}/" for folder in at_home))]


@pytest.fixture
def tree_with_weights(tmp_path):
    """A tree as heavy as ours: code, three megabytes of weights, a golden image, a virtual environment."""
    tree = tmp_path / "workflow"
    for name, size in {
        "locks/service.lock": 100,
        "service/app.py": 100,
        "service/promoted/sdxl/config.toml": 100,
        "service/promoted/nano/golden/cat.png": 100,
        "sdxl_lab/config.py": 100,
        "recipes/nano/train.py": 100,
        "sdxl_lab/nano/base/model_index.json": 100,
        "sdxl_lab/nano/base/unet/diffusion_pytorch_model.fp16.safetensors": 3 * 1024 * 1024,
        ".venv/bin/python": 100,
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(bytes(size))
    for name in (".gitignore", ".dstackignore"):
        shutil.copy(ROOT / name, tree)
    return tree


def test_the_ignore_files_leave_code_and_promotions_only(dstack, tree_with_weights):
    size, members = upload(dstack, tree_with_weights)
    assert fits(size, dstack.limit)
    assert members.keys() == {
        ".dstackignore",
        ".gitignore",
        "locks/service.lock",
        "sdxl_lab/config.py",
        "service/app.py",
        "service/promoted/sdxl/config.toml",
    }


def test_an_upload_with_the_weights_is_over_the_limit(dstack, tree_with_weights):
    (tree_with_weights / ".dstackignore").unlink()
    size, members = upload(dstack, tree_with_weights)
    assert "sdxl_lab/nano/base/unet/diffusion_pytorch_model.fp16.safetensors" in members
    assert not fits(size, dstack.limit)
