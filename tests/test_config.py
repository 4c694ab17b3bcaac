"""The settings of the project: every config can run, and what cannot work is one line before any work."""

import dataclasses
import typing
from itertools import product

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from running import write_image

from mimu.configs import CONFIG, Config, load_config, load_variants
from mimu.runs.settings import ConfigError

CONFIGS = sorted(path for path in CONFIG.parent.glob("*.yaml") if path.name != "methods.yaml")


def assert_holds(read: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            assert_holds(read[key], value)
        else:
            assert (list(read[key]) if isinstance(read[key], tuple) else read[key]) == value


def over(below: object, above: object) -> object:
    """What stands in one mapping, with what another changes of it."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: over(below.get(key), value) for key, value in above.items()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_can_run(path):
    changes = yaml.safe_load(path.read_text())
    variants = changes.pop("variants", {"": {}})
    configs = load_variants(path)
    assert list(configs) == list(variants)
    for name, config in configs.items():
        assert_holds(dataclasses.asdict(config), over(changes, variants[name] or {}))


SECTIONS = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
KEYS = []
for name, section in SECTIONS.items():
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


BAD = [
    ("sweep.kappa=[8192]", "sweep.kappa must be from 1 to 8191 (masked weights less one), not 8192"),
    ("eval.max_kappa=8192", "eval.max_kappa must be from 1 to 8191 (masked weights less one), not 8192"),
    ("classifier.hidden_sizes=[32, 16]", "over config.yaml: sweep.kappa must be from 1 to 511"),
    ("sweep.top_k=[9000]", "sweep.top_k must be from 1 to 8192 (masked weights), not 9000"),
    ("sweep.kappa=[5, 5]", "sweep.kappa must name at least one value, and each once"),
    ("sweep.forget_digits=[nine]", "sweep.forget_digits must be from 0 to 9 or of ('0', '1', '2', '3', "),
    ("gcn.weighs=[0, 7]", "gcn.weighs is gone: every GCN weighs, from eval.retain_weight on"),
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


@pytest.mark.parametrize("override, message", BAD, ids=[override for override, _ in BAD])
def test_what_cannot_work_is_one_line_that_names_the_key_and_what_is_valid(override, message):
    with pytest.raises(ConfigError) as error:
        load_variants(CONFIG, [override])
    assert message in str(error.value) and override in str(error.value) and len(str(error.value).splitlines()) == 1


def test_pixels_and_classes_are_those_of_the_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("mimu.images.sources.DATASET_ROOT", tmp_path)
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
