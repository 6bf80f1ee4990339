"""The service's settings: read from the environment once, checked at once, frozen.

A field of `Settings` is the one declaration of a setting: its variable, type, rule, default and meaning. The help, the
errors and the table in docs/operate.md come from it.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from sdxl_lab.config import ConfigError, RuntimeProfile
from service.jobs.store import check_place

PREFIX = "SDXL_"
PROMOTED = Path(__file__).parent / "promoted"
SHORTEST_KEY = 16
NEAR = 0.8  # difflib's ratio: one letter of five is another

LogLevel = Literal["debug", "info", "warning", "error"]
Attest = Literal["strict", "warn", "off"]


class SettingsError(ValueError):
    """A variable has a bad value, or is named almost like a setting; the message lists the settings."""


def _read(parse: Callable[[str], Any]) -> BeforeValidator:
    """Text becomes a value by `parse`, which raises ValueError with the rule. Values of Python's own pass."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _slot(text: str) -> Path:
    if not text.strip():
        raise ValueError("must be the name of a promoted slot, or a path with a slash")
    return PROMOTED / text if re.fullmatch(r"[\w-]+", text) else Path(text).expanduser()


def _retention(text: str) -> int:
    given = re.fullmatch(r"([1-9]\d{0,5})([smhd])", text, re.ASCII)
    if given is None:
        raise ValueError("must be a whole number and one of s, m, h, d, such as 7d")
    return int(given[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[given[2]]


def _count(low: int, high: int) -> BeforeValidator:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return _read(parse)


def _profile(field: str) -> BeforeValidator:
    def parse(text: str) -> str:
        values: dict[str, Any] = {field: text}
        try:
            RuntimeProfile(**values)
        except ConfigError as error:
            raise ValueError(f"must be {error.rule}") from error
        return text

    return _read(parse)


def _one_of(choices: Any) -> BeforeValidator:
    values = get_args(choices)

    def parse(text: str) -> str:
        if text not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return text

    return _read(parse)


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


class Settings(BaseSettings):
    """How one process serves.

    Called with values it reads no environment, so that a test has only what it asks for; `from_mapping` reads one. A
    field with `repr=False` holds a secret, which no message shows.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        case_sensitive=True,
        alias_generator=lambda name: PREFIX + name.upper(),
        validate_by_name=True,
        validate_default=False,
        hide_input_in_errors=True,
    )

    slot: Annotated[Path, _read(_slot)] = Field(
        default=PROMOTED / "nano",
        validation_alias="SDXL_CONFIG",
        description="the slot to serve: a name in service/promoted, or the path of a slot folder",
    )
    store: Annotated[Path | str, _read(check_place)] = Field(
        default=Path("images"),
        description="where images are kept: a folder, or a URL that begins with s3, gs, az, file or memory",
    )
    retention: Annotated[int | None, _read(_retention)] = Field(
        default=None, description="how long images are kept, such as 7d or 12h; without it, for ever"
    )
    max_queue: Annotated[int, _count(1, 100_000)] = Field(
        default=100, description="how many images may wait before a request is refused"
    )
    max_rows: Annotated[int, _count(1, 4096)] = Field(
        default=32,
        description="the most UNet rows in one call; a guided image takes two. How many it has is measured: a smaller "
        "limit is for a GPU whose memory others use too",
    )
    max_active: Annotated[int, _count(1, 100_000)] = Field(
        default=256, description="the most images that are begun and not done: each holds some 2 MB at 1024 px"
    )
    order: Annotated[str, _profile("order")] = Field(
        default="shortest",
        description="who goes first: shortest, the image with the least time left, within a bound on everybody's wait; "
        "fifo, the one that came first",
    )
    exact: Annotated[bool, _read(_switch)] = Field(
        default=False,
        description="true: one image a call, and on a CPU one thread, so that an image's bits do not depend on its "
        "company",
    )
    lease: Annotated[int, _count(3, 3600)] = Field(
        default=30,
        description="seconds that a durable image belongs to one replica unless it renews them; then another one "
        "draws it",
    )
    device: Annotated[str, _profile("device")] = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    dtype: Annotated[str, _profile("dtype")] = Field(default="auto", description="auto, float32, float16 or bfloat16")
    compile: Annotated[bool, _read(_switch)] = Field(
        default=False, description="true: compile the UNets, which takes minutes at the first start"
    )
    storage: Annotated[str, _profile("storage")] = Field(
        default="own",
        description="own, or float8: the UNets' weights take half of float16's memory, are cast as they are used, and "
        "no LoRA can be applied",
    )
    tile_above: Annotated[int, _count(64, 65_536)] = Field(
        default=2048,
        description="the side in pixels above which an image is decoded in tiles, which takes less memory; where it "
        "runs out, smaller ones are, too",
    )
    preview_decoder: Annotated[str, _profile("preview_decoder")] = Field(
        default="",
        description="a small decoder for previews (TAESD): a folder, or org/name@COMMIT of the hub; without it, a "
        "linear map",
    )
    attest: Annotated[Attest, _one_of(Attest)] = Field(
        default="strict",
        description="whether the slot's golden images are drawn again and compared before serving. If they differ, "
        "strict stays unready, and warn serves and says so; off draws none",
    )
    api_keys: Annotated[tuple[str, ...], NoDecode, _read(_keys)] = Field(
        default=(),
        repr=False,
        description=f"a client must send one of these keys; {SHORTEST_KEY} characters or more each, with commas "
        "between",
    )
    root_path: Annotated[str, _read(_prefix)] = Field(
        default="", description="the path under which a proxy shows the service, such as /sdxl"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, _read(_origins)] = Field(
        default=(), description="web origins whose pages may call (CORS), with commas between; * for any"
    )
    watchdog: Annotated[int, _count(1, 100_000)] = Field(
        default=900, description="the process ends after so many seconds without a step while there are images to draw"
    )
    log_level: Annotated[LogLevel, _one_of(LogLevel)] = Field(default="info", description=", ".join(get_args(LogLevel)))

    @classmethod
    def from_mapping(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The settings in an environment; `SettingsError` for a bad value, or a name that is almost one of ours."""
        for name in strangers(environment):
            if meant := _meant(name):
                raise SettingsError(f"{name} is no setting; did you mean {meant}? The settings are:\n{documentation()}")
        try:
            return cls(**_Environment(cls, environment)())
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            received = f"; received {environment[name]!r}" if TABLE[name].repr else ""
            raise SettingsError(f"{name} {_rule(first)}{received}. The settings are:\n{documentation()}") from None

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the caller gives."""
        return (init_settings,)

    @property
    def profile(self) -> RuntimeProfile:
        return RuntimeProfile(
            device=self.device,
            dtype=self.dtype,
            rows=self.max_rows,
            active=self.max_active,
            order=self.order,
            exact=self.exact,
            compile=self.compile,
            storage=self.storage,
            tile_above=self.tile_above,
            preview_decoder=self.preview_decoder or None,
        )


class _Environment(EnvSettingsSource):
    """pydantic-settings' reader of variables, for any mapping."""

    def __init__(self, settings: type[BaseSettings], environment: Mapping[str, str]) -> None:
        self._environment = environment
        super().__init__(settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._environment


TABLE: dict[str, FieldInfo] = {str(field.validation_alias): field for field in Settings.model_fields.values()}


def strangers(environment: Mapping[str, str]) -> list[str]:
    """Names with our prefix that are no settings. Kubernetes sets such names for a Service called `sdxl`
    (`SDXL_PORT=tcp://...`), so they stop nothing unless they look like a setting mistyped."""
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in TABLE)


def _meant(stranger: str) -> str | None:
    """The setting that a name was probably meant for: one with at most one letter more or less, and most letters the
    same."""
    given = stranger.removeprefix(PREFIX)
    known = {name.removeprefix(PREFIX): name for name in TABLE} | {"KEYS": f"{PREFIX}API_KEYS"}  # ignored: all may call
    similar = [name for name in known if abs(len(name) - len(given)) <= 1]
    near = difflib.get_close_matches(given, similar, 1, NEAR)
    return known[near[0]] if near else None


def _rule(error: Any) -> str:
    """What a validator said, without pydantic's own words in front."""
    return str(error["ctx"]["error"]) if error["type"] == "value_error" else str(error["msg"])


def default(setting: FieldInfo) -> str:
    """The value that a setting has where the environment names none, as text."""
    value = setting.default
    return value.name if isinstance(value, Path) else "none" if value in ("", ()) else str(value).lower()


def documentation() -> str:
    """One line a setting: name, default, meaning."""
    return "\n".join(f"  {name:17} {each.description} (default: {default(each)})" for name, each in TABLE.items())
