"""Settings that work are read as they are written; those that cannot work are one clear line."""

import dataclasses
import typing
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from running import write_image

from experiment import config as configs
from experiment.config import load_config
from experiment.settings import ConfigError, converted, description, load_variants
from mimu.errors import InputError

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


def refused(path: Path, bases: list[Path], *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load_variants(Config, bases, path, overrides)
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


def test_an_override_goes_over_a_variant_over_its_file_over_what_it_extends_with_dotted_keys_in_each(bases, tmp_path):
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
    above = tmp_path / "above.yaml"
    above.write_text("extends: mine.yaml\ntraining.steps: 5")
    assert load_variants(Config, bases, above, over) == {"": read(bases, *plain, "training.steps=5")}
    mine(tmp_path, "- 3")
    assert refused(above, bases).startswith(f"{path}: the settings must be a mapping")
    above.write_text("extends: none.yaml")
    assert refused(above, bases).startswith(str(tmp_path / "none.yaml"))


BAD = [
    ("training.stesp=3", "training.stesp is not a setting; did you mean training.steps? Valid here: steps, rate"),
    ("rate=3", "rate is not a setting; did you mean training.rate or training.tables.sft.rate? Valid here: seed"),
    ("training.steps.x=3", "training.steps must be an integer, at least 1, not {'x': 3}"),
    ("training.=3", "training. is not a setting. Valid here: steps, rate"),
    ("training=3", "training must be a mapping with keys of steps, rate"),
    ("training.rate=.inf", "training.rate must be a finite number, above 0, at most 1000000000, not inf"),
    ("training.rate=1e30", "training.rate must be a finite number, above 0, at most 1000000000, not '1e30'"),
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
    "seed=!!bool abc", 'device="\\UFFFFFFFF"', "seed=1" + ":30" * 300 + ".5",
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


CONFIGS = sorted(path for path in configs.CONFIG.parent.glob("*.yaml") if path.name != "methods.yaml")


def assert_holds(read: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            assert_holds(read[key], value)
        else:
            assert (list(read[key]) if isinstance(read[key], tuple) else read[key]) == value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_can_run(path):
    changes = yaml.safe_load(path.read_text())
    variants = changes.pop("variants", {"": {}})
    changes.pop("extends", None)
    loaded = configs.load_variants(path)
    assert list(loaded) == list(variants)
    for name, config in loaded.items():
        assert_holds(dataclasses.asdict(config), variants[name] or changes)


KEYS = []
for name, section in typing.get_type_hints(configs.Config).items():
    if dataclasses.is_dataclass(section):
        KEYS += [f"{name}.{field.name}" for field in dataclasses.fields(section)]
ANY = st.none() | st.integers() | st.floats() | st.sampled_from(["auto", "all", ""])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(KEYS), st.recursive(ANY, st.lists, max_leaves=3))
def test_any_setting_makes_a_config_or_is_one_line(key, value):
    override = f"{key}={yaml.safe_dump(value, default_flow_style=True)}"
    try:
        load_config(overrides=[override])
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


def test_amounts_are_numbers_of_weights_and_auto_comes_last():
    config = load_config(overrides=["sweep.kappa=[auto, 900, 0.1]", "sweep.top_k=[0.25, 2048, 7, 1.0e-9]", "seed=4"])
    assert config.kappas == [819, 900, "auto"] and config.top_ks == [2048, 7, 1] and config.seeds == (4,)
    assert config.num_vertices == 8192 and config.torch_device().type in ("cpu", "cuda")
    assert config.graphs.num_features == 13


WRONG = [
    ("sweep.kappa=[8192]", "sweep.kappa must be from 1 to 8191 (masked weights less one), not 8192"),
    ("eval.max_kappa=8192", "eval.max_kappa must be from 1 to 8191 (masked weights less one), not 8192"),
    ("classifier.hidden_sizes=[32, 16]", "over config.yaml: sweep.kappa must be from 1 to 511"),
    ("sweep.top_k=[9000]", "sweep.top_k must be from 1 to 8192 (masked weights), not 9000"),
    ("sweep.kappa=[5, 5]", "sweep.kappa must name at least one value, and each once"),
    ("sweep.forget_digits=[nine]", "sweep.forget_digits must be from 0 to 9 or of ('0', '1', '2', '3', "),
    ("dataset=CIFAR100", "dataset must be MNIST, FashionMNIST, KMNIST, "),
    ("graphs.mask_layer=3", "graphs.mask_layer must be null, or one or several of -3 to 2, each once, not 3"),
    ("graphs.mask_layer=[0, -3]", "or one or several of -3 to 2, each once, not (0, -3)"),
    ("graphs.features=[wait]", "graphs.features must be some of input_activation, "),
    ("graphs.features=[weight, weight]", "each once, not ['weight', 'weight']"),
    ("gcn.kappa=[100, 50]", "gcn.kappa must be [low, high], both numbers or both shares, not [100, 50]"),
    ("gcn.kappa=[100, 8190]", "gcn.kappa and partly_masked reach 8220 weights together, of 8192 masked ones"),
    ("gcn={necessity_forget: 0, necessity_retain: 0}", "gcn.necessity_forget or necessity_retain must be above 0"),
    ("eval.methods=[mimu, magic]", "eval.methods must name mimu and others of original, mimu, random"),
    ("eval.hyperparameters.tfs.epochs=2", "eval.hyperparameters.tfs is not a method: valid are original, mimu"),
    ("report.dpi=19", "report.dpi must be an integer, at least 20, at most 1200, not 19"),
    ("report.format=[gif]", "report.format must be "),
    ("device=meta", "device must be auto, cpu, or cuda or mps that is there, not 'meta'"),
]


@pytest.mark.parametrize("override, message", WRONG, ids=[override for override, _ in WRONG])
def test_what_cannot_work_is_one_line_that_names_the_key_and_what_is_valid(override, message):
    with pytest.raises(ConfigError) as error:
        configs.load_variants(configs.CONFIG, [override])
    assert message in str(error.value) and override in str(error.value) and len(str(error.value).splitlines()) == 1


def test_pixels_and_classes_are_those_of_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("data.DATASET_ROOT", tmp_path)
    for part, name in product(("train", "test"), ("1", "10", "2", "cat")):
        write_image(tmp_path / "mine" / part / name / "0.png", np.zeros((6, 8), np.uint8))
    own = ("dataset=mine", "graphs.mask_layer=null", "classifier.hidden_sizes=[5]", "sweep.kappa=[auto]")
    for digits, labels in (("[1]", [0]), ("[2, 10]", [2, 1]), ("[cat, 0, 3]", [3, 0]), ("['1', 1]", [0]), ("[3]", [3])):
        assert load_config(overrides=[*own, f"sweep.forget_digits={digits}"]).forget_digits == labels, digits
    config = load_config(overrides=[*own, "sweep.forget_digits=[cat]"])
    assert config.num_vertices == 8 * 6 * 5 + 5 * 4 and config.architecture == "48-5-4"
    with pytest.raises(ConfigError, match="over config.yaml: sweep.forget_digits must be from 0 to 3 or of .*, not 9$"):
        load_config(overrides=own)
    with pytest.raises(ConfigError, match=r"sweep.kappa=\[260\]: sweep.kappa must be from 1 to 259"):
        load_config(overrides=[*own, "sweep.forget_digits=[cat]", "sweep.kappa=[260]"])
    fashion = load_config(overrides=["dataset=FashionMNIST", "sweep.forget_digits=[bag, 0]", "classifier.bias=true"])
    assert fashion.forget_digits == [8, 0] and fashion.architecture == "784-128-64-10 with biases"
    (tmp_path / "mine" / "test" / "cat").rename(tmp_path / "mine" / "test" / "dog")
    with pytest.raises(ConfigError, match="^override dataset=mine: dataset mine in .*: .* the same classes, not cat, "):
        load_config(overrides=["dataset=mine"])
