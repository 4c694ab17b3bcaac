"""The pages: their measured blocks, their links, the tuning of hyperparameters, and the attack by shadow models."""

import importlib
import re
import subprocess
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace

import pytest
import torch
from conftest import copy_to
from running import PROJECT
from scipy.stats import norm

from experiment.config import load_variants
from mimu.seeds import seeded

PAGES = [PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md"))]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(PROJECT / "docs"))
    build, tune, shadow = map(importlib.import_module, ("build", "tune", "shadow"))


@pytest.fixture
def pages(tmp_path, monkeypatch) -> Path:
    """A copy of the pages, which the scripts write to."""
    folder = copy_to(tmp_path, "README.md", "docs/*.md")
    monkeypatch.setattr(build, "ROOT", folder)
    monkeypatch.setattr(build, "DOCS", folder / "docs")
    monkeypatch.setattr(build, "head", lambda: "0123abc")
    monkeypatch.setattr(tune, "head", lambda: "0123abc")
    return folder


def test_the_marks_of_every_block_stand_once_and_name_a_commit_and_no_other_marks_stand_on_the_pages():
    text = "".join(page.read_text() for page in PAGES)
    marked = re.findall(r"<!-- (\w+): measured at [0-9a-f]{7} -->\n.*?<!-- /\1 -->", text, re.DOTALL)
    assert sorted(marked) == sorted(build.MEASUREMENTS)
    assert text.count("<!--") == 2 * len(marked)


def test_a_measured_block_is_written_with_the_commit_and_a_failure_leaves_its_block(pages, monkeypatch, capsys):
    def fail() -> str:
        raise subprocess.CalledProcessError(2, ["ablation"])

    measurements = {"ablation": fail, "few": lambda: "| figure |\n", "scale": lambda: None}
    monkeypatch.setattr(build, "MEASUREMENTS", measurements)
    before = {page.name: page.read_text() for page in pages.glob("docs/*.md")}
    assert build.main([]) == 1 and "ablation: " in capsys.readouterr().out
    assert build.block("few")[1:3] == ("0123abc", "| figure |\n")
    few = (pages / "docs" / "few.md").read_text()
    around = re.compile("(<!-- few: ).*(<!-- /few -->)", re.DOTALL)
    assert around.sub("", few) == around.sub("", before["few.md"])
    changed = [page.name for page in pages.glob("docs/*.md") if page.read_text() != before[page.name]]
    assert changed == ["few.md"]
    with pytest.raises(SystemExit):
        build.main(["few", "mine"])
    (pages / "docs" / "few.md").write_text(few.replace("<!-- few: ", "<!-- other: "))
    with pytest.raises(ValueError, match="block few: its marks must stand once on the pages, not 0 times"):
        build.write_block("few", "")


def test_tables_are_joined_by_their_first_column_and_methods_get_a_column_of_their_own():
    scores = "| variant | score |\n| --- | --- |\n| cnn | 1 |\n| cnn: erase | 2 |\n"
    probes = "| variant | IDI |\n| --- | --- |\n| cnn: erase | 3 |\n| cnn | 4 |\n| cnn: retrain | 5 |\n"
    table = build.by_method(build.joined(scores, probes), left_out=["c*: m*"])
    columns, *rows = build.cells(table)
    assert columns == ["variant", "method", "score", "IDI"]
    assert rows == [["cnn", "erase", "2", "3"], ["cnn", "retrain", "–", "5"]]
    assert build.cells(build.columns_of(table, ["IDI", "method"]))[1:] == [["3", "erase"], ["5", "retrain"]]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_a_tuning_of_one_method_leaves_all_other_rows(pages, monkeypatch):
    tuning = SimpleNamespace(
        trial=lambda method, values: tune.Trial(values, 0.25, 99.0, 0.125), best=lambda trials: trials[-1]
    )
    monkeypatch.setattr(tune, "Tuning", lambda settings: tuning)
    before = build.cells(build.block("tuning").content)
    tune.main(["cnn", "ssd"])
    after = build.cells(build.block("tuning").content)
    assert [row for row in after if row[:2] != ["cnn", "ssd"]] == [row for row in before if row[:2] != ["cnn", "ssd"]]
    assert ["cnn", "ssd", "selection 10, dampening 0.3", "0.25", "99.00", "0.1250", "0123abc"] in after


def test_the_nearest_of_the_candidates_that_forget_and_keep_is_chosen():
    tuning = tune.Tuning.__new__(tune.Tuning)
    tuning.settings = {"largest_forget_score": 1.0}
    tuning.smallest_retain = 95.0
    figures = (0.9, 95.1, 0.3), (0.1, 96.0, 0.2), (1.5, 97.0, 0.01), (0.0, 94.0, 0.01)
    far, near, leaves, loses = (tune.Trial({}, forget, retain, distance) for forget, retain, distance in figures)
    assert tuning.best([far, near, leaves, loses]) is near
    assert tuning.best([leaves, loses]) is leaves  # half a point is missing, not a whole one


CONFIGS = {"mnist": ("config", ""), "erasure": ("config", ""), "cnn": ("cnn", "Fashion-MNIST, cnn, hidden layer"),
           "resnet": ("cnn", "Fashion-MNIST, resnet, last convolution"), "cifar10": ("cifar10", "")}  # fmt: skip


def test_the_configs_have_the_candidates_that_were_chosen():
    loaded = {name: load_variants(PROJECT / "configs" / f"{file}.yaml")[at] for name, (file, at) in CONFIGS.items()}
    for section, method, chosen, *_ in build.cells(build.block("tuning").content)[1:]:
        configured = loaded[section].eval.hyperparameters.get(method, {})
        for hyperparameter in filter(None, chosen.split(", ")):
            name, value = hyperparameter.split()
            assert f"{configured[name]:g}" == value, (section, method)


def test_the_attack_by_shadow_models_leaves_each_pair_out_of_its_gaussians():
    kinds = 3 * torch.randn(2, 5, 4, generator=seeded("kinds")).double()
    kinds[1] += 4.0

    def density(kind: int, pair: int, sample: int, x: float) -> float:
        remaining = [*kinds[kind, :pair, sample].tolist(), *kinds[kind, pair + 1 :, sample].tolist()]
        return norm(fmean(remaining), stdev(remaining)).logpdf(x)

    right = torch.zeros(5, 4, 2)
    for pair, sample, kind in product(range(5), range(4), range(2)):
        own, other = (density(each, pair, sample, kinds[kind, pair, sample].item()) for each in (kind, 1 - kind))
        right[pair, sample, kind] = float(own > other)
    torch.testing.assert_close(shadow.likelihood_ratio_attack(*kinds), right.mean((1, 2)).double())


def test_the_models_of_a_pair_are_told_apart_by_which_of_them_had_a_sample(monkeypatch):
    data = SimpleNamespace(train=SimpleNamespace(labels=torch.tensor([9, 3] * 50)))
    had = lambda _, data, chosen, seed: {"retrain": chosen[data.train.labels == 9].double()}  # noqa: E731
    monkeypatch.setattr(shadow, "load_image_data", lambda *_: data)
    monkeypatch.setattr(shadow, "odds_by_method", had)
    with_it, without_it = shadow.measure([])["retrain"]
    assert with_it.shape == (shadow.PAIRS, 50) and with_it.all() and not without_it.any()
