"""Curves, summary, tables and pictures of runs and variants against figures by hand, from written JSON."""

import json
import math
import os
import random
import re
from itertools import product
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from running import files

import reporter as module
import tables.experiment as plots
from mimu.files import write_text
from reporter import FORGET, FORGET_SCORE, KEPT, RETAIN, RETAIN_GAP, WORST, Column, Reporter, method_styles
from tables import report
from tables.pictures import INDEX, PROBE, Row, draw_frontier, draw_masks, draw_scores
from tables.retraining import COST, DIVERGENCES, GAPS, LEFT_BEHIND, audit_table, by_distance, draw_audits
from tables.variants import compare

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
        "gave_up": {"mimu": False} if choice == "auto" else {},
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
        assert reporter.cells([module.FORGET_LOSS], "mine", 10) == ["–"]
    assert less.cells(WORST, "mimu", 10) == ["–", "–"]
    assert null.best_kappa() == null.kappa == less.best_kappa() == 20, "chosen on training samples"


@pytest.mark.parametrize("file", CURVES)
def test_curves_show_every_method_and_getters_give_them(reporter, drawn, file):
    metric = file.split("_")[0]
    samples, evaluation = ("retain", RETAIN) if "retain" in file else ("forget", FORGET)
    getattr(reporter, CURVES[file])()
    assert (reporter.folder / f"{file}.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = drawn[0].axes
    styles = method_styles(METHODS)
    assert texts(drawn[0].legends[0].get_texts()) == list(METHODS)
    assert axes.get_title() == "MNIST, classes 3, 9 (boot), the test split, 784-8-10"
    assert axes.get_xlabel() == "weights zeroed, kappa" and axes.get_ylabel() == LABELS[metric].format(samples)
    assert texts(axes.get_xticklabels()) == ["10", "20", "40"]
    for method, line in zip(METHODS, axes.lines, strict=True):
        y = getattr(reporter, f"get_{method}_unlearning_{samples}_set_{metric}")()
        assert y == pytest.approx([mean_by_hand(evaluation, method, metric, kappa) for kappa in KAPPAS])
        if method == "retrain":
            assert line.get_ydata() == [y[0], y[0]] and line.is_dashed() and line.get_marker() == "None"
            assert line.get_transform() == axes.get_yaxis_transform(), "from edge to edge"
        else:
            assert line.get_xydata().T.tolist() == [list(KAPPAS), y]
            assert not line.is_dashed() and line.get_marker() == styles[method]["marker"]
        assert line.get_label() == method and line.get_color() == styles[method]["color"]
    assert not hasattr(reporter, "get_nobody_unlearning_forget_set_score")


def test_auto_stands_apart_from_the_fixed_kappas(reporter, auto_reporter, drawn):
    assert auto_reporter.kappas == list(KAPPAS) and auto_reporter.kappa == "auto"
    assert reporter.kappa == 20 and reporter.about().startswith("Of the fixed kappas, 20 is")
    by_hand = fmean(number(FORGET, "mimu", "loss", seed, d, 10 + d) for seed, d in product(SEEDS, DIGITS))
    assert auto_reporter.mean(module.FORGET_LOSS, "mimu", "auto") == pytest.approx(by_hand)
    assert "16 weights, 8 % of the masked ones and 1.6 % of all on average." in auto_reporter.about()
    auto_reporter.plot(["## Mine", "More."])
    files = {path.name for path in auto_reporter.folder.iterdir()}
    assert files == {f"{name}.png" for name in CURVES} | {"summary.md", "summary.png"} and len(drawn) == 6
    for figure in drawn:
        (ring,) = (line for line in figure.axes[0].lines if line.get_label() == "kappa auto")
        assert ring.get_color() == method_styles([])["mimu"]["color"]
    summary = (auto_reporter.folder / "summary.md").read_text()
    headings = ["Every method, kappa = auto", "Mine", "Mask efficacy, K = 5", "Every kappa"]
    assert re.findall("^## (.*)", summary, re.MULTILINE) == headings
    assert all(table in summary for table in (auto_reporter.table(WORST), auto_reporter.kappas_table()))


def test_the_tables_by_hand(auto_reporter):
    assert rows_of(auto_reporter.table(module.EFFICACY, methods=["mimu"])) == {
        "method": ["forget score, %", "probability of the forget class", "forget loss, nats"],
        "mimu": ["90.000 ± 0.000", "0.700 ± 0.000", "0.500 ± 0.000"],
    }
    row = rows_of(auto_reporter.table(module.EVERYTHING))["mimu"]
    assert [row[3]] == auto_reporter.cells([module.PROBABILITY], "mimu") and row[6:] == ["16 ± 0", "0.25 ± 0.00"]
    lines = auto_reporter.kappas_table().splitlines()
    assert len(lines) == 2 + 4 * 4 and [line.split()[3] for line in lines[2:6]] == ["10", "20", "40", "auto"]
    assert auto_reporter.cells([Column(module.FORGET_LOSS.keys, spec=".3f")], "mimu", 20)[0] in lines[7]
    said, table = auto_reporter.closing_table().split("\n\n")
    about = f"forgetting classes 3, 9 (boot), scored on the test split. {auto_reporter.about()}"
    assert said == f"MNIST, 784-8-10: {about}"
    assert rows_of(table)["mine"] == [*auto_reporter.cells(module.METRICS[:2], "mine"), "–"]
    assert rows_of(table)["mimu"][2] == "16 ± 0", "how many weights each method zeroes"


def test_a_sweep_of_auto_alone_has_no_curves_and_says_which_methods_gave_up(tmp_path):
    experiments = auto(split="100 held-out training samples")
    for each, mimu, saliency in zip(experiments, (True, False, False, True), (False, False, False, True)):
        each["gave_up"] = {"mimu": mimu, "saliency": saliency, "random": False}
    alone = Reporter(CONFIG, write(tmp_path, experiments), tmp_path / "reports")
    assert alone.about().endswith("forgotten: mimu on 2 of 4 requests, saliency on 1 of 4 requests.")
    experiments[1]["gcn_untrained"] = True
    reverted = Reporter(CONFIG, write(tmp_path, experiments), tmp_path / "reports").about()
    assert reverted == f"{alone.about()} The GCN is as before its training, which cost too much, on 1 of 4."
    alone.plot()
    assert [path.name for path in alone.folder.iterdir()] == ["summary.md"] and alone.best_kappa() == "auto"
    summary = (alone.folder / "summary.md").read_text()
    assert alone.about() in summary and "Every kappa" not in summary
    scope = "scored on 100 held-out training samples. Mean over classes: 2, ± standard deviation over seeds: 2."
    assert summary.startswith(f"# Forgetting classes 3, 9 (boot) of MNIST\n\n784-8-10, {scope}\n")


def test_every_method_that_chooses_its_kappa_has_a_ring_on_its_own_curve(tmp_path, drawn):
    methods = ("mimu", "saliency", "retrain")
    chosen = {"mimu": 12, "saliency": 30, "retrain": None}
    one = experiment(0, 3, 12, "auto", methods, num_zeroed=chosen, gave_up={"mimu": False, "saliency": True})
    fixed = [experiment(0, 3, kappa, methods=methods) for kappa in KAPPAS]
    reporter = Reporter(CONFIG, write(tmp_path, [*fixed, one]), tmp_path / "reports")
    reporter.draw_score_curves_on_forget_set()
    rings = [line for line in drawn[0].axes[0].lines if line.get_label() == "kappa auto"]
    places = [[[chosen[name], one[FORGET][name]["score"]]] for name in ("mimu", "saliency")]
    assert [ring.get_xydata().tolist() for ring in rings] == places
    assert [ring.get_color() for ring in rings] == [reporter.styles[name]["color"] for name in ("mimu", "saliency")]
    assert texts(drawn[0].legends[0].get_texts()) == [*methods, "kappa auto"], "told once"


def test_where_curves_coincide_all_are_seen(tmp_path, drawn):
    """Each line lies below those that are thinner, or whose dashes are shorter."""
    methods = ("original", "mimu", "sft", "saliency", "retrain")
    experiments = []
    for kappa in KAPPAS:
        zeroed = {name: kappa if name in ("mimu", "saliency") else None for name in methods}
        same = dict.fromkeys(methods, {"loss": 1.0, "score": 0.0, "probability": 0.0})
        experiments.append(experiment(0, 3, kappa, methods=methods, num_zeroed=zeroed, **{FORGET: same}))
    reporter = Reporter(CONFIG, write(tmp_path, experiments), tmp_path / "reports")
    reporter.draw_score_curves_on_forget_set()
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    mimu, saliency = lines["mimu"], lines["saliency"]
    assert mimu.get_zorder() == saliency.get_zorder(), "later ones are above"
    assert mimu.get_linewidth() > saliency.get_linewidth() and mimu.get_markersize() > saliency.get_markersize()
    level = [lines[name] for name in ("original", "retrain", "sft")]
    assert [line.get_zorder() for line in level] == sorted({line.get_zorder() for line in level})
    assert min(line.get_zorder() for line in level) > saliency.get_zorder()
    dashes = [line._unscaled_dash_pattern for line in level]
    assert all(offset == 0 for offset, _ in dashes) and len({sum(pattern) for _, pattern in dashes}) == 1
    assert [pattern[0] for _, pattern in dashes] == sorted((pattern[0] for _, pattern in dashes), reverse=True)


def test_the_summary_enlarges_what_is_near_retraining_with_an_open_star_above_all(auto_reporter, drawn):
    for each in auto_reporter.experiments:
        for method, score in (("original", 95.0), ("mimu", each["kappa"] / 100), ("mine", 60.0), ("retrain", 0.0)):
            each[FORGET][method]["score"] = score
    auto_reporter.draw_summary()
    everything, near = drawn[0].axes
    assert everything.get_xlim()[1] > 95 and "mark for each kappa" in everything.get_xlabel() == near.get_xlabel()
    low, high = near.get_xlim()
    assert low < 0 and 0.4 < high < 0.5 and near.get_title().startswith("enlarged: ")
    for axes in (everything, near):
        (star,) = (line for line in axes.lines if line.get_label() == "retrain")
        assert star.get_fillstyle() == "none"
        methods = [line for line in axes.lines if line.get_label() in METHODS and line is not star]
        assert star.get_zorder() > max(line.get_zorder() for line in methods)
        assert star.get_markersize() > max(line.get_markersize() for line in methods)
    assert texts(drawn[0].legends[0].get_texts()) == [*METHODS, "kappa auto"]


def test_a_line_that_is_drawn_by_hand_has_a_colour_of_its_own_and_marks(reporter, drawn, monkeypatch):
    by_hand = []

    def plot(*arguments) -> None:
        by_hand.extend(plt.plot(KAPPAS, KAPPAS) + plt.plot(KAPPAS, KAPPAS))

    monkeypatch.setattr(reporter, "_plot_methods", plot)
    before = plt.rcParams["axes.prop_cycle"]
    reporter.draw_score_curves_on_forget_set()
    taken = {style["color"] for style in method_styles(METHODS).values()}
    assert len({line.get_color() for line in by_hand} - taken) == 2
    assert "None" not in {line.get_marker() for line in by_hand} and len({line.get_marker() for line in by_hand}) == 2
    assert plt.rcParams["axes.prop_cycle"] == before


def test_colours_are_the_same_with_and_without_other_methods():
    styles, known = method_styles(["mimu", "mine", "original", "yours"]), method_styles([])
    assert known.items() <= styles.items()
    assert len({styles[name]["color"] for name in ("mimu", "mine", "original", "yours")}) == 4
    assert len({style["color"] for style in known.values()} | set(module.FREE_COLORS)) == len(known) + 6


def test_marks_far_from_most_are_out_of_the_frame_of_retain_scores(tmp_path, drawn):
    """Tukey's fences of 20 and 96.3 to 97, a line each that kappa does not change."""
    experiments = [experiment(kappa=kappa, methods=(*METHODS, "sft", "bad")) for kappa in KAPPAS]
    scores = {"original": 96.9, "retrain": 97.0, "mine": 96.3, "mimu": 96.6, "sft": 96.7, "bad": 20.0}
    for each in experiments:
        each[RETAIN] = {name: {"score": score} for name, score in scores.items()}
        each[FORGET]["no retain score"] = {"loss": 1.0, "score": 1.0, "probability": 0.1}
    reporter = Reporter(CONFIG, write(tmp_path, experiments), tmp_path / "reports")
    reporter.draw_score_curves_on_retain_set()
    reporter.draw_summary()
    reporter.draw_score_curves_on_forget_set()
    for axes in (drawn[0].axes[0], drawn[1].axes[1]):
        low, high = axes.get_ylim()
        assert 96 < low < 96.3 and 97 < high < 97.2
    assert drawn[0].axes[0].get_xlabel().endswith("\noutside the frame (mean): bad 20")
    assert drawn[1].axes[0].get_ylim()[0] < 20, "on the left of the summary is all"
    assert drawn[2].axes[0].get_ylim()[0] < min(min(line.get_ydata()) for line in drawn[2].axes[0].lines)
    assert texts(drawn[2].legends[0].get_texts()) == [*METHODS, "sft", "bad", "no retain score"]


BLUE = method_styles([])["mimu"]["color"]
# method: forget score, divergence on the forget set, on the retain set, probe recall, relearn steps
AUDITED = {
    "original": (95.0, 0.9, 0.01, 95.0, 0),
    "mimu": (0.0, 0.1, 0.01, 94.0, 10),
    "retrain": (0.0, 0.0, 0.0, 88.0, 30),
    "far": (0.5, 0.3, 0.02, 90.0, None),
    "loud": (50.0, 0.2, 0.001, 88.0, 30),
}


def audited(digit) -> dict:
    forget, audits = {}, {}
    for name, (score, js_forget, js_retain, recall, steps) in AUDITED.items():
        forget[name] = {"loss": 3.0, "score": score, "probability": 0.1}
        audits[name] = {
            "js_forget": js_forget + (digit - 5) / 100, "js_retain": js_retain, "loss_attack": 0.5,
            "entropy_attack": 10.0, "probe_recall": {"linear": recall}, "relearn_from": {},
            "usable_bits": {"representation": {"linear": recall / 200, "neighbours": 0.0}},
            "relearn_steps": steps or 0, "came_back": steps is not None, "weights_changed": 6,
        }  # fmt: skip
    retain = dict.fromkeys(AUDITED, {"loss": 0.1, "score": 97.0})
    changes = {FORGET: forget, RETAIN: retain, "audit_metrics": audits, "zeroed": [0, 1, 2, 3, 5 + digit, 19]}
    return experiment(0, digit, 7, "auto", AUDITED, **changes)


@pytest.fixture
def beside(tmp_path):
    return Reporter(CONFIG, write(tmp_path, [audited(4), audited(6)]), tmp_path / "reports")


def column(table: str, index: int) -> list[str]:
    return [re.sub(r" ± [\d.]+", "", cells[index]) for cells in [*rows_of(table).values()][1:]]


def test_the_methods_stand_in_the_order_of_their_distance_to_retraining(beside):
    for each in beside.experiments:
        each[FORGET]["by hand"] = {"loss": 1.0, "score": 1.0, "probability": 0.5}
    methods = ["retrain", "mimu", "loud", "far", "original"]
    assert by_distance(beside) == methods, "no model that was scored by hand was audited"
    distances, left, gaps, cost = (audit_table(beside, of) for of in (DIVERGENCES, LEFT_BEHIND, GAPS, COST))
    assert [*rows_of(distances)][1:] == methods
    assert rows_of(distances)["far"][0] == f"0.300 ± {stdev([0.29, 0.31]):.3f}", "with one seed it is over the digits"
    assert column(distances, 0) == ["0.000", "0.100", "0.200", "0.300", "0.900"]
    assert column(distances, 1) == ["0.0000", "0.0100", "0.0010", "0.0200", "0.0100"]
    assert column(left, 3) == ["88.0", "94.0", "88.0", "90.0", "95.0"] and column(left, 0) == ["0.500"] * 5
    assert column(left, 2) == ["+0.00", "+0.86", "+0.00", "+0.29", "+1.00"]
    assert column(gaps, 0) == ["+0.00", "+0.00", "+50.00", "+0.50", "+95.00"]
    assert rows_of(gaps)["method"][:2] == ["forget score, points", "retain score, points"]
    assert column(cost, 1)[0] == "6"


def test_a_class_that_does_not_come_back_is_marked(beside):
    for steps, text in ((200, "> 200.0"), (None, "–")):
        for each in beside.experiments:
            each["audit_metrics"]["far"]["relearn_steps"] = steps
        assert column(audit_table(beside, LEFT_BEHIND), 4) == ["30.0", "10.0", "30.0", text, "0.0"]


def test_every_audit_has_a_panel_with_a_line_at_retraining(beside, drawn):
    draw_audits(beside)
    assert len(drawn[0].axes) == 8 and all(axes.get_xlabel() for axes in drawn[0].axes)
    assert texts(drawn[0].axes[0].get_yticklabels()) == by_distance(beside)
    recall = drawn[0].axes[5]
    assert list(recall.lines[-1].get_xdata()) == [88.0, 88.0]
    small, large = recall.lines[2:4]  # of mimu
    assert list(small.get_xdata()) == [94.0, 94.0] and large.get_xydata().tolist() == [[94.0, 1.0]]
    assert small.get_color() == large.get_color() == BLUE
    assert drawn[0].axes[1].get_xscale() == "linear", "no divergence is far away"


def test_the_trade_off_is_against_retraining(beside, drawn):
    for each in beside.experiments:
        each[RETAIN]["far"]["score"] = 17.0
    rows = [Row(name, beside, name) for name in beside.methods]
    draw_scores(rows, beside.folder / "trade_off.png", CONFIG)
    forget, retain = drawn[0].axes
    assert texts(forget.get_yticklabels()) == beside.methods, "told apart by their names"
    row = beside.methods.index("far")
    assert forget.lines[2 * row + 1].get_xydata().tolist() == [[0.5, row]]
    assert retain.lines[2 * row + 1].get_xydata().tolist() == [[-80.0, row]]
    assert forget.get_xscale() == retain.get_xscale() == "symlog"
    assert forget.get_xlabel() == "forget score, %\n(symmetric log scale)"
    assert drawn[0].get_suptitle() == "MNIST, classes 4, 6, the test split, 784-8-10"
    low, high = retain.get_xlim()
    assert low < retain.dataLim.xmin and retain.dataLim.xmax < high
    assert sorted(tick for tick in retain.get_xticks() if low <= tick <= high) == [-100, -30, -10, -3, -1, 0]


def test_the_picture_of_the_masks_shows_what_digits_have_in_common(beside, drawn):
    draw_masks(beside)
    first, shares = (part.axes[0] for part in drawn[0].subfigs)
    assert first.get_title() == "class 4: 6 weights" and drawn[0].get_suptitle() == "MNIST, 784-8-10"
    assert sorted(map(tuple, first.lines[0].get_xydata())) == [(0, 0), (1, 0), (2, 0), (3, 0), (9, 0), (19, 0)]
    half = pytest.approx(500 / 6)
    assert shares.images[0].get_array().tolist() == [[100.0, half], [half, 100.0]]
    assert texts(shares.get_xticklabels()) == ["4", "6"]


# method: retain score, recall of the probe; hundredths of that are bits of one probe
KNOWN = {"original": (95.0, 96.0), "mimu": (93.0, 91.0), "retrain": (97.0, 80.0)}


def result(seed, digit, kappa, methods, cost) -> dict:
    """What a seed or digit adds has another sign for the retrained classifier; mimu loses with cost and kappa."""
    lost = cost / 4 + (0 if kappa == "auto" else kappa / 10)
    more, retain, audits = seed + (digit == 9) / 4, {}, {}
    for method in methods:
        score, recall = KNOWN[method]
        far = -more if method == "retrain" else more - lost * (method == "mimu")
        retain[method] = {"score": score + far}
        audits[method] = {
            "probe_recall": {"linear": recall + far},
            "usable_bits": {"representation": {"a": 0.1, "b": (recall + far) / 100}, "hidden_0": {"a": 0.4}},
            "prototype_recall": {"1": recall + 2 * far, "10": 50.0},
            "relearn_from": {"1": 40 + seed, "10": None if method == "mimu" else 10},
        }
    number, choice = (10 + digit, "auto") if kappa == "auto" else (kappa, "fixed")
    changes = {FORGET: dict.fromkeys(methods, {"score": digit / 10}), RETAIN: retain, "audit_metrics": audits}
    return experiment(seed, digit, number, choice, methods, **changes)


def variant(folder, methods=("mimu",), cost=0.0, kappas=("auto",), **changes) -> Reporter:
    folder.mkdir()
    results = [result(seed, digit, kappa, methods, cost) for seed, digit, kappa in product(SEEDS, DIGITS, kappas)]
    return Reporter(CONFIG, write(folder, [each | changes for each in results]), folder)


@pytest.fixture
def variants(tmp_path) -> dict[str, Reporter]:
    other = {"dataset": "MNIST", "held_out": 0, "classifier": 5}
    return {
        "strong": variant(tmp_path / "strong", cost=8.0),
        "none": variant(tmp_path / "none", [*KNOWN]),
        "weak": variant(tmp_path / "weak", cost=2.0, kappas=("auto", 20, 10)),
        "other": variant(tmp_path / "other", cost=4.0, config=other),
        "silent": variant(tmp_path / "silent", [*KNOWN], cost=6.0, audit_metrics={}),
        "elsewhere": variant(tmp_path / "elsewhere", cost=8.0, mask_layer=[0, 1]),
    }


def test_variants_are_compared_with_retraining_the_same_classifier(variants, tmp_path):
    table, left_behind = map(rows_of, compare(variants, tmp_path))
    assert variants["strong"].figures(RETAIN_GAP, "mimu") == pytest.approx((-6 + 0.25, -6 + 0.25 + 2))
    assert variants["weak"].figures(PROBE, "mimu", 20) == pytest.approx((8.5 + 0.25, 8.5 + 0.25 + 2))
    assert all(map(math.isnan, variants["other"].figures(RETAIN_GAP, "mimu"))), "another classifier"
    assert table["variant"][1:4] == ["worst", "retain score against retrain, points", "worst"]
    assert table["strong"] == ["0.60 ± 0.00", "0.90", "-4.75 ± 1.41", "-6.00", "8.00 ± 0.00", "0.25 ± 0.00"]
    assert table["other"][2:4] == ["–", "–"] and "none: retrain" not in table and "none: original" in table
    names = [f"{each} a class" for each in ("prototype, 1", "prototype, 10", "steps, 1", "steps, 10")]
    assert left_behind["variant"] == ["IDI, representation", "IDI, hidden layer 0", PROBE.name, *names]
    by_hand = [18.5 / 32.5, 22.5 / 36.5]  # of each seed
    assert variants["strong"].figures(INDEX, "mimu") == pytest.approx(by_hand)
    probes = [f"{fmean(by_hand):+.2f} ± {stdev(by_hand):.2f}", "–", "+10.2 ± 1.4", "+9.5 ± 2.8", "+0.0 ± 0.0"]
    assert left_behind["strong"] == [*probes, "40 ± 1", "–"]
    assert left_behind["none: retrain"] == ["+0.00 ± 0.00", "–"] + ["+0.0 ± 0.0"] * 3 + ["40 ± 1", "10 ± 0"]
    assert left_behind["other"] == ["–"] * 5 + ["40 ± 1", "–"] and "silent" not in left_behind


@pytest.mark.parametrize(("again", "is_given"), [(85.0, True), (97.0, False), (62.0, False)])
def test_the_index_is_not_given_where_another_retrained_classifier_is_as_far(tmp_path, monkeypatch, again, is_given):
    monkeypatch.setitem(KNOWN, "retrain_again", (97.0, again))
    alone = variant(tmp_path / "alone", [*KNOWN])
    assert not is_given or alone.figures(INDEX, "retrain_again") == pytest.approx([10.5 / 32.5, 14.5 / 36.5])
    assert alone.cells([INDEX], "original") == ["+1.00 ± 0.00" if is_given else "–"]


def test_variants_and_the_frontier_are_drawn(variants, tmp_path, drawn):
    tables = compare(variants, tmp_path)
    assert (tmp_path / "variants.md").read_text() == "\n\n".join(["# Variants", *tables]) + "\n"
    panels, frontier = (figure.axes for figure in drawn)
    assert texts(panels[0].get_yticklabels()) == ["strong", "none", "weak", "other", "silent", "elsewhere"]
    assert [line.get_xdata()[0] for line in panels[1].lines[1:4:2]] == pytest.approx([-4.75, -2.75])
    (axes,) = frontier
    assert texts(drawn[1].legends[0].get_texts()) == ["retrain", "original", "mimu"], "the nearest first"
    assert axes.get_xlabel() == "IDI (hollow: masks of other layers)"
    assert axes.get_ylabel() == RETAIN_GAP.name
    (line,) = (each for each in axes.lines if each.get_color() == BLUE and each.get_linestyle() == "-")
    index = lambda lost: fmean([(22.5 - 2 * lost) / 32.5, (26.5 - 2 * lost) / 36.5])  # noqa: E731
    curve = [[pytest.approx(index(lost)), -2.75 - lost] for lost in (2, 0.5, 0)]
    assert line.get_xydata().tolist() == curve, "in the order of what the probes find"
    (hollow,) = (line for line in axes.lines if line.get_fillstyle() == "none" and len(line.get_xdata()))
    assert hollow.get_xydata().tolist() == [[pytest.approx(index(2)), -4.75]]
    draw_frontier([variant(tmp_path / "no original", ["mimu", "retrain"])], tmp_path / "frontier.png", CONFIG)
    assert drawn[2].axes[0].get_xlabel() == PROBE.name


def test_titles_name_all_that_differs_and_of_many_methods_the_nearest_are_drawn(tmp_path, monkeypatch, drawn):
    for index in range(12):
        monkeypatch.setitem(KNOWN, f"method {index}", (96.0, 90.0 + index))
    few = variant(tmp_path / "few", cost=2.0)
    many = variant(tmp_path / "many", [*KNOWN], dataset="digits")
    draw_frontier([many, few], tmp_path / "frontier.png", CONFIG)
    assert drawn[0].axes[0].get_title() == "digits / MNIST, classes 3, 9 (boot), the test split, 784-8-10"
    names = texts(drawn[0].legends[0].get_texts())
    assert len(names) == 10 and not {"method 10", "method 11"} & set(names)


def test_reports_take_the_place_of_those_before_and_of_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format, dpi: file.write(f"{format} {dpi}".encode()))
    reports = tmp_path / "reports"
    mine = {"mine.md", "first_try/summary.png", "variants/mine.md"}
    for name in mine:
        write_text(reports / name, "mine")
    (reports / "variants" / "empty").mkdir()
    (reports / "trade_off.pdf").touch()
    two = [write(tmp_path, [experiment(0, digit, 7, "auto", ("mimu", "retrain"))]) for digit in DIGITS]
    other = write(tmp_path, [experiment(1, 3, 7, "auto", ("mimu",), top_k=6)])
    closing = report({("", 5): (CONFIG, two[0] + two[1]), ("", 6): (CONFIG, other)}, reports)
    said = ["forgetting classes 3, 9 (boot)", "forgetting class 3"]
    assert [table.split(", scored")[0].split(": ")[1] for table in closing] == said
    of_top_k = {f"top_k_5/{name}" for name in ("summary.md", "mask_efficacy.png", "trade_off.png", "masks.png")}
    of_top_k |= {"top_k_6/summary.md", "top_k_6/mask_efficacy.png"}
    assert set(files(reports)) == mine | of_top_k
    own = module.ReporterConfig(50, ("pdf", "svg"))
    alone = write(tmp_path, [audited(4)])
    report({("first one", 6): (CONFIG, other), ("other", 5): (own, alone)}, reports)
    of_first = {"variants.md", "variants.png", "frontier.png", "variants/first_one/summary.md"}
    of_other = {f"variants/other/{name}" for name in ("summary.md", "audits.pdf", "audits.svg")}
    assert set(files(reports)) == mine | of_first | of_other
    assert (reports / "variants.png").read_text() == "png 25"
    assert (reports / "variants" / "other" / "audits.svg").read_text() == "svg 50", "with its own settings"
    report({("", 5): (CONFIG, alone)}, reports)
    assert set(files(reports)) == mine | {"summary.md", "mask_efficacy.png", "trade_off.png", "audits.png"}
    assert "## Distance to retraining" in (reports / "summary.md").read_text()
    assert (reports / "variants" / "empty").exists() and not (reports / "variants" / "other").exists()


@pytest.fixture
def plotted(tmp_path) -> dict:
    results = experiment(0, 9, 10, "auto", ("original", "mimu", "row"))
    results["class_probabilities"] = {name: [0.1] * 10 for name in results["methods"]}
    histogram = {"layer": 1, "shape": [1, 2], "edges": [-1.0, 0.0, 1.0], "all": [9, 5], "zeroed": [0, 4]}
    results["weight_histograms"] = [histogram]
    results[RETAIN]["row"] = {"loss": None, "score": 50.0}
    write_text(tmp_path / "Metrics and Plots" / "metrics" / f"{results['id']}.json", json.dumps(results))
    return results


def test_the_plots_of_an_experiment_are_drawn_where_they_are_missing_or_old(plotted, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format, dpi: file.write(f"{format} {dpi}".encode()))
    source, folder = tmp_path / "source.py", tmp_path / "Metrics and Plots"
    source.touch()
    monkeypatch.setattr(plots, "DRAWN_BY", (source,))
    config = module.ReporterConfig(25, ("png", "pdf"))
    plots.draw(plotted, tmp_path, config)
    paths = sorted(folder.glob("plots/*/*"))
    names = product(plots.PLOTS, config.format)
    assert {path.name: path.read_text() for path in paths} == {f"{name}.{of}": f"{of} 25" for name, of in names}
    (metrics,) = folder.glob("metrics/*")
    for older, expected in (({}, "kept"), ({metrics}, "png 25"), ({source}, "png 25"), (None, "png 25")):
        for path in (metrics, source, *paths):
            os.utime(path, (2, 2) if older and path in older else (1, 1))
        paths[1].write_text("kept")
        if older is None:
            paths[0].unlink()
        plots.draw(plotted, tmp_path, config)
        assert paths[1].read_text() == expected


def test_plots_of_an_experiment_say_what_they_show_with_a_number_beside_every_mark(plotted, tmp_path, drawn):
    plots.draw(plotted, tmp_path, CONFIG)
    plots.draw_metrics(Reporter(CONFIG, write(tmp_path, [plotted]), tmp_path), "mask_efficacy", "K = 5", KEPT)
    forget, retain, probabilities, weights, efficacy = drawn
    of = "MNIST, class 9 (boot), the test split, 784-8-10"
    assert forget.get_suptitle() == retain.get_suptitle() == weights.get_suptitle() == f"{of}, kappa = auto"
    assert efficacy.get_suptitle() == "K = 5"
    assert probabilities.axes[0].get_title() == f"{of}, kappa = auto, forget set", "centred above the matrix"
    names = ["original", "mimu", "row"]
    assert texts(forget.axes[0].get_yticklabels()) == texts(probabilities.axes[0].get_yticklabels()) == names
    assert texts(efficacy.axes[0].get_yticklabels()) == ["mimu"]
    assert texts(probabilities.axes[0].get_xticklabels()) == [*map(str, range(9)), "boot"]
    assert texts(weights.axes[0].get_legend().get_texts()) == ["all 14 weights", "4 zeroed by mimu"]
    (score,) = (axes for axes in retain.axes if axes.get_xlabel() == "retain score, %")
    values = [plotted[RETAIN][name]["score"] for name in names]
    assert [line.get_xdata()[0] for line in score.lines[1::2]] == pytest.approx(values)
    assert texts(score.texts) == [f"{value:.2f}" for value in values], "of one precision"
    assert [to_hex(line.get_color()) for line in score.lines[1::2]][:2] == ["#000000", BLUE.lower()]


def test_panels_end_where_metrics_do_and_show_every_number(plotted, tmp_path, drawn):
    plotted[FORGET] = {
        "original": {"loss": 0.0, "score": 100.0, "probability": 1.0},
        "mimu": {"loss": 500.0, "score": 0.0, "probability": 1e-9},
        "retrain": {"loss": 20.0, "score": 0.25, "probability": 0.125},
    }
    plots.draw_metrics(Reporter(CONFIG, write(tmp_path, [plotted]), tmp_path), "unlearning", "", FORGET)
    score, probability, loss = drawn[0].axes
    assert score.get_xlim() == (0.0, 100.0) and probability.get_xlim() == (0.0, 1.0) and loss.get_xlim()[0] == 0.0
    assert not any(line.get_clip_on() for line in score.lines[:6])
    numbers = [["100.00", "0.00", "0.25"], ["1.0000", "0.0000", "0.1250"], ["0.00", "500.00", "20.00"]]
    assert [texts(axes.texts) for axes in (score, probability, loss)] == numbers
    assert {text.get_rotation() for text in score.texts} == {0.0} and {text.xy[0] for text in score.texts} == {1}
    assert [axes.lines[-1].get_xdata() for axes in (score, loss)] == [[0.25, 0.25], [20.0, 20.0]]
    assert loss.get_xscale() == "symlog" and loss.get_xlabel() == "forget loss, nats\n(symmetric log scale)"


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [([1.0, 2.0, 3.0, 99.0], (1.0, 3.0)), ([5.0, 5.0, 5.0, 5.0, 6.0], (5.0, 6.0)), ([math.nan, 2.0, 2.0], (2.0, 2.0))],
)
def test_a_frame_shows_all_but_the_far_ones(numbers, shown):
    low, high = module.frame(np.array(numbers))
    assert low < shown[0] and shown[1] < high < shown[1] + 1
    assert module.frame(np.array([math.nan])) == (0.0, 1.0), "nothing is known: an empty frame"
