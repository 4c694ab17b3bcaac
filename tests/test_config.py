"""Settings that work are read as they are written; those that cannot work are one clear line."""

import dataclasses
import os
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config import BASE, Config, ConfigError, converted, load_config, load_variants
from main import main

CONFIGS = sorted(BASE.parent.glob("*.yaml"))
BAD = [
    ("clasifier.epochs=3", "clasifier is not a setting; did you mean classifier?"),
    ("gcn.stesp=3", "gcn.stesp is not a setting; did you mean gcn.steps?"),
    ("gcn.steps=many", "gcn.steps must be an integer, not 'many'"),
    ("gcn.steps=1.5", "gcn.steps must be an integer, not 1.5"),
    ("gcn.steps=true", "gcn.steps must be an integer, not True"),
    ("gcn.steps=0", "gcn.steps must be at least 1, not 0"),
    ("gcn=3", "gcn must be a mapping with keys of pretrained, hidden, rounds"),
    ("classifier.learning_rate=-1", "classifier.learning_rate must be above 0, not -1.0"),
    ("classifier.learning_rate=.nan", "classifier.learning_rate must be a finite number, not nan"),
    ("classifier.learning_rate=.inf", "classifier.learning_rate must be a finite number, not inf"),
    ("classifier.hidden_sizes=[64, 0]", "classifier.hidden_sizes must be at least 1, not 0"),
    ("classifier.hidden_sizes=64", "classifier.hidden_sizes must be a list, each an integer, not 64"),
    ("eval.visualize=1", "eval.visualize must be true or false, not 1"),
    ("eval.step=0", "eval.step must be a number of weights from 1, or a share of them below 1, not 0"),
    ("eval.step=1.5", "eval.step must be a number of weights from 1, or a share of them below 1, not 1.5"),
    ("eval.methods=[mimu, magic]", "eval.methods: 'magic' is not registered: valid are original, mimu"),
    ("eval.methods=[original]", "eval.methods must name mimu"),
    ("eval.ranking=best", "eval.ranking must be one of damage, mean, set_difference, not 'best'"),
    ("eval.hyperparameters.sft.epochs=0", "eval.hyperparameters.sft.epochs must be at least 1, not 0"),
    ("eval.hyperparameters.sft.epochs=1.5", "eval.hyperparameters.sft.epochs must be an integer, not 1.5"),
    ("eval.hyperparameters.sft.epochs=true", "eval.hyperparameters.sft.epochs must be an integer or a finite number"),
    ("eval.hyperparameters.sft.epoch=2", "eval.hyperparameters.sft.epoch is not a setting: valid are epochs, batch"),
    ("eval.hyperparameters.tfs.epochs=2", "eval.hyperparameters.tfs is not a method with hyperparameters: valid are"),
    ("eval.hyperparameters.sft=2", "eval.hyperparameters.sft must be a mapping, not 2"),
    ("eval.hyperparameters=2", "eval.hyperparameters must be a mapping, not 2"),
    ("eval.audit.probe_steps=0", "eval.audit.probe_steps must be at least 1, not 0"),
    ("eval.audit.probes=[sofmax]", "eval.audit.probes: 'sofmax' is not known: valid are softmax, two_layer, neighbo"),
    ("eval.audit.relearn_from=[0]", "eval.audit.relearn_from must be at least 1, not 0"),
    ("eval.audit.probe_neighbours=20000", "eval.audit.probe_neighbours must be at most probe_neighbours_of, 10000"),
    ("eval.erasure=-1", "eval.erasure must be at least 0, not -1.0"),
    ("eval.erasure=2", "eval.erasure must be 0 where graphs.erasure is false, not 2.0"),
    ("gcn.erasure=[0, 8]", "gcn.erasure must be null where graphs.erasure is false, not [0.0, 8.0]"),
    ("gcn.erasure=[8, 0]", "gcn.erasure must be null or [low, high], weights from 0, not [8.0, 0.0]"),
    ("gcn.erasure=[8]", "gcn.erasure must be null or [low, high], weights from 0, not [8.0]"),
    ("gcn.erasure=8", "gcn.erasure must be a list, each a finite number or null, not 8"),
    ("graphs.scope=local", "graphs.scope must be one of global, layerwise, not 'local'"),
    ("graphs.rivals=0", "graphs.rivals must be at least 1, not 0"),
    ("graphs.ridge=0", "graphs.ridge must be above 0, not 0.0"),
    ("graphs.features=[wait]", "graphs.features: 'wait' is not known: valid are input_activation"),
    ("graphs.mask_layer=3", "graphs.mask_layer 3 is not there: valid are -3 to 2"),
    ("graphs.mask_layer=[-2, 1]", "graphs.mask_layer (-2, 1) must name at least one layer, and each only once"),
    ("sweep.kappa=[8192]", "sweep.kappa must be from 1 to 8191 (masked weights less one), not 8192"),
    ("sweep.kappa=[0]", "sweep.kappa must be a number of weights from 1, or a share of them below 1, not 0"),
    ("sweep.kappa=[0.99999]", "sweep.kappa must be from 1 to 8191 (masked weights less one), not 0.99999"),
    ("sweep.kappa=[]", "sweep.kappa must name at least one value"),
    ("sweep.kappa=[5, 5]", "sweep.kappa must name at least one value, and each once"),
    ("sweep.kappa=300", "sweep.kappa must be a list, each an integer or a finite number or one of auto, not 300"),
    ("sweep.kappa=[automatic]", "sweep.kappa must be a list, each an integer or a finite number or one of auto"),
    ("eval.momentum=1", "eval.momentum must be at least 0 and below 1, not 1.0"),
    ("eval.target=0", "eval.target must be above 0, not 0.0"),
    ("eval.max_kappa=8192", "eval.max_kappa must be from 1 to 8191 (masked weights less one), not 8192"),
    ("sweep.top_k=[9000]", "sweep.top_k must be from 1 to 8192 (masked weights), not 9000"),
    ("sweep.forget_digits=[10]", "sweep.forget_digits must be from 0 to 9, not 10"),
    ("gcn.kappa=[100]", "gcn.kappa must be [low, high], two numbers of weights or two shares of them, not [100]"),
    ("gcn.kappa=[100, 8000]", "gcn.kappa and partly_masked reach 9475 weights together, of 8192 masked ones"),
    ("gcn.kappa=[100, 0.5]", "gcn.kappa must be [low, high], two numbers of weights or two shares of them"),
    ("held_out=-1", "held_out must be from 0 to 50000 training samples, not -1"),
    ("gcn.partly_masked=[3, 2]", "gcn.partly_masked must be [low, high]"),
    ("dataset=CIFAR10", "dataset must be one of MNIST, FashionMNIST, KMNIST, not 'CIFAR10'"),
    ("device=gpu", "device must be auto, cpu, or cuda or mps that is there, not 'gpu'"),
    ("threads=0", "threads must be from 1 to 1024 or null, not 0"),
    ("report.dpi=1", "report.dpi must be from 20 to 1200, not 1"),
    ("gcn={sufficiency: 0, necessity_forget: 0, necessity_retain: 0}", "gcn.sufficiency, prior, necessity_forget"),
    (
        "gcn={necessity_forget: 0, necessity_retain: 0}",
        "gcn.necessity_forget, necessity_retain or prior must be above 0",
    ),
    ("seed=2020-99-99", "its value is not valid YAML"),
    ("seed=-1", "seed must be from 0 to"),
    ("sweep.seeds=[99999999999999999999]", "sweep.seeds must be from 0 to"),
    ("eval.batch_size=100000000000000000000", "eval.batch_size must be at most 1000000000"),
    ("device=meta", "device must be auto, cpu, or cuda or mps that is there, not 'meta'"),
    ("device=hpu", "device must be auto, cpu, or cuda or mps that is there, not 'hpu'"),
    ("nonsense", "'nonsense': is not an override; write section.key=value"),
    ("seed=[1", "'seed=[1': its value is not valid YAML"),
    ("=3", "'=3': is not an override"),
]


def assert_reads(config, changes):
    for section, values in changes.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if not isinstance(value, dict):
                read = getattr(getattr(config, section), key)
                assert (list(read) if isinstance(read, tuple) else read) == value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_can_run(path):
    changes = yaml.safe_load(path.read_text())
    variants = changes.pop("variants", {"": {}})
    assert_reads(load_config(path), changes)
    configs = load_variants(path)
    assert list(configs) == list(variants)
    for name, config in configs.items():
        assert_reads(config, variants[name] or {})


def test_a_variant_goes_over_its_file_and_an_override_over_both(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 4\ngcn: {steps: 7}\nvariants:\n  as it is:\n  longer: {gcn: {steps: 9, hidden: 5}}\n")
    configs = load_variants(path, ["gcn.hidden=6"])
    assert list(configs) == ["as it is", "longer"]
    assert [(c.seed, c.gcn.steps, c.gcn.hidden) for c in configs.values()] == [(4, 7, 6), (4, 9, 6)]
    assert load_variants() == {"": load_config()}


@pytest.mark.parametrize(
    "text, message",
    [
        ("variants: 3", "variants must map names to what each changes, not 3"),
        ("variants: {}", "variants must map names to what each changes, not {}"),
        ("variants: {a b: {}, A-B: {}}", "variants must differ in the letters and digits of their names"),
        ("variants: {" + "a" * 101 + ": {}}", "the name of a variant must be up to 100 characters without $, not 'aaa"),
        ("variants: {a $b$: {}}", "the name of a variant must be up to 100 characters without $, not 'a $b$'"),
        ('variants: {"a\\ud800": {}}', "must be up to 100 characters without $, not 'a\\ud800'"),
        ("variants: {'.': {}}", "the name of a variant must be up to 100 characters without $, not '.'"),
        ("variants: {wide: 0}", "mine.yaml, variant wide: the file must be a mapping"),
        ("variants: {wide: {gcn: {hiden: 3}}}", "mine.yaml, variant wide: gcn.hiden is not a setting; did you mean"),
        ("variants: {wide: {gcn: {hidden: 0}}}", "mine.yaml, variant wide: gcn.hidden must be at least 1, not 0"),
    ],
)
def test_bad_variants_are_named(text, message, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_every_setting_stands_in_the_default_config_with_a_comment():
    def keys(section):
        for name, hint in typing.get_type_hints(section).items():
            yield name
            if dataclasses.is_dataclass(hint):
                yield from keys(hint)

    lines = BASE.read_text().splitlines()
    for key in keys(Config):
        assert any(line.strip().startswith(f"{key}:") for line in lines), key


@pytest.mark.parametrize("override, message", BAD, ids=[override for override, _ in BAD])
def test_bad_settings_are_one_line_and_exit_status_2(override, message, capsys):
    assert main([override]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and override in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("gcn: [1, 2", "is not valid YAML"),
        ("- 3", "the file must be a mapping"),
        ("gcn:\n  steps: -1", "gcn.steps must be at least 1, not -1"),
        ("gcn:\n  steps:", "gcn.steps must be an integer, not None"),
        ("gcn:\n  1: 2", "gcn.1 is not a setting"),
        ("sweep:\n  kappa: [9999]", "sweep.kappa must be from 1 to 8191"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert main(["--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: ") and message in err and len(err.splitlines()) == 1


def test_missing_data_is_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys):
    import pipeline
    from data import DataError

    def missing(configs, **options):
        raise DataError("dataset KMNIST is not there")

    monkeypatch.setattr(pipeline, "run", missing)
    assert main(["dataset=KMNIST"]) == 2
    assert capsys.readouterr().err == "error: dataset KMNIST is not there\n"


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["--config", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml: cannot be read" in capsys.readouterr().err


def test_overrides_go_over_the_file_and_the_file_over_the_default(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 4\ngcn:\n  steps: 7\n  hidden: 5\n")
    config = load_config(
        path, ["gcn.hidden=6", "eval.hyperparameters.sft.learning_rate=1e-3", "graphs.mask_layer=null"]
    )
    default = load_config()
    assert (config.seed, config.gcn.steps, config.gcn.hidden) == (4, 7, 6)
    assert config.eval.hyperparameters["sft"]["learning_rate"] == 0.001 and config.graphs.mask_layer is None
    assert config.classifier == default.classifier and config.seeds == (4,)


def test_a_default_that_a_change_makes_impossible_names_both(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("classifier: {hidden_sizes: [32, 16]}")
    assert main(["--config", str(path), "seed=1"]) == 2
    message = "sweep.kappa must be from 1 to 511 (masked weights less one), not 1000"
    assert capsys.readouterr().err == f"error: {path}, override seed=1, over config.yaml: {message}\n"


@pytest.mark.parametrize(
    "override",
    [
        "seed=!!bool abc",
        "seed=!!timestamp abc",
        'device="\\UFFFFFFFF"',
        "seed=1" + ":30" * 300 + ".5",
        "device=0x" + "f" * 5000,
        'gcn={"a\\nb": 1}',
        "gcn.kappa=" + "[" * 30 + "]" * 30,
        "seed=" + str(list(range(100_000))),
    ],
)
def test_odd_values_are_one_short_line(override, capsys):
    assert main(["--dry-run", override]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    assert len(err) < 1000 + 2 * len(override) and "Traceback" not in err


def test_aliases_of_aliases_are_one_short_line(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    nested = "".join(f"  - &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh"))
    path.write_text(f"seed:\n  - &a [x, x, x, x, x, x, x, x, x]\n{nested}")
    assert main(["--config", str(path)]) == 2
    assert len(capsys.readouterr().err) < 100_000


def test_a_config_may_come_from_a_pipe():
    reading, writing = os.pipe()
    os.write(writing, b"seed: 4")
    os.close(writing)
    assert load_variants(Path(f"/dev/fd/{reading}"))[""].seed == 4


def test_a_key_that_stands_twice_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("gcn: {steps: 3}\nseed: 1\ngcn: {steps: 4}")
    assert main(["--config", str(path)]) == 2
    assert "mine.yaml: is not valid YAML (gcn stands twice in" in capsys.readouterr().err


def leaves_of(section, prefix=""):
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves_of(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


KEYS = sorted(leaves_of(Config))
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["auto", "all"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_setting_makes_a_config_that_holds_it_or_one_line(changes):
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in changes.items()]
    try:
        config = load_config(BASE, overrides)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        return
    for key, value in changes.items():
        read = config
        for name in key.split("."):
            read = getattr(read, name)
        if not isinstance(value, dict):
            pairs = zip(read, value, strict=True) if isinstance(value, list) else [(read, value)]
            assert all(ours == given or float(ours) == float(given) for ours, given in pairs)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(KEYS), st.data())
def test_numbers_that_are_none_are_refused_everywhere(key, data):
    for number in (".nan", ".inf", "-.inf", "[.nan]", "[.inf, 3]"):
        with pytest.raises(ConfigError, match=key.split(".")[0]):
            load_config(BASE, [f"{key}={number}"])


def test_an_empty_file_is_the_default(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == load_config()


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_a_setting_is_read_in_its_type_or_refused(value):
    for hint in (int, float, bool, str, int | None, tuple[int, ...], tuple[str, ...], int | tuple[int, ...] | None):
        try:
            read = converted(value, hint)
        except TypeError:
            continue
        if hint is float:
            assert isinstance(read, float) and abs(read) < float("inf")
        else:
            assert (list(read) if isinstance(read, tuple) else read) == value


def test_a_broken_default_config_says_what_is_missing(tmp_path, monkeypatch):
    import config

    path = tmp_path / "config.yaml"
    path.write_text("".join(line for line in BASE.read_text().splitlines(True) if "rounds:" not in line))
    monkeypatch.setattr(config, "BASE", path)
    with pytest.raises(ConfigError, match="gcn.rounds is missing: it must be an integer"):
        load_config(path)
