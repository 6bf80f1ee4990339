import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import PROMOTED, TABLE, Settings, SettingsError, strangers

GOOD = [
    ({}, Settings()),
    ({"PATH": "/bin", "SDXLX": "?"}, Settings()),
    ({"SDXL_CONFIG": "sdxl"}, Settings(slot=PROMOTED / "sdxl")),
    ({"SDXL_CONFIG": "./mine"}, Settings(slot=Path("mine"))),
    ({"SDXL_STORE": "/tmp/images"}, Settings(store=Path("/tmp/images"))),
    (
        {"SDXL_STORE": "s3://bucket/prefix", "SDXL_RETENTION": "7d"},
        Settings(store="s3://bucket/prefix", retention=604800),
    ),
    ({"SDXL_STORE": "memory://", "SDXL_RETENTION": "90s"}, Settings(store="memory://", retention=90)),
    ({"SDXL_MAX_QUEUE": "3", "SDXL_MAX_ROWS": "8"}, Settings(max_queue=3, max_rows=8)),
    ({"SDXL_DEVICE": "cuda:1", "SDXL_DTYPE": "bfloat16"}, Settings(device="cuda:1", dtype="bfloat16")),
    ({"SDXL_COMPILE": "true"}, Settings(compile=True)),
    ({"SDXL_STORAGE": "float8", "SDXL_TILE_ABOVE": "1536"}, Settings(storage="float8", tile_above=1536)),
    ({"SDXL_PREVIEW_DECODER": "models/taesdxl"}, Settings(preview_decoder="models/taesdxl")),
    ({"SDXL_ATTEST": "warn"}, Settings(attest="warn")),
    (
        {"SDXL_API_KEYS": "k" * 16 + ",another-key-of-some-length"},
        Settings(api_keys=("k" * 16, "another-key-of-some-length")),
    ),
    ({"SDXL_ROOT_PATH": "/proxy/services/main/sdxl"}, Settings(root_path="/proxy/services/main/sdxl")),
    (
        {"SDXL_CORS_ORIGINS": "https://shop.example,http://localhost:5173,http://[::1]:80"},
        Settings(cors_origins=("https://shop.example", "http://localhost:5173", "http://[::1]:80")),
    ),
    ({"SDXL_CORS_ORIGINS": "*"}, Settings(cors_origins=("*",))),
    ({"SDXL_WATCHDOG": "60"}, Settings(watchdog=60)),
    ({"SDXL_LOG_LEVEL": "debug"}, Settings(log_level="debug")),
    ({"SDXL_STEPS": "25", "SDXL_": "", "SDXL_SCREENSHOT": "x.png"}, Settings()),
]


@pytest.mark.parametrize(("environment", "settings"), GOOD, ids=[str(list(given)) for given, _ in GOOD])
def test_the_environment_becomes_settings(environment, settings):
    assert Settings.from_mapping(environment) == settings


BAD = [
    ("SDXL_CONFIG", ""),
    ("SDXL_STORE", ""),
    ("SDXL_STORE", "ftp://host/folder"),
    ("SDXL_STORE", "s3://"),
    ("SDXL_RETENTION", "7"),
    ("SDXL_RETENTION", "0d"),
    ("SDXL_RETENTION", "-1d"),
    ("SDXL_RETENTION", "week"),
    ("SDXL_RETENTION", "9999999d"),
    ("SDXL_MAX_QUEUE", "0"),
    ("SDXL_MAX_QUEUE", "many"),
    ("SDXL_MAX_QUEUE", "²"),
    ("SDXL_MAX_ROWS", "-1"),
    ("SDXL_MAX_ROWS", "9" * 5000),
    ("SDXL_DEVICE", "toaster"),
    ("SDXL_DTYPE", "float8"),
    ("SDXL_COMPILE", "yes"),
    ("SDXL_STORAGE", "int4"),
    ("SDXL_TILE_ABOVE", "8"),
    ("SDXL_PREVIEW_DECODER", ""),
    ("SDXL_ATTEST", "on"),
    ("SDXL_ROOT_PATH", ""),
    ("SDXL_ROOT_PATH", "sdxl"),
    ("SDXL_ROOT_PATH", "/sdxl/"),
    ("SDXL_ROOT_PATH", "https://shop.example/sdxl"),
    ("SDXL_CORS_ORIGINS", ""),
    ("SDXL_CORS_ORIGINS", "shop.example"),
    ("SDXL_CORS_ORIGINS", "https://shop.example/"),
    ("SDXL_CORS_ORIGINS", "https://shop.example, http://localhost"),
    ("SDXL_WATCHDOG", "0"),
    ("SDXL_LOG_LEVEL", "LOUD"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_setting_is_refused_and_the_valid_ones_listed(name, value):
    with pytest.raises(SettingsError) as caught:
        Settings.from_mapping({name: value})
    assert name in str(caught.value)
    for known in TABLE:
        assert known in str(caught.value)


# What Kubernetes puts into every container beside a Service called `sdxl`, and one called `sdxl-store`.
INJECTED = {
    "SDXL_SERVICE_HOST": "10.0.0.11",
    "SDXL_SERVICE_PORT": "8000",
    "SDXL_SERVICE_PORT_HTTP": "8000",
    "SDXL_PORT": "tcp://10.0.0.11:8000",
    "SDXL_PORT_8000_TCP": "tcp://10.0.0.11:8000",
    "SDXL_PORT_8000_TCP_PROTO": "tcp",
    "SDXL_PORT_8000_TCP_PORT": "8000",
    "SDXL_PORT_8000_TCP_ADDR": "10.0.0.11",
    "SDXL_STORE_SERVICE_HOST": "10.0.0.12",
    "SDXL_STORE_PORT": "tcp://10.0.0.12:9000",
    "SDXL_CORS_ORIGINS_PORT": "tcp://10.0.0.13:9000",
}


def test_names_that_an_orchestrator_injects_are_left_alone():
    assert Settings.from_mapping(INJECTED | {"SDXL_MAX_QUEUE": "3"}) == Settings(max_queue=3)
    assert strangers(INJECTED | {"SDXL_MAX_QUEUE": "3", "PATH": "/bin"}) == sorted(INJECTED)


MISTYPED = [
    ("SDXL_API_KEY", "SDXL_API_KEYS"),
    ("SDXL_KEYS", "SDXL_API_KEYS"),
    ("SDXL_STROE", "SDXL_STORE"),
    ("SDXL_CONFIGS", "SDXL_CONFIG"),
    ("SDXL_LOGLEVEL", "SDXL_LOG_LEVEL"),
    ("SDXL_CORS_ORIGIN", "SDXL_CORS_ORIGINS"),
    ("SDXL_ATEST", "SDXL_ATTEST"),
]


@pytest.mark.parametrize(("name", "meant"), MISTYPED)
def test_a_mistyped_name_is_refused_with_the_one_that_was_meant(name, meant):
    with pytest.raises(SettingsError, match=f"^{name} is no setting; did you mean {meant}\\?") as caught:
        Settings.from_mapping({name: "a-secret-of-some-length"})
    assert "a-secret" not in str(caught.value)
    assert all(known in str(caught.value) for known in TABLE)


def test_every_setting_is_documented_and_has_a_variable_of_its_own():
    assert len(TABLE) == len(Settings.model_fields)
    assert all(name.startswith("SDXL_") and field.description for name, field in TABLE.items())


def test_settings_are_read_once_and_stay(monkeypatch):
    monkeypatch.setenv("SDXL_MAX_QUEUE", "3")
    assert Settings().max_queue == 100, "only from_mapping reads an environment"
    settings = Settings.from_mapping({"SDXL_MAX_QUEUE": "4"})
    assert settings.max_queue == 4, "another environment than the process's own"
    with pytest.raises(ValidationError):
        settings.max_queue = 5


def test_values_given_in_python_are_checked_and_secrets_not_shown():
    with pytest.raises(ValidationError) as caught:
        Settings(api_keys="a short one", max_queue=0.5)
    assert {error["loc"][0] for error in caught.value.errors()} == {"api_keys", "max_queue"}
    assert "a short one" not in str(caught.value)


def test_compile_reaches_the_runtime():
    assert Settings(compile=True).profile.compile
    assert not Settings().profile.compile


def test_importing_the_application_loads_no_torch():
    program = (
        "import sys, service.app, service.__main__; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=PROMOTED.parents[1]).returncode == 0
