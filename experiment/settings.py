"""Reads YAML files and `section.key=value` overrides into a frozen dataclass, and checks every value."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from functools import cache, reduce
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from experiment.files import slug
from mimu.errors import InputError, one_line
from mimu.files import naming
from mimu.settings import LIMIT

Kind = TypeVar("Kind")
STRICT = {"extra": "forbid", "allow_inf_nan": False}  # the `__pydantic_config__` of dataclasses that `checked` builds
MOST_VALUES = 100_000  # a few nested aliases of YAML can stand for billions
LONGEST_NAME = 100  # characters of a variant's name, which is part of file names
TYPES = {"integer": "an integer", "number": "a finite number", "boolean": "true or false", "string": "text"}
TYPES |= {"array": "a list", "object": "a mapping", "null": "null"}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
BOUNDS |= {"minItems": "of at least", "maxItems": "of at most"}


class ConfigError(InputError):
    """A setting that cannot work. The message names the file or override, the key and what would be valid."""


class Layer(NamedTuple):
    """Settings, and the file, variant or override that they come from."""

    origin: str
    values: Any


def load_variants(
    kind: type[Kind], defaults: Sequence[Layer], path: Path | None, overrides: Sequence[str] = ()
) -> dict[str, Kind]:
    """Builds a config for each variant of a file.

    Later layers go over earlier ones: the defaults, the file that `path` extends, `path`, its variant, the overrides.

    Args:
        kind: the dataclass to build
        path: the file; None for the defaults alone
        overrides: `section.key=value`, with the value in YAML

    Returns:
        The configs by the names of the variants. The only name is "" if the file has no variants.

    Raises:
        ConfigError: a setting cannot work.
        ArtifactError: a file cannot be read.
    """
    layers = [*defaults, *(file_layers(path) if path else [])]
    over = [parse_override(override) for override in overrides]
    if not path or "variants" not in layers[-1].values:
        return {"": build(kind, [*layers, *over])}
    variants = layers[-1].values.pop("variants")
    names = "".join(variants) if isinstance(variants, dict) else "$"
    if not names or not names.isprintable() or "$" in names:
        must = "map names, without $ and line breaks, to what each changes"
        raise ConfigError(f"{path}: variants must {must}, not {shown(variants)}")
    if len(set(map(slug, variants)) - {""}) < len(variants) or len(max(variants, key=len)) > LONGEST_NAME:
        must = f"differ in the letters and digits of their names, which have at most {LONGEST_NAME} characters"
        raise ConfigError(f"{path}: variants must {must}, not {shown([*variants])}")
    configs = {}
    for name, changes in variants.items():
        configs[name] = build(kind, [*layers, Layer(f"{path}, variant {name}", changes or {}), *over])
    return configs


class Loader(yaml.SafeLoader):
    """Reads YAML as PyYAML does, but every key is text, a repeated key is an error, and 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            keys.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"+-0123456789"])


def parse(text: str | bytes, origin: str) -> Any:
    """Parses YAML. Raises ConfigError where it is not valid, or has more values than any config needs."""
    try:
        value = yaml.load(text, Loader)
        if len(list(islice(json.JSONEncoder(default=str).iterencode(value), MOST_VALUES))) == MOST_VALUES:
            raise ValueError("it has too many values")
        return value
    except Exception as error:  # an odd date, number or nesting raises an error of Python's own
        raise ConfigError(f"{origin}: is not valid YAML ({one_line(error)})") from None


def parse_override(override: str) -> Layer:
    """Parses `section.key=value`, with the value in YAML. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: is not an override; write section.key=value")
    origin = f"override {' '.join(override.split())}"
    return Layer(origin, {key: parse(text, origin)})


def read(path: Path) -> Layer:
    """Reads a YAML file, which may be empty. Raises InputError."""
    with naming(path, "read"):
        content = path.read_bytes()
    values = parse(content, str(path))
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path}: the settings must be a mapping, not {shown(values)}")
    return Layer(str(path), values or {})


def file_layers(path: Path) -> list[Layer]:
    """Reads a file and, below it, the file that it extends, without that file's variants. Raises InputError."""
    top = read(path)
    if "extends" not in top.values:
        return [top]
    name = top.values.pop("extends")
    if not isinstance(name, str):
        raise ConfigError(f"{path}: extends must be the path of a file from here, not {shown(name)}")
    below = read(path.parent / name)
    below.values.pop("variants", None)
    if "extends" in below.values:
        raise ConfigError(f"{path}: extends must name a file that extends none itself, not {name}")
    return [below, top]


def merge(below: Any, above: Any) -> Any:
    """Lays settings over others: mappings key by key, where `a.b: 1` is the same as `a: {b: 1}`."""
    if not isinstance(above, dict):
        return above
    values = dict(below) if isinstance(below, dict) else {}
    for dotted, value in above.items():
        name, dot, inner = dotted.partition(".")
        values[name] = merge(values.get(name), {inner: value} if dot else value)
    return values


def build(kind: type[Kind], layers: Sequence[Layer]) -> Kind:
    """Builds a dataclass of all layers. Raises ConfigError, which names the first layer with which the error occurs."""
    states = [reduce(merge, [layer.values for layer in layers[: count + 1]], {}) for count in range(len(layers))]
    try:
        return checked(kind, states[-1])
    except ValueError as error:
        message = str(error)
    for layer, values in zip(layers, states):
        try:
            checked(kind, values)
        except ValueError as error:
            if str(error) == message:
                raise ConfigError(f"{layer.origin}: {message}") from None
    raise AssertionError("the last layer has this error")


@cache
def adapter(kind: type[Kind]) -> TypeAdapter[Kind]:
    return TypeAdapter(kind)


def checked(kind: type[Kind], values: Any, section: str = "") -> Kind:
    """Builds a dataclass of values as YAML holds them.

    Pydantic checks them as strict JSON: a list is a tuple, an integer may be a float, and true is no integer.

    Args:
        section: what stands before the keys in messages, such as "eval."

    Raises:
        ValueError: a value is not valid. The message begins with the dotted key.
    """
    try:
        return adapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
    schema = adapter(kind).json_schema()
    key, value, definitions = section, values, schema.get("$defs", {})
    for name in detail["loc"]:
        inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
        if not isinstance(value, dict) or not inner:  # here begin an unexpected key, a list's index or a union's part
            break
        key, value = f"{key}{name}.", value.get(name)
        schema = definitions.get(inner.get("$ref", "").rpartition("/")[2], inner)
    if detail["type"] == "value_error":
        raise ValueError(f"{key}{detail['ctx']['error']}")
    if detail["type"] == "unexpected_keyword_argument":
        raise ValueError(unexpected(key + detail["loc"][-1], [section + path for path in paths(values)], schema))
    must = description(schema)
    if detail["type"] != "less_than_equal":
        must = must.replace(f", at most {LIMIT}", "")
    raise ValueError(f"{key.rstrip('.') or 'the settings'} must be {must}, not {shown(value)}")


def unexpected(key: str, valid: Sequence[str], schema: dict[str, Any]) -> str:
    """Says that a key is not a setting, and names those with the same last name, or a similar one, or all there are."""
    settings = [path for path in valid if not f"{path}.".startswith(f"{key}.")]
    alike = [path for path in settings if path.endswith(f".{key.rpartition('.')[2]}")]
    alike = sorted(alike, key=lambda path: path.count("."))[:5] or difflib.get_close_matches(key, settings, n=1)
    hint = f"; did you mean {' or '.join(alike)}?" if alike else f": valid are {', '.join(schema['properties'])}"
    return " ".join(f"{key} is not a setting{hint}".split())


def paths(values: Any) -> Iterator[str]:
    """Yields every dotted key of nested mappings."""
    for name, value in values.items() if isinstance(values, dict) else ():
        yield name
        yield from (f"{name}.{path}" for path in paths(value))


def description(schema: dict[str, Any]) -> str:
    """Describes in words which values a JSON schema allows."""
    if "anyOf" in schema:
        return ", or ".join(map(description, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    words = [TYPES[schema["type"]], *(f"{BOUNDS[name]} {schema[name]}" for name in BOUNDS if name in schema)]
    if schema["type"] == "array":
        words.append(f"each {description(schema.get('items') or schema['prefixItems'][0])}")
    if "properties" in schema:
        words.append(f"with keys of {', '.join(schema['properties'])}")
    return ", ".join(words)


def shown(value: Any) -> str:
    """Shows a value in a message; a long or deep one is shortened."""
    return reprlib.repr(value)[:300]
