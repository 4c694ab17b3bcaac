"""YAML files and `section.key=value` overrides into one frozen dataclass, with every check before any work starts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from artifacts import InputError, one_line
from data import DATASETS, IMAGE_SIZE, NUM_CLASSES, Amount, GraphConfig, check_amount, number_of_weights
from eval import EvalConfig, slug
from model import WeightGraph
from reporter import ReporterConfig
from trainer import GCNTrainerConfig, TrainerConfig

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 100
SHORT.maxlist = SHORT.maxtuple = SHORT.maxdict = 20
SHORT.maxlevel = 3
BASE = Path(__file__).resolve().parent / "configs" / "config.yaml"


class UniqueKeys(yaml.SafeLoader):
    """YAML as PyYAML reads it, but that a key which stands twice is an error, where PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, (key, mark) in enumerate(keys):
            if key in [before for before, _ in keys[:index]]:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", mark)
        return super().construct_mapping(node, deep)


class ConfigError(InputError):
    """A setting that cannot work; the message names the file, the key and what would be valid."""


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The experiments: one for every seed, top_k, forget digit and kappa.

    top_k: numbers or shares of the masked weights; kappa: the same, and `auto` for the smallest that forgets
    seeds None: the one seed of the config
    """

    forget_digits: tuple[int, ...]
    top_k: tuple[Amount, ...]
    kappa: tuple[Amount | Literal["auto"], ...]
    seeds: tuple[int, ...] | None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{field.name} must name at least one value, and each once, not {list(values)}")
        for digit in self.forget_digits:
            if not 0 <= digit < NUM_CLASSES:
                raise ValueError(f"forget_digits must be from 0 to {NUM_CLASSES - 1}, not {digit}")
        for name in ("top_k", "kappa"):
            for amount in getattr(self, name):
                if amount != "auto":
                    check_amount(name, amount)

    def fixed_kappas(self, num_vertices: int) -> list[int]:
        """The kappas that are not chosen for each request, as numbers of weights, from small to large."""
        return sorted({number_of_weights(kappa, num_vertices) for kappa in self.kappa if kappa != "auto"})

    def top_ks(self, num_vertices: int) -> list[int]:
        """Every K as a number of weights."""
        return list(dict.fromkeys(number_of_weights(top_k, num_vertices) for top_k in self.top_k))


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    held_out: how many training samples are scored in the place of the test split; 0: the test split
    """

    seed: int
    device: str
    threads: int | None
    dataset: str
    held_out: int
    classifier: TrainerConfig
    graphs: GraphConfig
    gcn: GCNTrainerConfig
    sweep: SweepConfig
    eval: EvalConfig
    report: ReporterConfig

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {self.dataset!r}")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"threads must be from 1 to 1024 or null, not {self.threads}")
        for name, seeds in (("seed", [self.seed]), ("sweep.seeds", self.sweep.seeds or [])):
            for seed in seeds:
                if not 0 <= seed < 2**63:
                    raise ValueError(f"{name} must be from 0 to {2**63 - 1}, not {seed}")
        self.torch_device()
        try:
            vertices = self.num_vertices
        except ValueError as error:
            raise ValueError(f"graphs.{error}") from None
        if not 0 <= self.held_out <= 50000:
            raise ValueError(f"held_out must be from 0 to 50000 training samples, not {self.held_out}")
        for name, amounts in (("sweep.kappa", self.sweep.kappa), ("eval.max_kappa", [self.eval.max_kappa])):
            for kappa in amounts:
                if kappa != "auto" and not number_of_weights(kappa, vertices) < vertices:
                    raise ValueError(f"{name} must be from 1 to {vertices - 1} (masked weights less one), not {kappa}")
        for top_k in self.sweep.top_ks(vertices):
            if top_k > vertices:
                raise ValueError(f"sweep.top_k must be from 1 to {vertices} (masked weights), not {top_k}")
        if self.eval.erasure and not self.graphs.erasure:
            raise ValueError(f"eval.erasure must be 0 where graphs.erasure is false, not {self.eval.erasure}")
        if self.eval.erasure and not self.gcn.pretrained and self.gcn.erasure is None:
            raise ValueError(f"eval.erasure must be 0 where gcn.erasure is null, not {self.eval.erasure}")
        if self.gcn.erasure is not None and not self.graphs.erasure:
            raise ValueError(f"gcn.erasure must be null where graphs.erasure is false, not {list(self.gcn.erasure)}")
        spans = [self.gcn.kappa] + ([] if self.gcn.partly_masked is None else [self.gcn.partly_masked])
        largest = sum(number_of_weights(high, vertices) for _, high in spans)
        if largest >= vertices:
            raise ValueError(f"gcn.kappa and partly_masked reach {largest} weights together, of {vertices} masked ones")

    @property
    def num_vertices(self) -> int:
        """The number of masked weights. Raises ValueError where mask_layer is not there."""
        return WeightGraph(self.classifier.shapes(IMAGE_SIZE, NUM_CLASSES), self.graphs.mask_layer).num_vertices

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.seed,) if self.sweep.seeds is None else self.sweep.seeds

    def torch_device(self) -> torch.device:
        """The device to run on: `auto` takes CUDA, else MPS, else the CPU. Raises ValueError where it is not there."""
        if self.device == "auto":
            mps = torch.backends.mps.is_available()
            return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
        try:
            device = torch.device(self.device)
            if device.type not in ("cpu", "cuda", "mps"):
                raise RuntimeError(f"{device.type} is not supported")
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ValueError(f"device must be auto, cpu, or cuda or mps that is there, not {self.device!r}") from None
        return device


def load_config(path: Path = BASE, overrides: Sequence[str] = ()) -> Config:
    """Reads `config.yaml`, over it what `path` changes (but for its variants), over that the overrides.

    Raises ConfigError.
    """
    return layered(path, [(file_name(path), without_variants(read_yaml(path)))], overrides)


def load_variants(path: Path = BASE, overrides: Sequence[str] = ()) -> dict[str, Config]:
    """The configs that a file describes: one for each of its variants by name, or where it has none, one named "".

    A variant changes what `load_config` reads of the file. Raises ConfigError.
    """
    settings = read_yaml(path)
    variants = settings.get("variants") if isinstance(settings, dict) else None
    base = (file_name(path), without_variants(settings))
    if variants is None:
        return {"": layered(path, [base], overrides)}
    if not isinstance(variants, dict) or not variants:
        raise ConfigError(f"{path}: variants must map names to what each changes, not {shown(variants)}")
    names = list(map(str, variants))
    for name in names:
        if not name.isprintable() or len(name) > 100 or "$" in name or not slug(name):
            raise ConfigError(f"{path}: the name of a variant must be up to 100 characters without $, not {name!a}")
    if len(set(map(slug, names))) < len(names):
        raise ConfigError(f"{path}: variants must differ in the letters and digits of their names: {names}")
    return {
        name: layered(path, [base, (f"{path}, variant {name}", {} if changes is None else changes)], overrides)
        for name, changes in zip(names, variants.values())
    }


def shown(value: Any) -> str:
    """A value as messages show it, but for most of a long or deep one."""
    try:
        return SHORT.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__}"


def file_name(path: Path) -> str:
    """How messages call a config."""
    return BASE.name if path == BASE else str(path)


def without_variants(settings: Any) -> Any:
    """The settings that all variants share."""
    if not isinstance(settings, dict):
        return settings
    return {key: value for key, value in settings.items() if key != "variants"}


def layered(path: Path, layers: Sequence[tuple[str, Any]], overrides: Sequence[str]) -> Config:
    """`config.yaml` under (origin, settings) layers under the overrides. Raises ConfigError."""
    sources = [] if path == BASE else [(BASE.name, read_yaml(BASE))]
    sources += [*layers, *(parse_override(override) for override in overrides)]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, settings in sources:
        for key, value in flattened(settings, Config, origin):
            values[key], origins[key] = value, origin
    try:
        return build(Config, values, origins)
    except ConfigError as error:
        over = dict.fromkeys(origin for origin, _ in sources if origin != BASE.name)
        if over and str(error).startswith(f"{BASE.name}: "):
            # Its own value, but with what was changed beside it.
            raise ConfigError(f"{', '.join(over)}, over {error}") from None
        raise


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError."""
    try:
        settings = yaml.load(path.read_text(), UniqueKeys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except Exception as error:  # PyYAML lets Python's own through where a date, a number or a nesting is odd
        raise ConfigError(f"{path}: is not valid YAML ({one_line(error)})") from None
    return {} if settings is None else settings


def parse_override(override: str) -> tuple[str, dict[str, Any]]:
    """`section.key=value`, the value read as YAML, as (origin, nested mapping). Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: is not an override; write section.key=value")
    try:
        settings: Any = yaml.load(text, UniqueKeys)
    except Exception:
        raise ConfigError(f"{override!r}: its value is not valid YAML") from None
    for name in reversed(key.split(".")):
        settings = {name: settings}
    return f"override {' '.join(override.split())}", settings


def flattened(settings: Any, section: type, origin: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value in its field's type) for all that a mapping sets of a section. Raises ConfigError."""
    hints = typing.get_type_hints(section)
    if not isinstance(settings, dict):
        where = prefix.rstrip(".") or "the file"
        raise ConfigError(f"{origin}: {where} must be a mapping with keys of {', '.join(hints)}, not {shown(settings)}")
    for name, value in settings.items():
        key = f"{prefix}{' '.join(str(name).split())}"
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"{origin}: {key} is not a setting{hint} Valid here: {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[name]):
            yield from flattened(value, hints[name], origin, f"{key}.")
            continue
        yield from leaves(value, hints[name], origin, key)


def leaves(value: Any, hint: Any, origin: str, key: str) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value in the hint's type) of a setting, or of all in a mapping from names to settings.

    Raises ConfigError.
    """
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{origin}: {key} must be a mapping, not {shown(value)}")
        for name, inner in value.items():
            yield from leaves(inner, typing.get_args(hint)[1], origin, f"{key}.{name}")
        return
    try:
        yield key, converted(value, hint)
    except TypeError:
        raise ConfigError(f"{origin}: {key} must be {description(hint)}, not {shown(value)}") from None


def converted(value: Any, hint: Any) -> Any:
    """The value in the type of the hint. Raises TypeError where it is of another."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            try:
                return converted(value, option)
            except TypeError:
                continue
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, list):
            return tuple(converted(item, typing.get_args(hint)[0]) for item in value)
    elif typing.get_origin(hint) is typing.Literal:
        if value in typing.get_args(hint):
            return value
    elif hint is float:
        # YAML reads 1e-3, without a point, as text.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                raise TypeError from None
            if math.isfinite(number):
                return number
    elif type(value) is hint:
        return value
    raise TypeError


def description(hint: Any) -> str:
    """The type of a setting in words."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(description(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {description(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return {
        int: "an integer", float: "a finite number", bool: "true or false", str: "text", types.NoneType: "null"
    }[hint]  # fmt: skip


def build(section: type, values: dict[str, Any], origins: dict[str, str], prefix: str = "") -> Any:
    """Makes a section of its dotted values. Raises ConfigError where one is missing or the section refuses one."""
    arguments = {}
    for name, hint in typing.get_type_hints(section).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            arguments[name] = build(hint, values, origins, f"{key}.")
        elif typing.get_origin(hint) is dict:
            arguments[name] = tables = {}
            for dotted, value in values.items():
                if dotted.startswith(f"{key}."):
                    table, last = dotted[len(key) + 1 :].split(".", 1)
                    tables.setdefault(table, {})[last] = value
        elif key in values:
            arguments[name] = values[key]
        else:
            raise ConfigError(f"{BASE.name}: {key} is missing: it must be {description(hint)}")
    try:
        return section(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        key = f"{prefix}{str(error).split()[0].rstrip(':,')}"
        told = [origin for name, origin in origins.items() if name == key or name.startswith(f"{key}.")]
        raise ConfigError(f"{told[0] if told else BASE.name}: {prefix}{error}") from None
