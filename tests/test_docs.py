"""The pages: which of their blocks are stale and are measured, and the tuning of hyperparameters."""

import importlib
import operator
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from conftest import TRACKED, copy_to
from running import PROJECT, of_copy
from scipy.stats import norm

from mimu.seeds import seeded

SCRIPTS = ("build", "tune", "bar", "own", "shadow", "scale")
PRETRAIN = {"pretrain"}
OWN = {"own_layers", "own_several", "own_networks", "own_kinds", "own_few", "choice"}
TUNING = {"tuning", "tuning_erasure", "tuning_cnn", "tuning_resnet", "tuning_cifar10"}


@pytest.fixture
def pages(tmp_path, monkeypatch) -> Path:
    """A copy of the project with its pages, whose scripts are what `import build` and `import tune` find."""
    folder = copy_to(tmp_path / "mimu", *TRACKED, "docs/*.py", "docs/*.md", "docs/*.yaml", "tests/benchmark.py")
    monkeypatch.syspath_prepend(str(folder / "docs"))
    for script in SCRIPTS:
        monkeypatch.delitem(sys.modules, script, raising=False)
    yield folder
    for script in SCRIPTS:
        sys.modules.pop(script, None)


@pytest.fixture(scope="module")
def project() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROJECT / "docs"))
        build = importlib.import_module("build")
    build.settings_of = cache(build.settings_of)
    return build


@pytest.fixture(scope="module")
def before(project) -> dict[str, str]:
    return {name: project.today(name) for name in project.MEASUREMENTS}


def other_body(code: str) -> str:
    return code.replace("    return ", "    return 0 or ", 1)


def other_words(code: str) -> str:
    code = re.sub(r'(\ndef .*:\n    """)', r"\1Reworded. ", code)
    return code.replace('"""', '"""Reworded. ', 1).replace("\n    return ", "\n    # A comment.\n    return ")


def with_line(line: str) -> Callable[[str], str]:
    return lambda text: f"{text}\n{line}\n"


without_figure = operator.methodcaller("replace", "    draw_few(variant_tables())\n", "", 1)
OF_CNN = {"tuning_cnn", "tuning_resnet", "tuning_cifar10"}
ONLY, ALL_BUT = set.intersection, set.difference
CHANGES = {
    "a function of a method": ("methods/fine_tuning.py", other_body, ALL_BUT, {"coverage", *PRETRAIN}),
    "a function of the training": ("trainer.py", other_body, ALL_BUT, {"coverage"}),
    "a function for custom models": ("unlearning/forgetting.py", other_body, ONLY, {"scale", *OWN}),
    "a function of a script": ("docs/own.py", other_body, ONLY, OWN),
    "the script of tunings": ("docs/tune.py", other_body, ONLY, TUNING),
    "the script of a page": ("docs/bar.py", other_body, ONLY, {"bar"}),
    "the benchmark": ("tests/benchmark.py", other_body, ONLY, {"benchmark"}),
    "the function that measures": ("docs/build.py", without_figure, ONLY, {"few"}),
    "a setting": ("configs/few.yaml", with_line("threads: 3"), ONLY, {"few"}),
    "candidates": ("docs/tuning_cnn.yaml", with_line("of_mine: 1"), ONLY, OF_CNN),
}
NO_CHANGES = {
    "masking/order.py": other_words,
    "docs/own.py": other_words,
    "docs/build.py": other_words,
    "reporter.py": other_body,
    "tables/variants.py": other_body,
    "configs/few.yaml": lambda text: text.replace("visualize: false", "visualize: true") + "\nreport: {dpi: 90}\n",
    "docs/few.md": with_line("More."),
}


def edit(folder: Path, path: str, edited: Callable[[str], str]) -> None:
    text = (folder / path).read_text()
    assert edited(text) != text
    (folder / path).write_text(edited(text))


def changed(before: dict[str, str], settings_of: Callable | None = None) -> set[str]:
    """The blocks whose digest is another one by the copy; with `settings_of`, whose settings are known."""
    build = importlib.import_module("build")
    build.settings_of = settings_of or build.settings_of
    assert list(build.MEASUREMENTS) == list(before)
    return {name for name in before if build.today(name) != before[name]}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_figures_of_a_block_makes_it_stale_and_no_other(pages, before, project, change):
    path, edited, which, names = CHANGES[change]
    edit(pages, path, edited)
    assert changed(before, project.settings_of if path.endswith(".py") else None) == which(set(before), names)


def test_words_plots_and_pages_make_no_block_stale(pages, before):
    for path, edited in NO_CHANGES.items():
        edit(pages, path, edited)
    assert changed(before) == set()


def test_another_tracked_gcn_makes_what_takes_it_stale(pages, before):
    path = pages / "checkpoints" / "pretrained" / "gcn.pt"
    path.write_bytes(path.read_bytes() + b"0")
    stale = changed(before)
    assert stale >= {"transfer", "few", "benchmark", "tuning", "own_layers", "cifar10"}
    assert not stale & {"all_digits", *PRETRAIN}


def test_stale_blocks_are_named_with_their_pages(pages):
    build = importlib.import_module("build")
    for name in build.MEASUREMENTS:
        build.write_block(name, build.block(name).content)
    assert build.main(["--stale"]) == 0
    edit(pages, "configs/methods.yaml", lambda text: text.replace("row: 0.0 ", "row: 0.5 "))
    command = [sys.executable, "docs/build.py", "--stale"]
    done = subprocess.run(command, cwd=pages, env=of_copy(pages), capture_output=True, text=True)
    with_damp = ["docs/erasure.md: erasure", "docs/few.md: few", "docs/methods.md: baselines", "docs/shadow.md: shadow"]
    assert (done.returncode, sorted(done.stdout.splitlines())) == (1, with_damp), done.stderr


def test_every_block_of_the_pages_is_measured_and_has_a_digest(before):
    marked = []
    for page in (PROJECT / "README.md", *PROJECT.glob("docs/*.md")):
        text = page.read_text()
        marked += re.findall(r"<!-- (\w+): (?:0|[0-9a-f]{8}) -->\n.*?<!-- /\1 -->", text, re.DOTALL)
        assert text.count("<!--") == 2 * len(re.findall(r"<!-- /\w+ -->", text))
    assert sorted(marked) == sorted(before)


MEASURED = []


def measured(commands: Sequence[str]) -> str:
    MEASURED.extend(commands)
    if commands == ["ablation"]:
        raise subprocess.CalledProcessError(2, commands)
    return f"| figure |\n{commands[0]}\n"


def test_what_is_stale_is_measured_piece_by_piece_and_what_is_named_in_any_case(pages, monkeypatch, capsys):
    build = importlib.import_module("build")
    measurements = {name: build.Measurement(measured, [name]) for name in ("few", "ablation", "published")}
    monkeypatch.setattr(build, "MEASUREMENTS", measurements)
    before = build.block("ablation"), (pages / "docs" / "few.md").read_text()
    for arguments, expected, status in (
        ([], ["few", "ablation", "published"], 1),
        ([], ["ablation"], 1),
        (["published"], ["published"], 0),
        (["--stale"], [], 1),
    ):
        MEASURED.clear()
        assert (build.main(arguments), MEASURED) == (status, expected)
    assert "ablation: " in capsys.readouterr().out and build.block("ablation") == before[0]
    few, page = build.block("few"), (pages / "docs" / "few.md").read_text()
    assert few.content == "| figure |\nfew\n" and few.provenance == build.today("few")
    assert page.partition("<!-- few: ")[0] == before[1].partition("<!-- few: ")[0]
    with pytest.raises(SystemExit):
        build.main(["few", "of_mine"])
    edit(pages, "docs/few.md", lambda text: text.replace("<!-- few: ", "<!-- other: "))
    with pytest.raises(ValueError, match="block few: .* must stand once on the pages, not 0 times"):
        build.write_block("few", "")


def test_a_tuning_of_some_methods_leaves_the_rows_and_the_digest_of_the_others(pages, monkeypatch):
    build, tune = map(importlib.import_module, ("build", "tune"))
    trial = lambda method, values: tune.Trial(values, 0.25, 99.0, 0.125)  # noqa: E731
    tried = SimpleNamespace(by_probe=False, trial=trial, best=lambda trials: trials[-1])
    monkeypatch.setattr(tune, "Tuning", lambda settings: setattr(tried, "settings", settings) or tried)
    rows = build.cells(build.block("tuning").content)
    tune.main(["sft"])
    after = build.block("tuning")
    assert after.provenance == "0"
    assert [row for row in build.cells(after.content) if row[0] != "sft"] == [row for row in rows if row[0] != "sft"]
    of_sft = [row[2:] for row in build.cells(after.content) if row[0] == "sft"]
    assert of_sft == [["0.25", "99.00", "0.1250", ""]] * 11 + [["0.25", "99.00", "0.1250", "chosen"]]
    tune.main(["erasure"])
    erasure = build.block("tuning_erasure")
    assert erasure.provenance == build.today("tuning_erasure") and build.block("tuning") == after
    assert {tuple(row[2:5]) for row in build.cells(erasure.content)[1:]} == {("0.25", "99.00", "0.1250")}


def test_the_nearest_of_the_candidates_that_forget_and_keep_is_chosen(pages):
    tune = importlib.import_module("tune")
    tuning = tune.Tuning.__new__(tune.Tuning)
    tuning.settings = {"largest_forget_score": 1.0}
    tuning.smallest_retain = 95.0
    of = (0.9, 95.1, 0.3), (0.1, 96.0, 0.2), (1.5, 97.0, 0.01), (0.0, 94.0, 0.01)
    far, near, leaves, loses = (tune.Trial({}, forget, retain, distance) for forget, retain, distance in of)
    assert tuning.best([far, near, leaves, loses]) is near
    assert tuning.best([leaves, loses]) is leaves  # half a point is missing, not a whole one


def test_the_attack_by_shadow_models_leaves_each_pair_out_of_its_gaussians(pages):
    shadow = importlib.import_module("shadow")
    kinds = 3 * torch.randn(2, 5, 4, generator=seeded("kinds")).double()
    kinds[1] += 4.0

    def density(kind: int, pair: int, sample: int, x: float) -> float:
        others = [*kinds[kind, :pair, sample].tolist(), *kinds[kind, pair + 1 :, sample].tolist()]
        return norm(fmean(others), stdev(others)).logpdf(x)

    right = torch.zeros(5, 4, 2)
    for pair, sample, kind in product(range(5), range(4), range(2)):
        own, other = (density(each, pair, sample, kinds[kind, pair, sample].item()) for each in (kind, 1 - kind))
        right[pair, sample, kind] = float(own > other)
    torch.testing.assert_close(shadow.likelihood_ratio_attack(*kinds), right.mean((1, 2)).double())


@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (1.5, 1.0), (0.0, 3.0)])
def test_the_attack_by_shadow_models_reaches_the_best_accuracy_that_there_is(pages, mean, deviation):
    shadow = importlib.import_module("shadow")
    members, others = torch.randn(2, 200, 500, generator=seeded("known")).double()
    x = torch.linspace(-40, 40, 100_001).double()
    apart = abs(norm(0, 1).pdf(x) - norm(mean, deviation).pdf(x))
    best = 0.5 + torch.trapezoid(torch.from_numpy(apart), x).item() / 4  # half the total variation
    found = shadow.likelihood_ratio_attack(members, mean + deviation * others)
    assert found.mean().item() == pytest.approx(best, abs=0.006)
    assert shadow.likelihood_ratio_attack(members, members).tolist() == [0.5] * 200


def test_the_models_of_a_pair_are_told_apart_by_which_of_them_had_a_sample(pages, monkeypatch):
    shadow = importlib.import_module("shadow")
    data = SimpleNamespace(train=SimpleNamespace(labels=torch.tensor([9, 3] * 50)))
    had = lambda _, data, chosen, seed: {"retrain": chosen[data.train.labels == 9].double()}  # noqa: E731
    monkeypatch.setattr(shadow, "load_image_data", lambda *_: data)
    monkeypatch.setattr(shadow, "odds_by_method", had)
    with_it, without_it = shadow.measured([])["retrain"]
    assert with_it.shape == (shadow.PAIRS, 50) and with_it.all() and not without_it.any()


WHERE = [(("tuning", "tuning_erasure"), ("config", "methods")), (("tuning_cifar10",), ("cifar10",))]


@pytest.mark.parametrize("blocks, configs", WHERE)
def test_the_configs_have_the_candidates_that_were_chosen(pages, blocks, configs):
    build, chosen, configured = importlib.import_module("build"), {}, {}
    for name in blocks:
        for method, values, *_, mark in build.cells(build.block(name).content):
            chosen |= {method: values} if mark == "chosen" else {}
    for name in configs:
        settings = yaml.safe_load((PROJECT / "configs" / f"{name}.yaml").read_text())
        configured |= settings["eval"]["hyperparameters"]
    configured.pop("published", None)  # as it was published
    assert set(chosen) - {"mimu"} == set(configured)
    for name, values in configured.items():
        written = {key: f"{value:g}" for key, value in values.items()}
        assert dict(part.split() for part in chosen[name].split(", ")) == written
