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
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml

from experiment.files import slug
from mimu.errors import InputError, one_line
from mimu.files import naming
from mimu.settings import library_settings

Kind = TypeVar("Kind")
Layer = tuple[str, Any]  # how messages call where settings come from, and the settings
BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
LIMIT = 1_000_000_000  # of numbers whose range has no upper bound
WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", types.NoneType: "null"}
hints_of = cache(partial(typing.get_type_hints, include_extras=True))


class ConfigError(InputError):
    """A setting that cannot work; the message names the file, the key and what would be valid."""


def load_variants(
    kind: type[Kind], bases: Sequence[Path], path: Path, overrides: Sequence[str] = ()
) -> dict[str, Kind]:
    """The configs of a file by the names of its variants; where it has none, one named "". Raises ConfigError.

    Over the bases in their order goes what `path` changes (which may be one of them), what a variant does, overrides.
    A file that `extends` another one beside it goes over what that changes outside of its variants.
    """
    of_library = {"eval": {"hyperparameters": {"erase": library_settings()["erase"]}}}
    layers = {None: ("settings.yaml", of_library)} | {base: (base.name, read_yaml(base)) for base in bases}
    settings = read_yaml(path)
    if isinstance(settings, dict) and "extends" in settings:
        below = path.with_name(str(settings.pop("extends")))
        _, outside = layers.setdefault(below, (str(below), read_yaml(below)))
        if isinstance(outside, dict):
            outside.pop("variants", None)
    _, settings = layers.setdefault(path, (str(path), settings))
    over = [parsed_override(override) for override in overrides]
    if not isinstance(settings, dict) or "variants" not in settings:
        return {"": built(kind, bases, [*layers.values(), *over])}
    variants = settings.pop("variants")
    if not isinstance(variants, dict) or not variants:
        raise ConfigError(f"{path}: variants must map names to what each changes, not {shown(variants)}")
    slugs = set(map(slug, variants)) - {""}
    if len(slugs) < len(variants) or not "".join(variants).isprintable() or "$" in "".join(variants):
        must = "differ in the letters and digits of their names, without $ and line breaks"
        raise ConfigError(f"{path}: variants must {must}, not {shown(list(variants))}")
    configs = {}
    for name, changes in variants.items():
        of_variant = (f"{path}, variant {name}", {} if changes is None else changes)
        configs[name] = built(kind, bases, [*layers.values(), of_variant, *over])
    return configs


class Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, but that every key is text, and that one which stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        found = set()
        for key, _ in node.value:
            if key.value in found:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            found.add(key.value)
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def parsed(text: str | bytes, origin: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # PyYAML lets Python's own through where a date, a number or a nesting is odd
        raise ConfigError(f"{origin}: is not valid YAML ({one_line(error)})") from None


def read_yaml(path: Path) -> Any:
    """What stands in a YAML file, nothing as an empty mapping. Raises InputError."""
    with naming(path, "read"):
        content = path.read_bytes()
    settings = parsed(content, str(path))
    return {} if settings is None else settings


def parsed_override(override: str) -> Layer:
    """`section.key=value`, the value read as YAML, as a layer. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: is not an override; write section.key=value")
    origin = f"override {' '.join(override.split())}"
    return origin, {key: parsed(text, origin)}


def built(kind: type[Kind], bases: Sequence[Path], layers: Sequence[Layer]) -> Kind:
    """The dataclass of all layers, the later ones over the earlier. Raises ConfigError."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, settings in layers:
        values = laid_over(values, settings, kind, origin, origins)
    try:
        return constructed(kind, values)
    except ValueError as error:
        names = ["settings.yaml", *(base.name for base in bases)]
        origin = origins.get(str(error).split()[0].rstrip(":,"), names[1])
        changes = dict.fromkeys(change for change, _ in layers if change not in names)
        if changes and origin in names:  # what a base sets may be impossible only with what was changed beside it
            origin = f"{', '.join(changes)}, over {origin}"
        raise ConfigError(f"{origin}: {error}") from None


def laid_over(below: Any, above: Any, hint: Any, origin: str, origins: dict[str, str], key: str = "") -> Any:
    """A setting in its type; a mapping with what it changes of the one below it. Raises ConfigError.

    `eval.step: 15` is what `eval: {step: 15}` is; `origins` is told of every dotted key from which layer it comes.
    """
    origins[key] = origin
    is_section = dataclasses.is_dataclass(hint)
    if not is_section and typing.get_origin(hint) is not dict:
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
        inner = f"{prefix}{name}"
        if is_section and name not in hints:
            near = [f"{prefix}{each}" for each in difflib.get_close_matches(name, hints, n=1)]
            near = [each for each in origins if each and f".{each}".endswith(f".{name}")][:5] or near
            meant = f"; did you mean {' or '.join(near)}?" if near else "."
            given = " ".join(inner.split())
            raise ConfigError(f"{origin}: {given} is not a setting{meant} Valid here: {', '.join(hints)}")
        of_inner = hints[name] if is_section else typing.get_args(hint)[1]
        value = {rest: value} if dot else value
        over[name] = laid_over(over.get(name, {}), value, of_inner, origin, origins, inner)
    return over


def constructed(kind: type[Kind], values: dict[str, Any], prefix: str = "") -> Kind:
    """A section of its values. Raises ValueError where the section refuses one."""
    arguments = dict(values)
    for name, hint in hints_of(kind).items():
        if dataclasses.is_dataclass(hint):
            arguments[name] = constructed(hint, values[name], f"{prefix}{name}.")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def converted(value: Any, hint: Any) -> Any:
    """The value in the type of the hint. Raises TypeError where it is of another, or outside of the hint's range."""
    ranges = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
    hint = hint.__origin__ if ranges else hint
    kind = typing.get_origin(hint)
    options = typing.get_args(hint)
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
    if hint is float and type(value) in (int, str):  # YAML reads 1e-3, without a point, as text
        with suppress(ValueError, OverflowError):
            value = float(value)
    if type(value) is hint and (hint not in (int, float) or is_within(value, ", ".join(ranges))):
        return value
    raise TypeError


def is_within(number: int | float, words: str) -> bool:
    """Whether a number is finite and satisfies every clause of a range: "at least 1", "above 0, below 1"."""
    clauses = [clause.rsplit(" ", 1) for clause in bounded(words).split(", ") if clause]
    return number > -math.inf and all(BOUNDS[bound](number, type(number)(limit)) for bound, limit in clauses)


def bounded(words: str) -> str:
    """A range with an upper bound."""
    return words if "at most" in words or "below" in words else f"{words}, at most {LIMIT}"


def description(hint: Any) -> str:
    """The type and the range of a setting in words."""
    kind = typing.get_origin(hint)
    options = typing.get_args(hint)
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
    is_large = False
    with suppress(TypeError, ValueError):  # of what is no number; 1e30, without a point, is text
        is_large = (float(value) if isinstance(value, str) else value) > LIMIT
    return f"{bounded(words) if is_large else words}, not {shown(value)}"


def shown(value: Any) -> str:
    """A value as messages show it, but for most of a long or deep one."""
    return reprlib.repr(value)[:300]
