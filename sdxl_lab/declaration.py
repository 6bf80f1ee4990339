"""How a setting is declared: once, with all that the doors need to know of it.

A class of settings derives from `Declared`; each field is annotated with a `Setting`, which has the kind of its values,
words for people and a valid example. Validation, the plain form, the digest, and the merge of changes come from that
declaration, and so do the command line's options, the panel's controls, the HTTP schema and the tables in the docs.
Imports no torch.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import GenericAlias, MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
)
from pydantic_core import CoreSchema

NONE = "none"  # TOML has no null, and neither has a command line
SHORT = 12  # hexadecimal digits of a digest that people are shown


class ConfigError(ValueError):
    """A value breaks a rule of the configuration. `field`, `received` and `rule` say which.

    `example` is a valid value of the field, or of the field `of`; a text with an equals sign in it is shown as it is.
    `near` is the name that was probably meant.
    """

    def __init__(
        self,
        field: str,
        received: object,
        rule: str,
        example: object,
        *,
        near: str | None = None,
        of: str | None = None,
    ) -> None:
        self.field, self.received, self.rule, self.example = field, received, rule, example
        self.near, self.of = near, of or field
        guess = f" Did you mean {near}?" if near else ""
        super().__init__(f"{field} must be {rule}; received {received!r}.{guess} Example: {_shown(self.of, example)}")

    def within(self, outer: str) -> "ConfigError":
        """The same error about a field of the field `outer`."""
        near = f"{outer}.{self.near}" if self.near else None
        names = {"near": near, "of": f"{outer}.{self.of}"}
        return ConfigError(f"{outer}.{self.field}", self.received, self.rule, self.example, **names)


def _shown(field: str, example: object) -> str:
    """An example as one writes it in TOML."""
    if "=" in str(example):
        return str(example)
    if isinstance(example, Mapping):
        return ", ".join(f"{field}.{name} = {json.dumps(value)}" for name, value in example.items())
    if isinstance(example, list | tuple) and example and all(isinstance(each, Mapping) for each in example):
        tables = ("{ " + ", ".join(f"{name} = {json.dumps(v)}" for name, v in each.items()) + " }" for each in example)
        return f"{field} = [{', '.join(tables)}]"
    return f"{field} = {json.dumps(example)}"


def canonical(content: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no blanks: equal content, equal text."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def short(digest: str) -> str:
    """A digest's first 12 hexadecimal digits, for people."""
    return digest[:SHORT]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, if there is one."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)


def left_out(value: object) -> bool:
    """Whether a plain value says that a nested class, or every table of a list, is left out, as `Declared.changed`
    reads it."""
    return value is None or value is False or value == NONE or (isinstance(value, list | tuple) and not value)


# --- kinds of values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What kind of value a setting has.

    `words` is the rule for people, `type` what the declaration must annotate, `checked` the same with the rule in it,
    as pydantic validates it, `json_schema` the rule as JSON Schema says it. `read` makes one word of a command line a
    value; ValueError where it is none.
    """

    @property
    def words(self) -> str:
        raise NotImplementedError

    @property
    def type(self) -> Any:
        raise NotImplementedError

    @property
    def checked(self) -> Any:
        raise NotImplementedError

    @property
    def json_schema(self) -> dict[str, Any]:
        return {}

    def read(self, word: str) -> Any:
        return word


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number, both bounds included."""

    low: int
    high: int
    multiple: int = 1

    @property
    def words(self) -> str:
        what = "a whole number" if self.multiple == 1 else f"a multiple of {self.multiple}"
        return f"{what} from {self.low} to {self.high}"

    @property
    def type(self) -> Any:
        return int

    @property
    def checked(self) -> Any:
        return Annotated[int, Field(strict=True, ge=self.low, le=self.high, multiple_of=self.multiple)]

    @property
    def json_schema(self) -> dict[str, Any]:
        multiple = {} if self.multiple == 1 else {"multipleOf": self.multiple}
        return {"minimum": self.low, "maximum": self.high, **multiple}

    def read(self, word: str) -> int:
        return int(word)


@dataclass(frozen=True)
class Number(Kind):
    """A finite number, kept as a float; both bounds included, or with `between` neither."""

    low: float
    high: float
    between: bool = False

    @property
    def words(self) -> str:
        form = "a number above {:g} and below {:g}" if self.between else "a number from {:g} to {:g}"
        return form.format(self.low, self.high)

    @property
    def type(self) -> Any:
        return float

    @property
    def checked(self) -> Any:
        bounds: Any = {"gt": self.low, "lt": self.high} if self.between else {"ge": self.low, "le": self.high}
        rule = Field(strict=True, allow_inf_nan=False, **bounds)
        # -0.0 equals 0.0 and is written otherwise: equal settings must have one text, and so one digest.
        return Annotated[float, rule, AfterValidator(lambda value: float(value) + 0.0)]

    @property
    def json_schema(self) -> dict[str, Any]:
        names = ("exclusiveMinimum", "exclusiveMaximum") if self.between else ("minimum", "maximum")
        return dict(zip(names, (self.low, self.high), strict=True))

    def read(self, word: str) -> float:
        return float(word)


@dataclass(frozen=True)
class Text(Kind):
    """Text that UTF-8 can carry and files can hold. A `pattern` (of pydantic's) comes with `meaning`, its words."""

    low: int = 0
    high: int = 500
    pattern: str | None = None
    meaning: str = ""

    @property
    def words(self) -> str:
        return self.meaning or f"text of {self.low} to {self.high} characters, without NUL or lone surrogates"

    @property
    def type(self) -> Any:
        return str

    @property
    def checked(self) -> Any:
        rule = Field(strict=True, min_length=self.low, max_length=self.high, pattern=self.pattern)
        return Annotated[str, rule, AfterValidator(_writable)]


def _writable(text: str) -> str:
    """The text; pydantic itself refuses lone surrogates."""
    if "\0" in text:
        raise ValueError("must be without NUL")
    return text


@dataclass(frozen=True)
class Choice(Kind):
    """One of some words."""

    values: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.values)}"

    @property
    def type(self) -> Any:
        return str

    @property
    def checked(self) -> Any:
        return Literal[self.values]

    @property
    def json_schema(self) -> dict[str, Any]:
        return {"enum": list(self.values)}


@dataclass(frozen=True)
class Switch(Kind):
    """On or off."""

    @property
    def words(self) -> str:
        return "true or false"

    @property
    def type(self) -> Any:
        return bool

    @property
    def checked(self) -> Any:
        return Annotated[bool, Field(strict=True)]

    def read(self, word: str) -> bool:
        return {"true": True, "false": False}[word]


@dataclass(frozen=True)
class Pair(Kind):
    """Two values of one kind. `names` says what each is; with `increasing` the first is not above the second."""

    each: Kind
    names: tuple[str, str] = ("low", "high")
    increasing: bool = False

    @property
    def words(self) -> str:
        order = ", the first not above the second" if self.increasing else ""
        return f"two values, each {self.each.words}{order}"

    @property
    def type(self) -> Any:
        return GenericAlias(tuple, (self.each.type, self.each.type))

    @property
    def checked(self) -> Any:
        pair: Any = GenericAlias(tuple, (self.each.checked, self.each.checked))
        rules = [Field(strict=True), BeforeValidator(_tuple)]
        rules += [AfterValidator(_increasing)] if self.increasing else []
        return Annotated[pair, *rules]

    def read(self, word: str) -> Any:
        return self.each.read(word)


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _increasing(pair: Any) -> Any:
    if pair[0] > pair[1]:
        raise ValueError("must increase")
    return pair


@dataclass(frozen=True)
class Falling(Kind):
    """Values of one kind, at least one and at most so many, each below the one before it. `to_zero` lets a 0 stand at
    the end that is not one of them, as where such a list always ends there: it is left off."""

    each: Kind
    most: int
    to_zero: bool = False

    @property
    def words(self) -> str:
        end = "; a 0 at the end is left off" if self.to_zero else ""
        return f"up to {self.most} values, each {self.each.words}, the largest first{end}"

    @property
    def type(self) -> Any:
        return GenericAlias(tuple, (self.each.type, ...))

    @property
    def checked(self) -> Any:
        values: Any = GenericAlias(tuple, (self.each.checked, ...))
        before = [BeforeValidator(_without_end)] if self.to_zero else []
        length = Field(strict=True, min_length=1, max_length=self.most)
        return Annotated[values, length, AfterValidator(_falling), *before, BeforeValidator(_tuple)]

    def read(self, word: str) -> Any:
        return self.each.read(word)

    def read_all(self, text: str) -> tuple[Any, ...]:
        """The values of a text with commas or blanks between them; ValueError where one is none."""
        return tuple(self.read(word) for word in text.replace(",", " ").split())

    def written(self, values: Iterable[Any]) -> str:
        """The inverse of `read_all`."""
        return ", ".join(str(value) for value in values)


def _without_end(values: object) -> object:
    return values[:-1] if isinstance(values, tuple) and len(values) > 1 and values[-1] == 0 else values


def _falling(values: Any) -> Any:
    if any(second >= first for first, second in pairwise(values)):
        raise ValueError("must fall")
    return values


@dataclass(frozen=True)
class Table(Kind):
    """Settings of their own, declared by the class `of`."""

    of: "type[Declared]"

    @property
    def words(self) -> str:
        return f"a {self.of.__name__}"

    @property
    def type(self) -> Any:
        return self.of

    @property
    def checked(self) -> Any:
        return self.of


@dataclass(frozen=True)
class Tables(Kind):
    """Any number of tables up to `most`, in an order that counts, each declared by the class `of`.

    A setting inside one is named by its place, from 0: `loras.0.weight`. The class reads a table from a word of a
    command line (`of.of`), whose parts `form` names, and writes it as one (`Declared.word`).
    """

    of: "type[Declared]"
    most: int = 16
    form: str = "TABLE"

    @property
    def words(self) -> str:
        return f"a list of at most {self.most} {self.of.__name__} tables"

    @property
    def type(self) -> Any:
        return GenericAlias(tuple, (self.of, ...))

    @property
    def checked(self) -> Any:
        tables: Any = GenericAlias(tuple, (self.of, ...))
        return Annotated[tables, Field(strict=True, max_length=self.most), BeforeValidator(self._made)]

    def _made(self, value: object) -> object:
        """The tables that plain values stand for; what is none is left for pydantic to refuse."""
        if not isinstance(value, list | tuple):
            return value
        made = []
        for place, each in enumerate(value):
            try:
                made.append(self.of.of(each))
            except ConfigError as error:
                raise error.within(str(place)) from None
        return tuple(made)

    def read(self, word: str) -> Any:
        return self.of.of(word)


# --- a setting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting, as a field's annotation declares it: `steps: Annotated[int, Setting(...)] = 25`.

    `help` says in a few words what it does, `source` where the method comes from: a paper, or diffusers' own name.
    `step` is how much one click in a panel moves it. `option` is the command line's name, None where it has none and
    the field's own name where nothing is said. `client` says whether a client of the service may ask for it, and
    `limited_by` which of the serving limits then holds. `name`, `default` and `optional` come from the field: what is
    `... | None` may be left out, and None is then its default.
    """

    kind: Kind
    label: str
    help: str
    example: Any
    unit: str = ""
    source: str = ""
    step: float | None = None
    option: str | None = ""
    client: bool = False
    limited_by: str | None = None
    name: str = ""
    default: Any = None
    optional: bool = False

    @property
    def rule(self) -> str:
        """The rule in words, as an error and the docs say it."""
        unit = f" ({self.unit})" if self.unit else ""
        left_out = ", or left out" if self.optional and not isinstance(self.kind, Table) else ""
        return f"{self.kind.words}{unit}{left_out}"

    def check(self, value: object) -> Any:
        """The value as it is stored; `ConfigError` where it breaks the rule."""
        try:
            return _adapter(self.kind, self.optional).validate_python(value)
        except ValidationError as error:
            ours = _ours(error.errors(include_url=False)[0])
            raise (ours.within(self.name) if ours else self.error(value)) from None

    def error(self, received: object) -> ConfigError:
        return ConfigError(self.name, received, self.rule, self.example)

    def declared(self, name: str, annotation: Any, default: Any) -> "Setting":
        """This setting as the field `name` has it; TypeError where the field says something else than the kind."""
        optional = type(None) in get_args(annotation)
        expected = self.kind.type | None if optional else self.kind.type
        if annotation != expected:
            raise TypeError(f"the field {name} must be annotated as {expected}, as its kind says; it is {annotation}")
        if optional and default is not None:
            raise TypeError(f"the field {name} may be left out, so None must be its default; it is {default!r}")
        option = name.replace("_", "-") if self.option == "" else self.option
        return replace(self, name=name, default=default, optional=optional, option=option)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        checked = self.kind.checked
        return handler.generate_schema(checked | None if type(None) in get_args(source) else checked)


@cache
def _adapter(kind: Kind, optional: bool) -> TypeAdapter[Any]:
    return TypeAdapter(kind.checked | None if optional else kind.checked)


def _ours(error: Mapping[str, Any]) -> ConfigError | None:
    """The error of ours that one of pydantic's carries, if it does."""
    found = error.get("ctx", {}).get("error")
    return found if isinstance(found, ConfigError) else None


# --- a class of settings ---------------------------------------------------------------------------------------------


class Declared(BaseModel):
    """Settings that are checked at birth and never change. Derive, and annotate every field with a `Setting`.

    `SCHEMA` is the number of the defaults that the digest counts from. A new field needs no new number; a changed
    default does, since the digest leaves out what is as the schema has it. Rules over several fields are validators
    that raise `ConfigError`.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    SCHEMA: ClassVar[int] = 1
    EXAMPLE: ClassVar[str]  # the setting that an error about no setting shows

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._refusal(error, values) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.settings()  # a declaration that contradicts itself ends the import

    @classmethod
    def _refusal(cls, error: ValidationError, values: Mapping[str, Any]) -> ConfigError:
        """What pydantic refused, as an error of ours: unknown names first, then the first bad value."""
        found = error.errors(include_url=False)
        first = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
        ours = _ours(first)
        if not first["loc"] and ours:  # a rule over several fields
            return ours
        name = str(first["loc"][0])
        if ours:
            return ours.within(name)
        if name not in cls.model_fields:
            return cls._unknown(name, values[name], cls.model_fields)
        return cls.settings()[name].error(values[name])

    @classmethod
    def _unknown(cls, name: str, value: object, known: Iterable[str]) -> ConfigError:
        names = list(known)
        near = nearest(name, names)
        example = cls.settings()[near or cls.EXAMPLE]
        rule = f"a field of {cls.__name__}: {', '.join(names)}"
        return ConfigError(name, value, rule, example.example, near=near, of=example.name)

    # --- the declaration ---------------------------------------------------------------------------------------------

    @classmethod
    @cache
    def settings(cls) -> Mapping[str, Setting]:
        """Every setting by its name, in the order of the fields; after a table its own, with dotted names. Those of the
        tables in a list have a place in their names, and only `setting` knows them."""
        found: dict[str, Setting] = {}
        for name, field in cls.model_fields.items():
            marks = [mark for mark in field.metadata if isinstance(mark, Setting)]
            if len(marks) != 1:
                raise TypeError(f"the field {name} of {cls.__name__} must be annotated with one Setting")
            default = None if field.is_required() else field.default
            setting = found[name] = marks[0].declared(name, field.annotation, default)
            if isinstance(setting.kind, Table):
                for inner in setting.kind.of.settings().values():
                    default = inner.default if setting.default is None else setting.default.value(inner.name)
                    found[f"{name}.{inner.name}"] = replace(inner, name=f"{name}.{inner.name}", default=default)
        return MappingProxyType(found)

    @classmethod
    def setting(cls, name: str, value: object = None) -> Setting:
        """A setting by its (dotted) name; `ConfigError` for an unknown one, which says what `value` it was to have."""
        settings = cls.settings()
        outer, _, inside = name.partition(".")
        place, _, inner = inside.partition(".")
        if outer in settings and isinstance(kind := settings[outer].kind, Tables) and _is_place(place):
            if inner in kind.of.settings():
                return replace(kind.of.settings()[inner], name=name)
            raise kind.of._unknown(inner, value, kind.of.settings()).within(place).within(outer)
        if name not in settings:
            raise cls._unknown(name, value, settings)
        return settings[name]

    @classmethod
    def checked(cls, name: str, value: object) -> Any:
        """The value as the field `name` (dotted for a nested one) stores it; `ConfigError` where it breaks the rule."""
        return cls.setting(name, value).check(value)

    # --- values ------------------------------------------------------------------------------------------------------

    def value(self, name: str) -> Any:
        """The value of a setting by its (dotted) name; None inside of a table that is left out."""
        self.setting(name)
        found: Any = self
        for part in name.split("."):
            if isinstance(found, tuple):
                found = found[int(part)] if int(part) < len(found) else None
            else:
                found = None if found is None else getattr(found, part)
        return found

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A list without tables is left out: what was written before there was such a setting stays as it is."""
        empty = [name for name in type(self).model_fields if getattr(self, name) == ()]
        plain: dict[str, Any] = handler(self)
        return {name: value for name, value in plain.items() if name not in empty}

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: what TOML and JSON hold. Fields that are None, and lists without tables, are left out."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Unknown names are refused with `ConfigError`."""
        return cls(**content)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, path: Path | str) -> Self:
        """Read a TOML file; `ConfigError` if it is no TOML or breaks a rule."""
        return cls.from_dict(cls.read_toml(path))

    @classmethod
    def read_toml(cls, path: Path | str) -> dict[str, Any]:
        """A TOML file's content as it stands there; `ConfigError` if it is no TOML."""
        try:
            return tomllib.loads(Path(path).read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            example = cls.settings()[cls.EXAMPLE]
            raise ConfigError(str(path), str(error), "valid TOML", example.example, of=example.name) from error

    @classmethod
    def of(cls, value: object) -> Any:
        """These settings from what a door has: a table of plain values; anything else as it is."""
        return cls.from_dict(value) if isinstance(value, Mapping) else value

    @property
    def word(self) -> str:
        """These settings as a word that `of` reads. For the tables of a list, which a panel shows side by side."""
        raise NotImplementedError

    def differs(self, other: Self) -> list[str]:
        """The fields in which these settings are not the other ones."""
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)]

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed; unknown names are refused with `ConfigError`."""
        for name, value in changes.items():
            if name not in type(self).model_fields:
                raise self._unknown(name, value, type(self).model_fields)
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    def changed(self, values: Mapping[str, Any], none: str | None = NONE) -> Self:
        """A copy with some settings changed, all at once. Every door's changes come through here.

        Names are dotted for nested settings. Values are plain, as TOML, a command line and HTTP have them: a list for
        a pair, a table for a nested class, a list of them for `Tables`, a name for the model. Left out is None or the
        word `none`; a door that has a null of its own passes `none=None` and may then have a text of that word. A
        nested class that may be left out is also switched: true takes it as it is, or with its defaults where there was
        none; false leaves it out. A setting inside it brings it where nothing is said of it; one inside a list's table
        brings none. Raises `ConfigError`.
        """
        changes: dict[str, Any] = {}
        inside: dict[str, dict[str, Any]] = {}
        for name, given in values.items():
            setting = self.setting(name, given)
            outer, dot, inner = name.partition(".")
            if dot:
                inside.setdefault(outer, {})[inner] = given
                continue
            value = None if setting.optional and isinstance(given, str) and given == none else given
            if isinstance(setting.kind, Tables) and (given is None or given == none):
                value = ()
            if isinstance(setting.kind, Table):
                value = _switched(setting, value, getattr(self, name))
            changes[name] = value
        for outer, more in inside.items():
            kind = self.setting(outer).kind
            whole = changes.get(outer, getattr(self, outer))
            if isinstance(kind, Tables):
                changes[outer] = _placed(outer, self.checked(outer, whole), more, none)
                continue
            assert isinstance(kind, Table)
            if whole is None:
                if outer in changes:
                    name = next(iter(more))
                    raise ConfigError(f"{outer}.{name}", more[name], f"left out where {outer} is", f"{outer} = {{}}")
                whole = kind.of()
            checked = self.checked(outer, whole)
            try:
                changes[outer] = checked.changed(more, none)
            except ConfigError as error:
                raise error.within(outer) from None
        return self.with_(**changes)

    # --- identity ----------------------------------------------------------------------------------------------------

    def distinct(self) -> dict[str, Any]:
        """The plain values of the fields that are not as the schema has them; nested classes likewise."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if value != field.default:
                found[name] = _distinct(value)
        return found

    @property
    def digest(self) -> str:
        """The sha256, in 64 hexadecimal digits, of the canonical JSON of the schema's number and what is `distinct`."""
        return hashlib.sha256(canonical({"schema": self.SCHEMA, **self.distinct()}).encode()).hexdigest()

    @property
    def short_digest(self) -> str:
        """The digest's first 12 digits, for people."""
        return short(self.digest)


def _distinct(value: Any) -> Any:
    if isinstance(value, Declared):
        return value.distinct()
    tables = isinstance(value, tuple) and any(isinstance(each, Declared) for each in value)
    return [each.distinct() for each in value] if tables else value


def _is_place(part: str) -> bool:
    """Whether it says which of the tables in a list is meant: 0, 1, 2, ..."""
    return part.isascii() and part.isdigit()


def _placed(name: str, tables: "tuple[Declared, ...]", more: Mapping[str, Any], none: str | None) -> Any:
    """The tables of a list with some settings inside them changed, whose names begin with the table's place."""
    changes: dict[int, dict[str, Any]] = {}
    for inner, given in more.items():
        place, _, rest = inner.partition(".")
        if int(place) >= len(tables):
            rule = f"a setting of one of the {len(tables)} that are there, counted from 0"
            raise ConfigError(f"{name}.{inner}", given, rule, f"{name}.0.{rest} = ..., and a table for it")
        changes.setdefault(int(place), {})[rest] = given
    made = list(tables)
    for at, values in changes.items():
        try:
            made[at] = made[at].changed(values, none)
        except ConfigError as error:
            raise error.within(str(at)).within(name) from None
    return tuple(made)


def _switched(setting: Setting, value: object, current: "Declared | None") -> object:
    """What a door says of a whole nested class, as its field takes it."""
    assert isinstance(setting.kind, Table)
    if setting.optional and isinstance(value, bool):
        return (current or setting.kind.of()) if value else None
    try:
        return setting.kind.of.of(value)
    except ConfigError as error:
        raise error.within(setting.name) from None
