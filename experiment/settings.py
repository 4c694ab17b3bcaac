"""Reads YAML files and `section.key=value` overrides into a frozen dataclass, and checks every value."""

import json
import re
import reprlib
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from experiment.files import slug
from mimu.errors import InputError, in_one_line
from mimu.files import naming

Kind = TypeVar("Kind")
STRICT = {"extra": "forbid", "allow_inf_nan": False}  # the `__pydantic_config__` of dataclasses that `checked` builds
adapter = cache(TypeAdapter)  # what it builds takes long


class ConfigError(InputError):
    """A setting that cannot work. The message names the file, the overrides, the key, and what would be valid."""


class Loader(yaml.SafeLoader):
    """Reads YAML as PyYAML does, but 1e-3 is a number."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"+-0123456789"])


def parse(text: str | bytes, origin: str) -> Any:
    """Parses YAML. Raises ConfigError where it is not valid."""
    with in_one_line(ConfigError, f"{origin}: is not valid YAML"):
        return json.loads(json.dumps(yaml.load(text, Loader), default=str))  # every key is text


def parse_override(override: str) -> dict[str, Any]:
    """Parses `section.key=value`, with the value in YAML. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: is not an override; write section.key=value")
    return {key: parse(text, f"override {' '.join(override.split())}")}


def read(path: Path) -> dict[str, Any]:
    """Reads a YAML file, which may be empty. Raises InputError."""
    with naming(path, "read"):
        content = path.read_bytes()
    values = parse(content, str(path))
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: the settings must be a mapping, not {shown(values)}")
    return values or {}


def check_variants(path: Path, variants: Any) -> None:
    """Raises ConfigError unless names, which also name files and lines of tables, stand for changes of a config."""
    names = list(variants) if isinstance(variants, dict) else [""]
    is_valid = all(name.isprintable() and "$" not in name for name in names)
    if not names or not is_valid or len(set(map(slug, names)) - {""}) < len(names):
        must = "map names, without $ and different in their first 60 letters and digits, to what each changes"
        raise ConfigError(f"{path}: variants must {must}, not {shown(variants)}")


def merge(below: Any, above: Any) -> Any:
    """Lays settings over others: mappings key by key, where `a.b: 1` is the same as `a: {b: 1}`."""
    if not isinstance(above, dict):
        return above
    values = dict(below) if isinstance(below, dict) else {}
    for dotted, value in above.items():
        name, dot, inner = dotted.partition(".")
        values[name] = merge(values.get(name), {inner: value} if dot else value)
    return values


def checked(kind: type[Kind], values: Any, section: str = "") -> Kind:
    """Builds a dataclass of values as YAML holds them.

    Pydantic checks them as strict JSON: a list is a tuple, an integer may be a float, and true is no integer.

    Args:
        section: what stands before the keys in messages, such as "eval."

    Raises:
        ValueError: a value is not valid. The message begins with the dotted key.
    """
    try:
        return adapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    first, place, siblings, value = errors[0], [], {}, values
    for name in first["loc"]:
        if isinstance(value, dict):  # behind the key stand the index of a list, and the member of a union
            place.append(name)
            siblings, value = value, value.get(name)
    key = section + ".".join(place)
    if first["type"] == "value_error":
        raise ValueError(f"{key}{'.' if place else ''}{first['ctx']['error']}")
    if first["type"] == "unexpected_keyword_argument":
        wrong = {each["loc"][-1] for each in errors if each["type"] == first["type"]}
        valid = ", ".join(name for name in siblings if name not in wrong)
        raise ValueError(f"{' '.join(key.split())} is not a setting: valid are {valid or 'none'}")
    messages = dict.fromkeys(each["msg"] for each in errors if each["loc"][: len(place)] == tuple(place))
    raise ValueError(f"{key or 'the settings'}: {', or '.join(messages)}, not {shown(value)}")


def shown(value: Any) -> str:
    """Shows a value in a message; a long or deep one is shortened."""
    return reprlib.repr(value)[:300]
