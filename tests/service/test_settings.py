import subprocess
import sys
from pathlib import Path

import pytest

from service.settings import PROMOTED, TABLE, Settings, SettingsError

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
]


@pytest.mark.parametrize(("environment", "settings"), GOOD, ids=[str(list(given)) for given, _ in GOOD])
def test_the_environment_becomes_settings(environment, settings):
    assert Settings.from_mapping(environment) == settings


BAD = [
    ("SDXL_STEPS", "25"),
    ("SDXL_", ""),
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


def test_the_table_has_every_field_of_the_settings():
    assert [setting.field for setting in TABLE.values()] == list(Settings.__dataclass_fields__)


def test_compile_reaches_the_runtime():
    assert Settings(compile=True).profile.compile
    assert not Settings().profile.compile


def test_importing_the_application_loads_no_torch():
    program = (
        "import sys, service.app, service.__main__; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=PROMOTED.parents[1]).returncode == 0
