"""Settings that work are read as they are written; those that cannot work are one clear line."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest

from mimu.runs.files import InputError
from mimu.runs.settings import converted, description, load_variants

Count = Annotated[int, "at least 1"]
Amount = Count | Annotated[float, "above 0, below 1"]


@dataclass(frozen=True)
class Training:
    steps: Count
    rate: Annotated[float, "above 0"]
    momentum: Annotated[float, "at least 0, below 1"]
    sizes: tuple[Count, ...]
    kappa: tuple[Amount | Literal["auto"], ...]
    span: tuple[float, float] | None
    ranking: Literal["damage", "mean"]
    shuffled: bool
    tables: dict[str, dict[str, int | float]]

    def __post_init__(self) -> None:
        if self.span and self.span[0] > self.span[1]:
            raise ValueError(f"span must be [low, high], not {list(self.span)}")
        if self.tables.get("sft", {}).get("epochs", 1) < 1:
            raise ValueError("tables.sft.epochs must be at least 1, not 0")


@dataclass(frozen=True)
class Config:
    seed: Annotated[int, f"at least 0, at most {2**63 - 1}"]
    device: str
    threads: Count | None
    training: Training

    def __post_init__(self) -> None:
        if self.seed == 7 and self.training.steps > 5:
            raise ValueError(f"training.steps must be at most 5 with seed 7, not {self.training.steps}")


BASE = """
seed: 0
device: auto
threads: null
training: {steps: 9, rate: 1e-3, momentum: 0, sizes: [4], kappa: [auto, 20, 0.5], span: null, ranking: mean,
  shuffled: true, tables: {}}
"""
METHODS = "training: {tables: {sft: {epochs: 3, rate: 0.5}}}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "config.yaml").write_text(BASE)
    (folder / "methods.yaml").write_text(METHODS)
    return [folder / "config.yaml", folder / "methods.yaml"]


def read(bases: list[Path], *overrides: str) -> Config:
    return load_variants(Config, bases, bases[0], overrides)[""]


def refused(path: Path, bases: list[Path], *overrides: str, renamed: dict[str, str] | None = None) -> str:
    """What is said of a config that cannot work: one line."""
    with pytest.raises(InputError) as error:
        load_variants(Config, bases, path, overrides, renamed)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def mine(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_layers_go_over_one_another(bases, tmp_path, monkeypatch):
    config = read(bases)
    assert config.training.kappa == ("auto", 20, 0.5) and config.training.rate == 0.001
    assert type(config.training.momentum) is float and config.training.tables == {"sft": {"epochs": 3, "rate": 0.5}}
    path = mine(tmp_path, "seed: 4\ntraining: {steps: 7, sizes: [5, 6], tables: {sft: {epochs: 2}, scrub: {a: 1}}}")
    changes = ["training.steps=6", "training.span=[1, 2]", "training.tables.sft.rate=1"]
    over = load_variants(Config, bases, path, changes)[""]
    assert (over.seed, over.training.steps, over.training.sizes, over.training.span) == (4, 6, (5, 6), (1.0, 2.0))
    assert over.training.tables == {"sft": {"epochs": 2, "rate": 1}, "scrub": {"a": 1}}
    assert over.training.rate == config.training.rate and over.device == config.device
    assert load_variants(Config, bases, mine(tmp_path, "# nothing\n")) == {"": config}
    monkeypatch.chdir(mine(tmp_path, BASE).rename(tmp_path / "config.yaml").parent)
    assert load_variants(Config, bases, Path("config.yaml"), ["seed=1"]) == {"": replace(config, seed=1)}


def test_a_variant_goes_over_its_file_and_an_override_over_both_with_dotted_keys_in_each(bases, tmp_path):
    text = """
seed: 4
training.steps: 7
training.tables.sft.epochs: 2
variants:
  as it is:
  a.b: {training.steps: 8, training: {rate: 3}}
  1: {}
"""
    path, over = mine(tmp_path, text), ["training.rate=2"]
    plain = ["seed=4", "training.tables.sft.epochs=2", "training.rate=2"]
    as_it_is, longer = read(bases, *plain, "training.steps=7"), read(bases, *plain, "training.steps=8")
    assert load_variants(Config, bases, path, over) == {"as it is": as_it_is, "a.b": longer, "1": as_it_is}
    assert load_variants(Config, bases, bases[0]) == {"": read(bases)}


RENAMED = {"training.pace": "training.rate", "learning": "training", "training.tables.sft.look": "is gone: use rate"}


def test_a_setting_of_before_is_told_what_it_is_now(bases, tmp_path):
    gone = (
        "variants: {a: {training.tables: {sft: {look: 1}}}}",
        ", variant a: training.tables.sft.look is gone: use rate",
    )
    for text, message in (("learning: {rate: 1}", ": learning is now training"), gone):
        path = mine(tmp_path, text)
        assert refused(path, bases, renamed=RENAMED) == f"{path}{message}"
    with pytest.raises(InputError, match="^override training.pace=1: training.pace is now training.rate$"):
        load_variants(Config, bases, bases[0], ["training.pace=1"], RENAMED)


BAD = [
    ("training.stesp=3", "training.stesp is not a setting; did you mean training.steps? Valid here: steps, rate"),
    ("rate=3", "rate is not a setting; did you mean training.rate or training.tables.sft.rate? Valid here: seed"),
    ("training.steps.x=3", "training.steps must be an integer, at least 1, not {'x': 3}"),
    ("training.=3", "training. is not a setting. Valid here: steps, rate"),
    ("training=3", "training must be a mapping with keys of steps, rate"),
    ("training.rate=.inf", "training.rate must be a finite number, above 0, at most 1000000000, not inf"),
    ("training.kappa=[1.5]", "each an integer, at least 1, or a finite number, above 0, below 1, or auto, not [1.5]"),
    ("training.tables.sft.epochs=x", "training.tables.sft.epochs must be an integer or a finite number, not 'x'"),
    ("training.tables.sft.epochs=0", "training.tables.sft.epochs must be at least 1, not 0"),
    ("seed=9223372036854775808", f"at most {2**63 - 1}, not 9223372036854775808"),
    ("nonsense", "'nonsense': is not an override; write section.key=value"),
    ("seed=[1", "override seed=[1: is not valid YAML (while parsing"),
]


@pytest.mark.parametrize("override, message", BAD, ids=[override for override, _ in BAD])
def test_bad_settings_name_the_override_the_key_and_what_is_valid(bases, override, message):
    said = refused(bases[0], bases, override)
    assert message in said and override in said and "over config.yaml" not in said


@pytest.mark.parametrize(
    "text, message",
    [
        ("training: [1, 2", "is not valid YAML (while parsing"),
        ("- 3", "the settings must be a mapping with keys of seed, device, threads, training, not [3]"),
        ("training:\n  steps:", "training.steps must be an integer, at least 1, not None"),
        ("training:\n  1: 2", "training.1 is not a setting"),
        ("training: {steps: 3}\nseed: 1\ntraining: {steps: 4}", "is not valid YAML (training stands twice in"),
        ("variants: 3", "variants must map names to what each changes, not 3"),
        ("variants: {'.': {}}", "variants must differ in the letters and digits of their names, without $ and line"),
        ("variants: {a b: {}, A-B: {}}", "variants must differ in the letters and digits of their names, without $"),
        ('variants: {"a\\ud800": {}}', "variants must differ in the letters and digits of their names, without $"),
        ("variants: {a: {variants: {}}}", "variant a: variants is not a setting. Valid here: seed"),
    ],
)
def test_bad_files_are_named(bases, tmp_path, text, message):
    path = mine(tmp_path, text)
    said = refused(path, bases)
    assert said.startswith(str(path)) and message in said


def test_a_file_that_is_not_there_is_named(bases, tmp_path):
    for path, why in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        assert refused(path, bases) == f"{path}: cannot be read ({why})"


def test_a_base_that_a_change_makes_impossible_is_named(bases, tmp_path):
    path = mine(tmp_path, "seed: 7")
    expected = "over config.yaml: training.steps must be at most 5 with seed 7, not 9"
    assert refused(path, bases, "device=cpu") == f"{path}, override device=cpu, {expected}"
    assert "over" not in refused(path, bases, "training.steps=8").partition(": ")[0].replace("override", "")


MANY = ", ".join(f"&{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefg", "bcdefgh"))
ODD = [
    "seed=!!bool abc", 'device="\\UFFFFFFFF"', "seed=1" + ":30" * 300 + ".5", "seed=0x" + "f" * 5000,
    'training={"a\\nb": 1}', f"training.sizes=[&a [1, 2, 3, 4, 5, 6, 7, 8, 9], {MANY}]",
    "training.kappa=" + "[" * 1000 + "]" * 1000, "seed=" + str(list(range(20_000))),
]  # fmt: skip


@pytest.mark.parametrize("override", ODD, ids=[override[:20] for override in ODD])
def test_odd_values_are_one_short_line(bases, override):
    assert len(refused(bases[0], bases, override)) < 1000 + 2 * len(override)


@pytest.mark.parametrize(
    "hint, words, valid, wrong",
    [
        (int, "an integer", [-5, 10**9], [True, 1.0, "1", None, 10**9 + 1]),
        (float, "a finite number", [0.5, 3, "1e-3", -1e300], ["nan", "-inf", True, 10**400, 2e9]),
        (Annotated[float, "above 0, at most 1"], "a finite number, above 0, at most 1", [1, 1e-9], [0, 1.1]),
        (Amount, "an integer, at least 1, or a finite number, above 0, below 1", [1, 0.1], [0, 1.0, 2.5]),
        (int | tuple[int, ...] | None, "an integer, or a list, each an integer, or null", [1, [2], None], ["x", [""]]),
        (bool, "true or false", [True], [1, "true"]),
        (tuple[Count, Count], "a list of 2, each an integer, at least 1", [[1, 2]], [[1], [1, 0], 3, [1, 2, 3]]),
        (Literal["a", "b"], "one of a, b", ["a"], ["c", ["a"], {}]),
        (str, "text", ["x", ""], [1, None, ["x"]]),
    ],
)
def test_a_value_is_read_in_its_type_and_range_or_refused(hint, words, valid, wrong):
    for value in valid:
        found = converted(value, hint)
        assert (list(found) if isinstance(found, tuple) else found) == (float(value) if hint is float else value)
    for value in wrong:
        with pytest.raises(TypeError):
            converted(value, hint)
    assert description(hint) == words
