"""YAML files and `section.key=value` overrides into a frozen dataclass, with every check before any work starts.

The range of a number stands in its annotation: `Annotated[int, "at least 1"]`, `Annotated[float, "above 0, below 1"]`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import reprlib
import types
import typing
from collections import ChainMap
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml

from mimu.runs.files import ArtifactError, InputError, naming, one_line, slug

Kind = TypeVar("Kind")
Layer = tuple[str, Any]  # how messages call where settings come from, and the settings
BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
LIMIT = 1_000_000_000  # of numbers whose range has no upper bound
hints_of = cache(partial(typing.get_type_hints, include_extras=True))
WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", types.NoneType: "null"}


class ConfigError(InputError):
    """A setting that cannot work; the message names the file, the key and what would be valid."""


def load_config(kind: type[Kind], bases: Sequence[Path], path: Path, overrides: Sequence[str] = ()) -> Kind:
    """Reads the bases in their order, over them what `path` changes (but for its variants), over that the overrides.

    path may be one of the bases. Raises ConfigError.
    """
    layers, _ = read_layers(bases, path)
    return built(kind, bases, [*layers, *map(parsed_override, overrides)])


def load_variants(
    kind: type[Kind], bases: Sequence[Path], path: Path, overrides: Sequence[str] = ()
) -> dict[str, Kind]:
    """The configs that a file describes: one for each of its variants by name, or where it has none, one named "".

    A variant changes what `load_config` reads of the file. Raises ConfigError.
    """
    layers, variants = read_layers(bases, path)
    over = [parsed_override(override) for override in overrides]
    if variants is None:
        return {"": built(kind, bases, [*layers, *over])}
    if not isinstance(variants, dict) or not variants:
        raise ConfigError(f"{path}: variants must map names to what each changes, not {shown(variants)}")
    for name in variants:
        if not name.isprintable() or len(name) > 100 or "$" in name or not slug(name):
            raise ConfigError(f"{path}: the name of a variant must be up to 100 characters without $, not {name!a}")
    if len(set(map(slug, variants))) < len(variants):
        raise ConfigError(f"{path}: variants must differ in the letters and digits of their names: {list(variants)}")
    return {
        name: built(kind, bases, [*layers, (f"{path}, variant {name}", {} if changes is None else changes), *over])
        for name, changes in variants.items()
    }


def read_layers(bases: Sequence[Path], path: Path) -> tuple[list[Layer], Any]:
    """The settings of the bases and of `path`, and the variants of `path`. Raises ConfigError."""
    layers = {base: (base.name, read_yaml(base)) for base in bases}
    if path not in layers:
        layers[path] = (str(path), read_yaml(path))
    settings = layers[path][1]
    variants = settings.pop("variants", None) if isinstance(settings, dict) else None
    return list(layers.values()), variants


class Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, but that every key is text, and that one which stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        found = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in found:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            found.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What stands in a YAML file, nothing as an empty mapping. Raises InputError."""
    with naming(path, "read", or_stream=True):  # such as the output of another program
        content = path.read_bytes()
    try:
        settings = yaml.load(content, Loader)
    except Exception as error:  # PyYAML lets Python's own through where a date, a number or a nesting is odd
        raise ConfigError(f"{path}: is not valid YAML ({one_line(error)})") from None
    return {} if settings is None else settings


def parsed_override(override: str) -> Layer:
    """`section.key=value`, the value read as YAML, as a layer. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: is not an override; write section.key=value")
    try:
        settings: Any = yaml.load(text, Loader)
    except Exception:
        raise ConfigError(f"{override!r}: its value is not valid YAML") from None
    return f"override {' '.join(override.split())}", {key: settings}


def built(kind: type[Kind], bases: Sequence[Path], layers: Sequence[Layer]) -> Kind:
    """The dataclass of all layers, the later ones over the earlier. Raises ConfigError."""
    values: dict[str, Any] = {}
    origins: ChainMap[str, str] = ChainMap()
    for origin, settings in layers:
        origins = origins.new_child()
        values = laid_over(values, settings, kind, origin, origins)
    origins[""] = bases[0].name
    # What a base sets may be impossible only with what was changed beside it.
    names = [base.name for base in bases]
    if over := ", ".join(dict.fromkeys(origin for origin, _ in layers if origin not in names)):
        origins = {key: f"{over}, over {origin}" if origin in names else origin for key, origin in origins.items()}
    return constructed(kind, values, origins)


def laid_over(below: Any, above: Any, hint: Any, origin: str, origins: ChainMap[str, str], key: str = "") -> Any:
    """A setting in its type; a mapping with what it changes of the one below it. Raises ConfigError.

    `eval.step: 15` is what `eval: {step: 15}` is.

    origins: is told of every dotted key from which layer it comes; its first mapping is of this one
    """
    is_section, is_table = dataclasses.is_dataclass(hint), typing.get_origin(hint) is dict
    is_twice = key in origins.maps[0]
    origins[key] = origin
    if not (is_section or is_table):
        if is_twice:
            raise ConfigError(f"{origin}: {key} stands twice")
        try:
            return converted(above, hint)
        except TypeError:
            raise ConfigError(f"{origin}: {key} must be {refusal(above, hint)}") from None
    hints = hints_of(hint) if is_section else {}
    if not isinstance(above, dict):
        keys = f" with keys of {', '.join(hints)}" if is_section else ""
        raise ConfigError(f"{origin}: {key or 'the settings'} must be a mapping{keys}, not {shown(above)}")
    prefix = f"{key}." if key else ""
    over = dict(below)
    for dotted, value in above.items():
        name, dot, rest = dotted.partition(".")
        if is_section and name not in hints:
            near = [f"{prefix}{each}" for each in difflib.get_close_matches(name, hints, n=1)]
            near = [each for each in origins if each and f".{each}".endswith(f".{name}")][:5] or near
            meant = f"; did you mean {' or '.join(near)}?" if near else "."
            given = " ".join(f"{prefix}{name}".split())
            raise ConfigError(f"{origin}: {given} is not a setting{meant} Valid here: {', '.join(hints)}")
        inner = hints[name] if is_section else typing.get_args(hint)[1]
        value = {rest: value} if dot else value
        over[name] = laid_over(over.get(name, {}), value, inner, origin, origins, f"{prefix}{name}")
    return over


def constructed(kind: type[Kind], values: dict[str, Any], origins: dict[str, str], prefix: str = "") -> Kind:
    """A section of its values. Raises ConfigError where one is missing or the section refuses one."""
    arguments = {}
    for name, hint in hints_of(kind).items():
        if dataclasses.is_dataclass(hint):
            arguments[name] = constructed(hint, values.get(name, {}), origins, f"{prefix}{name}.")
        elif name in values:
            arguments[name] = values[name]
        else:
            raise ConfigError(f"{origins['']}: {prefix}{name} is missing: it must be {description(hint)}")
    try:
        return kind(**arguments)
    except ArtifactError:
        raise
    except ValueError as error:
        key = f"{prefix}{str(error).split()[0].rstrip(':,')}"
        raise ConfigError(f"{origins.get(key, origins[''])}: {prefix}{error}") from None


def converted(value: Any, hint: Any) -> Any:
    """The value in the type of the hint. Raises TypeError where it is of another, or outside of the hint's range."""
    ranges = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
    hint = hint.__origin__ if ranges else hint
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        for option in options:
            with suppress(TypeError):
                return converted(value, option)
    elif kind is tuple and isinstance(value, list):
        hints = options[:1] * len(value) if options[-1] is ... else options
        if len(hints) == len(value):
            return tuple(map(converted, value, hints))
    elif kind is typing.Literal and value in options:
        return value
    elif hint is float and type(value) in (int, float, str):  # YAML reads 1e-3, without a point, as text
        with suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)) and is_within(number, ranges):
                return number
    elif type(value) is hint and (hint is not int or is_within(value, ranges)):
        return value
    raise TypeError


def is_within(number: int | float, ranges: Sequence[str]) -> bool:
    """Whether a number satisfies every clause ("at least 1", "above 0, below 1") of its ranges."""
    clauses = [clause.rsplit(" ", 1) for clause in ", ".join(ranges).split(", ") if clause]
    if not {"at most", "below"} & {words for words, _ in clauses}:
        clauses.append(["at most", str(LIMIT)])
    return all(BOUNDS[words](number, type(number)(bound)) for words, bound in clauses)


def description(hint: Any) -> str:
    """The type and the range of a setting in words."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return ", ".join([description(hint.__origin__), *hint.__metadata__])
    if kind in (types.UnionType, typing.Union):
        words = list(map(description, options))
        return (", or " if "," in "".join(words) else " or ").join(words)
    if kind is tuple:
        return f"a list{'' if options[-1] is ... else f' of {len(options)}'}, each {description(options[0])}"
    if kind is typing.Literal:
        return f"one of {', '.join(map(str, options))}" if len(options) > 1 else str(options[0])
    return "a mapping" if kind is dict else WORDS[hint]


def refusal(value: Any, hint: Any) -> str:
    """What a setting must be, and what it is instead."""
    words = description(hint)
    if isinstance(value, int | float) and value > LIMIT and not ("at most" in words or "below" in words):
        words += f", at most {LIMIT}"
    return f"{words}, not {shown(value)}"


def shown(value: Any) -> str:
    """A value as messages show it, but for most of a long or deep one."""
    try:
        return reprlib.repr(value)[:300]
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__}"
