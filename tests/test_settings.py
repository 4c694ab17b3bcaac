"""Settings that work are read as they are written; those that cannot work are one clear line."""

import dataclasses
import json
import typing
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from running import write_image

from experiment.config import CONFIG, Config, load_config, load_variants
from experiment.settings import checked
from mimu.errors import InputError

SFT = {"epochs": 1, "batch_size": 512, "learning_rate": 0.01}  # its hyperparameters in configs/config.yaml


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def mine(tmp_path) -> Path:
    return tmp_path / "mine.yaml"


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load_variants(path, overrides)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_a_file_goes_over_the_defaults_and_overrides_over_both(mine):
    config = load_config(["classifier.momentum=0", "classifier.learning_rate=2e-3"])
    assert config.sweep.kappa[:2] == ("auto", 50) and config.classifier.learning_rate == 0.002
    assert type(config.classifier.momentum) is float and config.eval.hyperparameters["sft"] == SFT
    write(mine, "seed: 4\nclassifier: {epochs: 7, hidden_sizes: [50, 60]}\neval: {hyperparameters: {sft: {epochs: 2}}}")
    changes = ["classifier.epochs=6", "gcn.kappa=[1, 2]", "eval.hyperparameters.sft.learning_rate=1", "threads=2"]
    over = load_variants(mine, [*changes, "classifier.weight_decay=2E+1"])[""]
    assert (over.seed, over.classifier.epochs, over.classifier.hidden_sizes, over.gcn.kappa) == (4, 6, (50, 60), (1, 2))
    assert over.eval.hyperparameters["sft"] == SFT | {"epochs": 2, "learning_rate": 1}
    assert over.classifier.weight_decay == 20 and over.classifier.batch_size == config.classifier.batch_size
    assert load_variants(write(mine, "# nothing\n")) == load_variants() == {"": load_config()}


def test_an_override_goes_over_a_variant_over_its_file_over_what_it_extends_with_dotted_keys_in_each(tmp_path, mine):
    text = """
seed: 4
gcn.steps: 7
eval.hyperparameters.sft.epochs: 2
variants:
  as it is:
  a.b: {gcn.steps: 8, gcn: {learning_rate: 3}}
  1: {}
"""
    write(mine, text)
    rate = "gcn.learning_rate=2"
    plain = ["seed=4", "eval.hyperparameters.sft.epochs=2", rate]
    as_it_is, longer, shorter = (load_config([*plain, f"gcn.steps={steps}"]) for steps in (7, 8, 5))
    assert load_variants(mine, [rate]) == {"as it is": as_it_is, "a.b": longer, "1": as_it_is}
    for below, above in (("mine.yaml", "a.yaml"), ("../mine.yaml", "sub/a.yaml"), (str(mine), "other/a.yaml")):
        path = write(tmp_path / above, f"extends: {below}\ngcn.steps: 5")
        assert load_variants(path, [rate]) == {"": shorter}
    write(tmp_path / "sub" / "b.yaml", "seed: 4\neval: {hyperparameters: {sft: {epochs: 2}}}")
    assert load_variants(write(mine, "extends: sub/b.yaml\ngcn.steps: 5"), [rate]) == {"": shorter}


WRONG_VALUES = (
    "gcn=3", "gcn.steps=true", "gcn.steps=1000000001", "gcn.temperature=.nan", "gcn.temperature=2000000000",
    "eval.momentum=1", "eval.step=-1", "sweep.kappa=[1.5]", "sweep.seeds=[]", "sweep.kappa=[8192]",
    "sweep.top_k=9000", "gcn.kappa=[1]", "gcn.kappa=[100, 50]", "classifier.bias=1", "classifier.architecture=x",
    "classifier.hidden_sizes=[999999999]", "classifier.blocks=1000000000", f"classifier.channels={[8] * 21}",
    "graphs.mask_layer=[0, -3]", "sweep.forget_digits=[nine]", "eval.methods=[mimu, magic]", "report.dpi=5",
    "eval.hyperparameters.sft.epochs=0", "dataset=CIFAR100", "device=meta", "threads=x", "seed=9223372036854775808",
)  # fmt: skip


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_a_wrong_value_is_named_with_its_setting(override):
    key, _, value = override.partition("=")
    message, named = refusal(CONFIG, override).partition(f"{override}: ")[2], value.strip("[].").split(", ")[-1]
    assert message.startswith((key, key.rpartition(".")[2])) and named.lower() in message.lower()


BAD_OVERRIDES = [
    ("eval.stesp=3", "eval.stesp is not a setting: valid are hyperparameters, step, "),
    ("epochs=3", "epochs is not a setting: valid are eval, seed, device, threads, "),
    ("eval.hyperparameters.mimu.epochs=3", "eval.hyperparameters.mimu.epochs is not a setting: valid are none"),
    ("eval.=3", "eval. is not a setting"),
    ("eval.hyperparameters.tfs.epochs=2", "eval.hyperparameters.tfs is not a method: valid are original, mimu"),
    ("eval.hyperparameters.sft.epoch=2", "sft.epoch is not a setting: valid are epochs, batch_size, "),
    ("gcn.kappa=[100, 8190]", "gcn.kappa and partly_masked must be at most 8191, "),
    ("gcn={necessity_forget: 0, necessity_retain: 0}", "gcn.necessity_forget or necessity_retain must be above 0"),
    ("classifier.hidden_sizes=[32, 16]", "sweep.kappa must be at most 511, of 512 masked weights"),
    ("nonsense", "'nonsense': is not an override; write section.key=value"),
    ('device="\\UFFFFFFFF"', "is not valid YAML"),
    ("seed=1" + ":30" * 300 + ".5", "is not valid YAML"),
    ('gcn={"a\\nb": 1}', "gcn.a b is not a setting"),
    ("gcn={steps: &a [*a]}", "is not valid YAML"),
    ("sweep.seeds=" + "[" * 1000 + "]" * 1000, "is not valid YAML"),
    ("seed=" + str(list(range(2000))), "seed"),
]


@pytest.mark.parametrize("override, message", BAD_OVERRIDES, ids=[override[:30] for override, _ in BAD_OVERRIDES])
def test_bad_overrides_are_one_line_that_says_what_is_valid(override, message):
    line = refusal(CONFIG, override)
    assert message in line and " ".join(override.split()) in line and len(line) < 1000 + len(override)


NAMES = "variants must map names, without $ and different in their first 60 letters and digits, to what each changes"


@pytest.mark.parametrize(
    "text, message",
    [
        ("gcn: [1, 2", "is not valid YAML (while parsing"),
        ("- 3", "the settings must be a mapping, not [3]"),
        ("classifier: {hidden_sizes: [32, 16]}", "sweep.kappa must be at most 511, of 512"),
        ("gcn:\n  steps:", "gcn.steps"),
        ("variants: 3", f"{NAMES}, not 3"),
        ('variants: {"a\\ud800": {}}', NAMES),
        ("variants: {a b: {}, A-B: {}}", NAMES),
        (f"variants: {{{'a' * 300}: {{}}, {'a' * 301}: {{}}}}", NAMES),
        ("variants: {a: {variants: {}}}", "mine.yaml, variant a: variants is not a setting"),
        ("variants: {a: 3}", "mine.yaml, variant a: the settings: Input should be an object, not 3"),
        ("extends: mine.yaml", "extends is not a setting: valid are "),
    ],
)
def test_bad_files_are_named(mine, text, message):
    line = refusal(write(mine, text))
    assert line.startswith(str(mine)) and message in line


def test_a_file_that_cannot_be_read_is_named_also_where_it_is_extended(tmp_path, mine):
    assert refusal(mine) == f"{mine}: cannot be read (No such file or directory)"
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"
    assert f"{tmp_path / '3'}: cannot be read" in refusal(write(mine, "extends: 3"))
    assert "sub/none.yaml: cannot be read" in refusal(write(mine, "extends: sub/none.yaml"))


CONFIGS = sorted(path for path in CONFIG.parent.glob("*.yaml") if path.name != "methods.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_can_run_and_is_built_again_from_its_json(path):
    loaded = load_variants(path)
    assert list(loaded) == list(yaml.safe_load(path.read_text()).get("variants", {"": {}}))
    for config in loaded.values():
        assert checked(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config


KEYS = []
for name, section in typing.get_type_hints(Config).items():
    if dataclasses.is_dataclass(section):
        KEYS += [f"{name}.{field.name}" for field in dataclasses.fields(section)]
ANY = st.none() | st.integers() | st.floats() | st.sampled_from(["auto", "all", ""])


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(KEYS), st.recursive(ANY, st.lists, max_leaves=3))
def test_any_setting_makes_a_config_or_is_one_line(key, value):
    override = f"{key}={yaml.safe_dump(value, default_flow_style=True)}"
    try:
        load_config(overrides=[override])
    except InputError as error:
        assert len(str(error).splitlines()) == 1


def test_amounts_are_numbers_of_weights_and_auto_comes_last():
    config = load_config(overrides=["sweep.kappa=[auto, 900, 0.1]", "sweep.top_k=1.0e-9", "seed=4"])
    assert config.kappas == [819, 900, "auto"] and config.top_k == 1 and config.seeds == (4,)
    assert config.num_vertices == 8192 and load_config().top_k == 2048 and config.torch_device().type in ("cpu", "cuda")


def test_pixels_and_classes_are_those_of_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("experiment.config.DATASET_ROOT", tmp_path)
    for part, name in product(("train", "test"), ("1", "10", "2", "cat")):
        write_image(tmp_path / "mine" / part / name / "0.png", np.zeros((6, 8), np.uint8))
    own = ("dataset=mine", "graphs.mask_layer=null", "classifier.hidden_sizes=[5]", "sweep.kappa=[auto]")
    for digits, labels in (("[1]", [0]), ("[2, 10]", [2, 1]), ("[cat, 0, 3]", [3, 0]), ("['1', 1]", [0]), ("[3]", [3])):
        assert load_config(overrides=[*own, f"sweep.forget_digits={digits}"]).forget_digits == labels, digits
    config = load_config(overrides=[*own, "sweep.forget_digits=[cat]"])
    assert config.num_vertices == 8 * 6 * 5 + 5 * 4 and config.architecture == "48-5-4"
    assert "sweep.kappa=[auto]: sweep.forget_digits must be from 0 to 3 or of " in refusal(CONFIG, *own)
    line = refusal(CONFIG, *own, "sweep.forget_digits=[cat]", "sweep.kappa=[260]")
    assert "sweep.kappa=[260]: sweep.kappa must be at most 259, of 260" in line
    fashion = load_config(overrides=["dataset=FashionMNIST", "sweep.forget_digits=[bag, 0]", "classifier.bias=true"])
    assert fashion.forget_digits == [8, 0] and fashion.architecture == "784-128-64-10 with biases"
    (tmp_path / "mine" / "test" / "cat").rename(tmp_path / "mine" / "test" / "dog")
    assert "dataset=mine: dataset mine in " in refusal(CONFIG, "dataset=mine")
