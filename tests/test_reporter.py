"""Curves, summary and tables of a sweep against means by hand, from written JSON."""

import json
import math
import random
import re
from itertools import product
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import pytest

from mimu import reporter as module
from mimu.reporter import FORGET, FORGET_LOSS, FORGET_SCORE, RETAIN, RETAIN_GAP, WORST, Column, Reporter, method_styles

CONFIG = module.ReporterConfig(dpi=25, format=("png",))
KAPPAS = (10, 20, 40)
SEEDS = (0, 1)
DIGITS = (3, 9)
METHODS = ("original", "mimu", "retrain", "mine")
CURVES = {}
for metric, samples in product(("loss", "score"), ("forget", "retain")):
    CURVES[f"{metric}_{samples}_set"] = f"draw_{metric}_curves_on_{samples}_set"
CURVES["probability_on_forget_class"] = "draw_classifier_probability_on_forget_class"
LABELS = {"loss": "cross entropy on the {} set (nats)", "score": "score on the {} set (%)"}
LABELS["probability"] = "probability of the {} class"


def number(evaluation, method, metric, seed, digit, kappa) -> float:
    """A number between 0 and 1 that belongs to its place; that of `retrain` does not depend on kappa."""
    place = (evaluation, method, metric, seed, digit, None if method == "retrain" else kappa)
    return random.Random(str(place)).random()


def experiment(seed=0, digit=3, kappa=10, choice="fixed", methods=METHODS, **changes) -> dict:
    metrics = {FORGET: {}, RETAIN: {}}
    for method in methods:
        for evaluation, names in ((FORGET, ("loss", "score", "probability")), (RETAIN, ("loss", "score"))):
            metrics[evaluation][method] = {n: number(evaluation, method, n, seed, digit, kappa) for n in names}
    # On training samples the retain score falls with kappa, the forget score is 0 from 20 on.
    training = {"forget": {"score": 50.0 if kappa < 20 else 0.0}, "retain": {"score": 97.0 - kappa / 100}}
    about = {"does": "Something.", "paper": "", "touches": "a mask", "needs": "both sets"}
    return {
        "id": f"{seed}_{digit}_{kappa}_{choice}", "seed": seed, "forget_digit": digit, "kappa": kappa,
        "kappa_choice": choice, "top_k": 5, "mask_layer": -2, "mask_shapes": [[10, 20]], "num_graph_vertices": 200,
        "num_weights": 1000, "zeroed": [*range(kappa - 1), 190 + digit],
        "mask_efficacy_metrics": {"mimu": {"loss": 0.5, "score": 90.0, "probability": 0.7}},
        "training_split_metrics": {"mimu": training}, "audit_metrics": {}, "methods": {m: about for m in methods},
        "num_zeroed": {m: kappa if m == "mimu" else None for m in methods},
        "zeroed_by_layer": {m: {"layer 1": kappa} if m == "mimu" else None for m in methods},
        "seconds": {"gcn": 3.0} | {m: 0.25 for m in methods},
        "dataset": "MNIST", "class_names": [*map(str, range(9)), "boot"], "split": "the test split",
        "classifier": "784-8-10",
        "config": {"dataset": "MNIST", "held_out": 0, "classifier": {"hidden_sizes": [8]}},
    } | metrics | changes  # fmt: skip


def write(folder, experiments) -> list:
    paths = []
    for index, content in enumerate(experiments):
        paths.append(folder / f"{index}_{content['id']}.json")
        paths[-1].write_text(json.dumps(content))
    return paths


def sweep() -> list[dict]:
    return [experiment(seed, digit, kappa) for seed, digit, kappa in product(SEEDS, DIGITS, KAPPAS)]


def auto(**changes) -> list[dict]:
    """Kappas that are chosen for each request: 10 + digit for every seed."""
    return [experiment(seed, digit, 10 + digit, "auto", **changes) for seed, digit in product(SEEDS, DIGITS)]


@pytest.fixture
def reporter(tmp_path):
    return Reporter(CONFIG, reversed(write(tmp_path, sweep())), tmp_path / "reports")


@pytest.fixture
def auto_reporter(tmp_path):
    return Reporter(CONFIG, write(tmp_path, sweep() + auto()), tmp_path / "reports")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are closed, which is once they are saved."""
    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    close("all")


def mean_by_hand(evaluation, method, metric, kappa, seeds=SEEDS):
    return fmean(number(evaluation, method, metric, seed, digit, kappa) for seed, digit in product(seeds, DIGITS))


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of a table by the first of each row, the header's included."""
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if not line.startswith("| -")]
    return {row[0]: row[1:] for row in rows}


def texts(artists) -> list[str]:
    return [artist.get_text() for artist in artists]


def test_values_are_written_as_people_read_them_in_aligned_columns():
    lines = module.markdown_table(["name", "n"], [["a", 1], ["long name", 22]]).splitlines()
    assert lines == ["| name      |  n |", "| --------- | -: |", "| a         |  1 |", "| long name | 22 |"]
    assert Column((), spec=".1f").text([1.25]) == "1.2" and Column((), spec="+.1f").text([1.0, 3.0]) == "+2.0 ± 1.4"
    assert Column(()).text([math.nan]) == "–" and Column(()).text([2e7, 2e7]) == "2.0e+07"


def test_means_and_deviations_over_seeds_gaps_and_shares_and_the_worst_by_hand(reporter):
    seeds = [mean_by_hand(FORGET, "mimu", "score", 20, seeds=[seed]) for seed in SEEDS]
    assert reporter.figures(FORGET_SCORE, "mimu", 20) == pytest.approx(seeds)
    assert reporter.cells([FORGET_SCORE], "mimu", 20) == [f"{fmean(seeds):.2f} ± {stdev(seeds):.2f}"]
    places = [*product(SEEDS, DIGITS)]
    gaps = [number(RETAIN, "mimu", "score", s, d, 20) - number(RETAIN, "retrain", "score", s, d, 20) for s, d in places]
    assert sum(reporter.numbers(RETAIN_GAP, "mimu", 20), []) == pytest.approx(gaps)
    forget = max(number(FORGET, "mimu", "score", seed, digit, 20) for seed, digit in places)
    assert rows_of(reporter.table(WORST))["mimu"] == [f"{forget:.2f}", f"{min(gaps):+.2f}"]
    assert reporter.figures(Column(("num_zeroed",), is_share=True), "mimu", 20) == [10.0, 10.0]


def test_what_is_null_or_missing_is_a_gap_in_a_curve_and_a_dash_in_a_table(tmp_path):
    experiments = sweep()
    experiments[0][FORGET]["mine"]["loss"] = None
    null, less = (Reporter(CONFIG, write(tmp_path, some), tmp_path) for some in (experiments, experiments[1:]))
    for reporter in (null, less):
        losses = reporter.get_mine_unlearning_forget_set_loss()
        assert math.isnan(losses[0]) and not any(map(math.isnan, losses[1:]))
        assert reporter.cells([FORGET_LOSS], "mine", 10) == ["–"]
    assert less.cells(WORST, "mimu", 10) == ["–", "–"]
    assert null.best_kappa() == null.kappa == less.best_kappa() == 20, "chosen on training samples"


@pytest.mark.parametrize("file", CURVES)
def test_curves_show_every_method_and_getters_give_them(reporter, drawn, file):
    metric = file.split("_")[0]
    samples, evaluation = ("retain", RETAIN) if "retain" in file else ("forget", FORGET)
    getattr(reporter, CURVES[file])()
    assert (reporter.folder / f"{file}.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = drawn[0].axes
    assert texts(drawn[0].legends[0].get_texts()) == list(METHODS)
    assert axes.get_title() == "MNIST, classes 3, 9 (boot), the test split, 784-8-10"
    assert axes.get_xlabel() == "weights zeroed, kappa" and axes.get_ylabel() == LABELS[metric].format(samples)
    assert texts(axes.get_xticklabels()) == ["10", "20", "40"]
    for method, line in zip(METHODS, axes.lines, strict=True):
        y = getattr(reporter, f"get_{method}_unlearning_{samples}_set_{metric}")()
        assert y == pytest.approx([mean_by_hand(evaluation, method, metric, kappa) for kappa in KAPPAS])
        assert line.get_xydata().T.tolist() == [list(KAPPAS), y]
        assert line.get_label() == method and line.get_color() == method_styles(METHODS)[method]["color"]
    assert not hasattr(reporter, "get_nobody_unlearning_forget_set_score")


def test_auto_stands_apart_from_the_fixed_kappas(reporter, auto_reporter, drawn):
    assert auto_reporter.kappas == list(KAPPAS) and auto_reporter.kappa == "auto"
    assert reporter.kappa == 20 and reporter.about().startswith("Of the fixed kappas, 20 is")
    by_hand = fmean(number(FORGET, "mimu", "loss", seed, d, 10 + d) for seed, d in product(SEEDS, DIGITS))
    assert auto_reporter.mean(FORGET_LOSS, "mimu", "auto") == pytest.approx(by_hand)
    assert "16 weights, 8 % of the masked ones and 1.6 % of all on average." in auto_reporter.about()
    auto_reporter.plot(["## Mine", "More."])
    files = {path.name for path in auto_reporter.folder.iterdir()}
    assert files == {f"{name}.png" for name in CURVES} | {"summary.md", "summary.png"} and len(drawn) == 6
    for figure in drawn:
        (ring,) = (line for line in figure.axes[0].lines if line.get_label() == "mimu, kappa auto")
        assert ring.get_color() == method_styles([])["mimu"]["color"]
    summary = (auto_reporter.folder / "summary.md").read_text()
    headings = ["Every method, kappa = auto", "Mine", "Mask efficacy, K = 5", "Every kappa"]
    assert re.findall("^## (.*)", summary, re.MULTILINE) == headings
    assert all(table in summary for table in (auto_reporter.table(WORST), auto_reporter.kappas_table()))
    assert "Where the zeroed weights are" not in summary, "there is one masked layer"


def test_the_tables_by_hand(auto_reporter):
    assert rows_of(auto_reporter.table(module.EFFICACY, methods=["mimu"])) == {
        "method": ["forget score, %", "probability of the forget class", "forget loss, nats"],
        "mimu": ["90.000 ± 0.000", "0.700 ± 0.000", "0.500 ± 0.000"],
    }
    row = rows_of(auto_reporter.table(module.EVERYTHING))["mimu"]
    assert [row[3]] == auto_reporter.cells([module.PROBABILITY], "mimu") and row[6:] == ["16 ± 0", "0.25 ± 0.00"]
    lines = auto_reporter.kappas_table().splitlines()
    assert len(lines) == 2 + 4 * 4 and [line.split()[3] for line in lines[2:6]] == ["10", "20", "40", "auto"]
    assert auto_reporter.cells([Column(FORGET_LOSS.keys, spec=".3f")], "mimu", 20)[0] in lines[7]
    said, table = auto_reporter.closing_table().split("\n\n")
    about = f"forgetting classes 3, 9 (boot), scored on the test split. {auto_reporter.about()}"
    assert said == f"MNIST, 784-8-10: {about}"
    assert rows_of(table)["mine"] == [*auto_reporter.cells(module.METRICS[:2], "mine"), "–"]
    assert rows_of(table)["mimu"][2] == "16 ± 0", "how many weights each method zeroes"


def test_a_sweep_of_auto_alone_has_no_curves_and_says_which_methods_gave_up_and_where_zeros_are(tmp_path):
    experiments = auto(split="100 held-out training samples")
    for each, mimu, saliency in zip(experiments, (True, False, False, True), (False, False, False, True)):
        each["gave_up"] = {"mimu": mimu, "saliency": saliency, "random": False}
        count = each["forget_digit"]
        each["zeroed_by_layer"] = {"mimu": {"layer 0": count, "output row": 10 - count}, "retrain": None}
    alone = Reporter(CONFIG, write(tmp_path, experiments), tmp_path / "reports")
    assert alone.about().endswith("forgotten: mimu on 2 of 4 requests, saliency on 1 of 4 requests.")
    alone.plot()
    assert [path.name for path in alone.folder.iterdir()] == ["summary.md"] and alone.best_kappa() == "auto"
    summary = (alone.folder / "summary.md").read_text()
    assert alone.about() in summary and "Every kappa" not in summary
    scope = "scored on 100 held-out training samples. Mean over classes: 2, ± standard deviation over seeds: 2."
    assert summary.startswith(f"# Forgetting classes 3, 9 (boot) of MNIST\n\n784-8-10, {scope}\n")
    table = summary.split("Where the zeroed weights are:\n\n")[1].split("\n\n")[0]
    assert rows_of(table) == {"method": ["layer 0", "output row"], "mimu": ["6.0 ± 0.0", "4.0 ± 0.0"]}


def test_colours_are_the_same_with_and_without_other_methods():
    styles, known = method_styles(["mimu", "mine", "original", "yours"]), method_styles([])
    assert known.items() <= styles.items()
    assert len({styles[name]["color"] for name in ("mimu", "mine", "original", "yours")}) == 4
    assert len({style["color"] for style in known.values()} | set(module.FREE_COLORS)) == len(known) + 6


def test_marks_far_from_most_are_out_of_the_frame_of_retain_scores(tmp_path, drawn):
    """Tukey's fences of 20, 96.3 to 97: the quartiles are 96.4 and 96.9."""
    experiments = [experiment(kappa=kappa, methods=(*METHODS, "sft", "bad")) for kappa in KAPPAS]
    scores = {"original": 96.9, "retrain": 97.0, "mine": 96.3, "mimu": 96.6, "sft": 96.7, "bad": 20.0}
    for each in experiments:
        each[RETAIN] = {name: {"score": score} for name, score in scores.items()}
        each[FORGET]["no retain score"] = {"loss": 1.0, "score": 1.0, "probability": 0.1}
    reporter = Reporter(CONFIG, write(tmp_path, experiments), tmp_path / "reports")
    reporter.draw_score_curves_on_retain_set()
    reporter.draw_summary()
    reporter.draw_score_curves_on_forget_set()
    for figure in drawn[:2]:
        low, high = figure.axes[0].get_ylim()
        assert 95 < low < 96.3 and 97 < high < 101
    assert drawn[2].axes[0].get_ylim()[0] < min(line.get_ydata().min() for line in drawn[2].axes[0].lines)
    assert texts(drawn[2].legends[0].get_texts()) == [*METHODS, "sft", "bad", "no retain score"]
