"""What the environment sets: read once, checked at once, frozen. `TABLE` is the code and the documentation.

Knows the names of slots, not what is in them.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from sdxl_lab.config import ConfigError, RuntimeProfile
from service.jobs.store import check_place

PROMOTED = Path(__file__).parent / "promoted"
LOG_LEVELS = ("debug", "info", "warning", "error")
ATTEST = ("strict", "warn", "off")
SHORTEST_KEY = 16


class SettingsError(ValueError):
    """A setting does not exist or has a bad value; the message lists the valid ones."""


class Setting(NamedTuple):
    """A field of `Settings`, what it means, and how text becomes its value (ValueError says the rule). What is `secret`
    is shown nowhere, not even where it is refused."""

    field: str
    meaning: str
    parse: Callable[[str], Any]
    secret: bool = False


def _slot(text: str) -> Path:
    if not text.strip():
        raise ValueError("must be the name of a promoted slot, or a path with a slash")
    return PROMOTED / text if re.fullmatch(r"[\w-]+", text) else Path(text).expanduser()


def _retention(text: str) -> int:
    given = re.fullmatch(r"([1-9]\d{0,5})([smhd])", text, re.ASCII)
    if given is None:
        raise ValueError("must be a whole number and one of s, m, h, d, such as 7d")
    return int(given[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[given[2]]


def _count(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


def _profile(field: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        values: dict[str, Any] = {field: text}
        try:
            RuntimeProfile(**values)
        except ConfigError as error:
            raise ValueError(f"must be {error.rule}") from error
        return text

    return parse


def _one_of(values: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return text

    return parse


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("must be true or false")
    return text == "true"


def _list(text: str, item: str, rule: str, example: str) -> tuple[str, ...]:
    """The values between the commas, every one of which must match."""
    values = tuple(text.split(","))
    if not all(re.fullmatch(item, value, re.ASCII) for value in values):
        raise ValueError(f"must be {rule}, with commas and no spaces between several. Example: {example}")
    return values


def _keys(text: str) -> tuple[str, ...]:
    rule = f"keys of at least {SHORTEST_KEY} letters, digits or signs each"
    return _list(text, rf"[!-+\--~]{{{SHORTEST_KEY},}}", rule, "the output of `openssl rand -hex 24`")


def _origins(text: str) -> tuple[str, ...]:
    rule = "origins as browsers send them (scheme, host, port if it is not the scheme's own), or * for any"
    return _list(text, r"\*|[a-z][a-z0-9+.-]*://[a-z0-9.\[\]:-]+", rule, "https://shop.example,http://localhost:5173")


def _prefix(text: str) -> str:
    if not re.fullmatch(r"(/[\w.~-]+)+", text, re.ASCII):
        raise ValueError(
            "must be a path that begins with a slash and ends with none. Example: /proxy/services/main/sdxl"
        )
    return text


TABLE = {
    "SDXL_CONFIG": Setting(
        "slot", "the slot to serve: a name in service/promoted, or the path of a slot folder", _slot
    ),
    "SDXL_STORE": Setting(
        "store", "where images are kept: a folder, or a URL that begins with s3, gs, az, file or memory", check_place
    ),
    "SDXL_RETENTION": Setting(
        "retention", "how long images are kept, such as 7d or 12h; without it, for ever", _retention
    ),
    "SDXL_MAX_QUEUE": Setting("max_queue", "how many images may wait before a request is refused", _count(1, 100_000)),
    "SDXL_MAX_ROWS": Setting("max_rows", "UNet rows in one call; a guided image takes two", _count(1, 4096)),
    "SDXL_LEASE": Setting(
        "lease",
        "seconds that a promised image belongs to one replica unless it renews them; then another one draws it",
        _count(3, 3600),
    ),
    "SDXL_DEVICE": Setting("device", "auto, cpu, cuda or cuda:N", _profile("device")),
    "SDXL_DTYPE": Setting("dtype", "auto, float32, float16 or bfloat16", _profile("dtype")),
    "SDXL_COMPILE": Setting("compile", "true: compile the UNets, which takes minutes at the first start", _switch),
    "SDXL_ATTEST": Setting(
        "attest",
        "whether the slot's golden images are drawn again and compared before serving. If they differ, strict stays "
        "unready, and warn serves and says so; off draws none",
        _one_of(ATTEST),
    ),
    "SDXL_API_KEYS": Setting(
        "api_keys",
        f"a client must send one of these keys; {SHORTEST_KEY} characters or more each, with commas between",
        _keys,
        True,
    ),
    "SDXL_ROOT_PATH": Setting("root_path", "the path under which a proxy shows the service, such as /sdxl", _prefix),
    "SDXL_CORS_ORIGINS": Setting(
        "cors_origins", "web origins whose pages may call (CORS), with commas between; * for any", _origins
    ),
    "SDXL_WATCHDOG": Setting(
        "watchdog",
        "the process ends after so many seconds without a step while there are images to draw",
        _count(1, 100_000),
    ),
    "SDXL_LOG_LEVEL": Setting("log_level", ", ".join(LOG_LEVELS), _one_of(LOG_LEVELS)),
}


@dataclass(frozen=True)
class Settings:
    """How one process serves. `slot` is a slot's folder."""

    slot: Path = PROMOTED / "nano"
    store: Path | str = Path("images")
    retention: int | None = None
    max_queue: int = 100
    max_rows: int = 16
    lease: int = 30
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    attest: str = "strict"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    root_path: str = ""
    cors_origins: tuple[str, ...] = ()
    watchdog: int = 900
    log_level: str = "info"

    @classmethod
    def from_mapping(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The settings in an environment. Names without `SDXL_` are not ours; `SettingsError` for the rest."""
        values: dict[str, Any] = {}
        for name, text in sorted(environment.items()):
            if not name.startswith("SDXL_"):
                continue
            if name not in TABLE:
                raise SettingsError(f"{name} is no setting. The settings are:\n{documentation()}")
            setting = TABLE[name]
            try:
                values[setting.field] = setting.parse(text)
            except ValueError as error:
                received = "" if setting.secret else f"; received {text!r}"
                raise SettingsError(f"{name} {error}{received}. The settings are:\n{documentation()}") from error
        return cls(**values)

    @property
    def profile(self) -> RuntimeProfile:
        return RuntimeProfile(device=self.device, dtype=self.dtype, rows=self.max_rows, compile=self.compile)


def default(setting: Setting) -> str:
    """The value that a setting has where the environment names none, as text."""
    value = getattr(Settings(), setting.field)
    return value.name if isinstance(value, Path) else "none" if value in ("", ()) else str(value).lower()


def documentation() -> str:
    """One line a setting: name, default, meaning."""
    return "\n".join(f"  {name:17} {each.meaning} (default: {default(each)})" for name, each in TABLE.items())
