"""Curves, summary, tables and plots against numbers worked out by hand, from JSON that the tests write."""

import json
import math
import os
import random
import re
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from running import files

import reporter as module
import tables.figures as plots
from mimu.files import write_text
from reporter import FORGET, FORGET_SCORE, KEPT, RETAIN, RETAIN_GAP, WORST, Column, Experiments, Reporter, method_styles
from tables import comparison, report
from tables.comparison import INDEX, PROBE_GAP, audit_columns, audit_table, by_distance, compare, draw_audits
from tables.figures import Row, draw_accuracies, draw_panels

CONFIG = module.ReporterConfig(dpi=25, format=("png",))
KAPPAS = [10, 20, 40]
SEEDS, DIGITS = (0, 1), (3, 9)
PLACES = [*product(SEEDS, DIGITS)]
METHODS = ["original", "mimu", "retrain", "saliency", "mine"]
STYLES = method_styles(METHODS)
CURVES = {  # file: method, axis
    "loss_forget_set": ("draw_loss_curves_on_forget_set", "cross entropy on the forget set (nats)"),
    "score_forget_set": ("draw_score_curves_on_forget_set", "forget accuracy (%)"),
    "loss_retain_set": ("draw_loss_curves_on_retain_set", "cross entropy on the retain set (nats)"),
    "score_retain_set": ("draw_score_curves_on_retain_set", "retain accuracy (%)"),
    "probability_on_forget_class": ("draw_classifier_probability_on_forget_class", "probability of the forget class"),
}


def number(evaluation, method, metric, seed, digit, kappa) -> float:
    """A number between 0 and 1 that belongs to its place; that of `retrain` does not depend on kappa."""
    place = (evaluation, method, metric, seed, digit, None if method == "retrain" else kappa)
    return random.Random(str(place)).random()


def experiment(seed=0, digit=3, kappa="auto", methods=METHODS, **changes) -> dict:
    """An experiment whose kappa, chosen automatically, is 10 + digit, and that of saliency one more."""
    metrics = {FORGET: {}, RETAIN: {}}
    for method, evaluation, name in product(methods, metrics, ("loss", "score", "probability")):
        metrics[evaluation].setdefault(method, {})[name] = number(evaluation, method, name, seed, digit, kappa)
    is_auto, zeroed = (True, 10 + digit) if kappa == "auto" else (False, kappa)
    chosen = {"mimu": zeroed, "saliency": zeroed + is_auto}
    # On training samples the retain accuracy falls with kappa, the forget accuracy is 0 from 20 on.
    training = {"forget": {"score": 50.0 if zeroed < 20 else 0.0}, "retain": {"score": 97.0 - zeroed / 100}}
    about = {"does": "Something.", "paper": "", "touches": "a mask", "needs": "both sets"}
    return {
        "id": f"{seed}_{digit}_{kappa}", "seed": seed, "forget_digit": digit, "kappa": zeroed,
        "kappa_choice": "auto" if is_auto else "fixed", "top_k": 5, "num_graph_vertices": 200, "num_weights": 1000,
        "mask_efficacy_metrics": {"mimu": {"loss": 0.5, "score": 90.0, "probability": 0.7}},
        "training_split_metrics": {"mimu": training}, "audit_metrics": {}, "methods": dict.fromkeys(methods, about),
        "num_zeroed": {name: chosen.get(name) for name in methods}, "seconds": dict.fromkeys((*methods, "gcn"), 0.25),
        "gave_up": {name: False for name in chosen if is_auto and name in methods},
        "dataset": "MNIST", "class_names": [*map(str, range(9)), "boot"], "split": "the test split",
        "classifier": "784-8-10", "config": {"dataset": "MNIST", "held_out": 0, "classifier": {"hidden_sizes": [8]}},
    } | metrics | changes  # fmt: skip


def write(folder, experiments) -> list:
    paths = [folder / f"{index}_{content['id']}.json" for index, content in enumerate(experiments)]
    for path, content in zip(paths, experiments):
        write_text(path, json.dumps(content))
    return paths


def sweep(*kappas) -> list[dict]:
    return [experiment(*place, kappa) for place, kappa in product(PLACES, kappas)]


@pytest.fixture
def reporter_of(tmp_path):
    return lambda experiments: Reporter(CONFIG, write(tmp_path, experiments), tmp_path / "reports")


@pytest.fixture
def reporter(reporter_of):
    return reporter_of(sweep("auto", *KAPPAS)[::-1])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved and would have been closed."""
    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    close("all")


@pytest.fixture
def no_pictures(monkeypatch):
    """The files of figures hold their format and resolution."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format, dpi: file.write(f"{format} {dpi}".encode()))


def mean_by_hand(evaluation, method, metric, kappa, seeds=SEEDS):
    return fmean(number(evaluation, method, metric, *place, kappa) for place in product(seeds, DIGITS))


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of a table by the first of each row, the header's included."""
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if not line.startswith("| -")]
    return {row[0]: row[1:] for row in rows}


def means_of(table: str, index: int) -> list[str]:
    """A column without its header and the deviations."""
    return [cells[index].partition(" ±")[0] for cells in [*rows_of(table).values()][1:]]


def texts(artists) -> list[str]:
    return [artist.get_text() for artist in artists]


def lines_of(axes, label) -> list:
    return [line for line in axes.lines if line.get_label() == label]


TEXTS = [([1.25], "1.2"), ([1.0, 3.0], "2.0 ± 1.4"), ([math.nan], "–"), ([2e17, 2e17], "2.0e+17")]


@pytest.mark.parametrize(("numbers", "text"), TEXTS)
def test_numbers_are_written_with_their_deviation(numbers, text):
    assert Column((), spec=".1f").text(numbers) == text


def test_tables_have_aligned_columns():
    lines = module.markdown_table(["name", "n"], [["a", 1], ["long name", 22]]).splitlines()
    assert lines == ["| name      |  n |", "| --------- | -: |", "| a         |  1 |", "| long name | 22 |"]


def test_means_and_deviations_over_seeds_gaps_and_shares_and_the_worst_by_hand(reporter):
    experiments = reporter.experiments
    means = [mean_by_hand(FORGET, "mimu", "score", "auto", seeds=[seed]) for seed in SEEDS]
    assert experiments.by_seed(FORGET_SCORE, "mimu") == pytest.approx(means)
    assert experiments.cells([FORGET_SCORE], "mimu") == [f"{fmean(means):.2f} ± {stdev(means):.2f}"]
    scores = {name: [number(RETAIN, name, "score", *place, "auto") for place in PLACES] for name in METHODS}
    gaps = np.subtract(scores["mimu"], scores["retrain"])
    assert sum(experiments.numbers(RETAIN_GAP, "mimu"), []) == pytest.approx(gaps)
    forget = max(number(FORGET, "mimu", "score", *place, "auto") for place in PLACES)
    assert rows_of(experiments.table(WORST))["mimu"] == [f"{forget:.2f}", f"{min(gaps):+.2f}"]
    assert experiments.by_seed(Column(("num_zeroed",), percent_of="num_graph_vertices"), "mimu") == [8.0, 8.0]


@pytest.mark.parametrize("is_missing", [False, True])
def test_what_is_null_or_missing_is_a_gap_in_a_curve_and_a_dash_in_a_table(reporter_of, is_missing):
    results = sweep(*KAPPAS)
    results[0][FORGET]["mine"]["loss"] = None
    reporter = reporter_of(results[is_missing:])
    assert [math.isnan(loss) for loss in reporter.get_mine_unlearning_forget_set_loss()] == [True, False, False]
    assert reporter.experiments.cells([module.FORGET_LOSS], "mine", 10) == ["–"]
    assert not is_missing or reporter.experiments.cells(WORST, "mimu", 10) == ["–", "–"]
    assert reporter.about().startswith("Of the fixed kappas, 20 is the best on training samples: 20 weights, 10 % of")


@pytest.mark.parametrize("file", CURVES)
def test_curves_show_every_method_and_getters_give_them(reporter, drawn, file):
    metric, (method_name, axis) = file.split("_")[0], CURVES[file]
    samples, evaluation = ("retain", RETAIN) if "retain" in file else ("forget", FORGET)
    getattr(reporter, method_name)()
    assert (reporter.folder / f"{file}.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = drawn[0].axes
    assert texts(drawn[0].legends[0].get_texts()) == [*METHODS, "kappa auto"]
    assert axes.get_title() == "MNIST, classes 3, 9 (boot), the test split, 784-8-10"
    assert axes.get_xlabel() == "weights zeroed, kappa" and axes.get_ylabel() == axis
    assert texts(axes.get_xticklabels()) == ["10", "20", "40"]
    for method, line in zip(METHODS, axes.lines):
        y = getattr(reporter, f"get_{method}_unlearning_{samples}_set_{metric}")()
        assert y == pytest.approx([mean_by_hand(evaluation, method, metric, kappa) for kappa in KAPPAS])
        assert line.get_label() == method and line.get_color() == STYLES[method]["color"]
        if method == "retrain":
            assert line.get_ydata() == [y[0], y[0]] and line.is_dashed() and line.get_marker() == "None"
            assert line.get_transform() == axes.get_yaxis_transform(), "from edge to edge"
        else:
            assert line.get_xydata().T.tolist() == [KAPPAS, y]
            assert not line.is_dashed() and line.get_marker() == STYLES[method]["marker"]
    for method, zeroed, ring in zip(("mimu", "saliency"), (16, 17), lines_of(axes, "kappa auto"), strict=True):
        assert ring.get_xydata()[0] == pytest.approx([zeroed, mean_by_hand(evaluation, method, metric, "auto")])
        assert ring.get_color() == STYLES[method]["color"]
    assert not hasattr(reporter, "get_nobody_unlearning_forget_set_score")


def test_the_summary_has_the_numbers_of_auto_and_of_every_kappa(reporter):
    experiments = reporter.experiments
    assert experiments.kappas == KAPPAS and experiments.kappa == "auto"
    reporter.plot(["## Mine", "More."])
    names = {f"{name}.png" for name in CURVES} | {"summary.md", "summary.png"}
    assert set(files(reporter.folder)) == names | {".written"}
    assert (reporter.folder / ".written").read_text().splitlines() == sorted(names)
    summary = (reporter.folder / "summary.md").read_text()
    headings = ["Every method, kappa = auto", "Mine", "Mask efficacy, K = 5", "Every kappa"]
    assert re.findall("^## (.*)", summary, re.MULTILINE) == headings
    assert "forget accuracy, % | probability of the forget class | forget loss, nats |\n" in summary
    assert re.search(r"\| +90.000 ± 0.000 \| +0.700 ± 0.000 \| +0.500 ± 0.000 \|\n", summary)
    loss = [mean_by_hand(FORGET, "mimu", "loss", "auto", [seed]) for seed in SEEDS]
    (row,) = re.findall(r"\n\| mimu .* 16 ± 0 .*", summary)
    assert row.split(" | ")[5].strip() == f"{fmean(loss):.2f} ± {stdev(loss):.2f}" and row.endswith(" 0.25 ± 0.00 |")
    lines = experiments.kappas_table().splitlines()
    assert [line.split()[3] for line in lines[2:6]] == ["10", "20", "40", "auto"] and "\n".join(lines) in summary
    assert experiments.cells([Column(module.FORGET_LOSS.keys, spec=".3f")], "mimu", 20)[0] in lines[7]
    about, table = reporter.closing_table().split("\n\n")
    assert about.startswith("MNIST, 784-8-10: forgetting classes 3, 9 (boot), evaluated on the test split. kappa is ")
    assert about.endswith("16 weights, 8 % of the masked ones and 1.6 % of all on average.")
    assert rows_of(table)["mine"] == [*experiments.cells(module.METRICS[:2], "mine"), "–"]


def test_a_sweep_of_auto_alone_has_no_curves_and_names_the_methods_that_gave_up(reporter_of):
    results = sweep("auto")
    for index, each in enumerate(results):
        each["gave_up"] = {"mimu": index > 1, "saliency": index == 1, "random": False}
        each |= {"split": "100 held-out training samples", "gcn_untrained": True}
    alone = reporter_of(results)
    alone.plot()
    assert set(files(alone.folder)) == {"summary.md", ".written"}
    summary = (alone.folder / "summary.md").read_text()
    scope = "evaluated on 100 held-out training samples. Mean over classes: 2, ± standard deviation over seeds: 2."
    assert summary.startswith(f"# Forgetting classes 3, 9 (boot) of MNIST\n\n784-8-10, {scope}\n")
    text = "gave up before the class was forgotten on"
    about = f"mimu {text} 2 of 4 requests. saliency {text} 1 of 4 requests. The GCN stayed untrained on 4 of 4:"
    assert about in alone.about() in summary and "Every kappa" not in summary


def test_lines_that_coincide_remain_visible(reporter_of, drawn):
    """Each line lies below those that are thinner, or whose dashes are shorter."""
    methods = ["original", "mimu", "sft", "saliency", "retrain"]
    same = {FORGET: dict.fromkeys(methods, {"score": 0.0})}
    reporter_of([experiment(kappa=each, methods=methods, **same) for each in KAPPAS]).draw_score_curves_on_forget_set()
    original, mimu, sft, saliency, retrain = drawn[0].axes[0].lines
    assert mimu.get_linewidth() > saliency.get_linewidth() and mimu.get_markersize() > saliency.get_markersize()
    orders = [line.get_zorder() for line in (mimu, saliency, original, sft, retrain)]
    assert orders == sorted(orders) and len(set(orders)) == 4, "of one order, later ones are above"
    dashes = [line._unscaled_dash_pattern for line in (original, sft, retrain)]
    assert all(offset == 0 for offset, _ in dashes) and len({sum(pattern) for _, pattern in dashes}) == 1
    assert dashes[0][1][0] > dashes[1][1][0] > dashes[2][1][0]


def test_lines_by_hand_and_further_methods_have_colours_of_their_own(reporter, drawn, monkeypatch):
    by_hand = []
    monkeypatch.setattr(reporter, "_plot_methods", lambda x, *_: by_hand.extend(plt.plot(x, x) + plt.plot(x, x)))
    reporter.draw_score_curves_on_forget_set()
    assert len({line.get_color() for line in by_hand} - {style["color"] for style in STYLES.values()}) == 2
    known = method_styles([])
    assert known.items() <= STYLES.items() and "mine" not in known
    assert len({style["color"] for style in known.values()} | set(module.FREE_COLORS)) == len(known) + 6


def test_the_frame_leaves_out_what_is_far_and_the_summary_enlarges_what_is_forgotten(reporter_of, drawn):
    retain = {"original": 96.9, "mimu": 96.6, "retrain": 97.0, "mine": 96.3, "sft": 96.7, "bad": 20.0}
    forget = {"original": 95.0, "mimu": 0.4, "retrain": 0.0, "mine": 0.1, "sft": 0.3, "bad": 0.2, "other": 50.0}
    scores = {RETAIN: {name: {"score": retain[name]} for name in retain}}
    scores[FORGET] = {name: {"score": forget[name]} for name in forget}
    reporter = reporter_of([experiment(kappa=kappa, methods=[*forget], **scores) for kappa in KAPPAS])
    reporter.draw_score_curves_on_retain_set()
    reporter.draw_summary()
    zoomed, (everything, near) = drawn[0].axes[0], drawn[1].axes
    for axes in (zoomed, near):
        low, high = axes.get_ylim()
        assert 96 < low < 96.3 and 97 < high < 97.2
    assert zoomed.get_xlabel().endswith("\noutside the frame (mean): bad 20")
    assert everything.get_ylim()[0] < 20 and everything.get_xlim()[1] > 95, "on the left is all"
    low, high = near.get_xlim()
    assert low < 0 and 0.4 < high < 0.5 and near.get_title().startswith("enlarged: ")
    assert everything.get_xlabel() == near.get_xlabel() == "forget accuracy (%), one mark per kappa"
    for axes in (everything, near):
        (star,), (mark,) = lines_of(axes, "retrain"), lines_of(axes, "original")
        assert star.get_fillstyle() == "none" and star.get_zorder() > mark.get_zorder()
        assert star.get_markersize() > mark.get_markersize()
    assert texts(drawn[1].legends[0].get_texts()) == [*forget], "the last has no retain accuracy"


FRAMES = [([1, 2, 3, 3, 99], (1, 3)), ([5, 5, 5, 5, 6], (5, 6)), ([math.nan, 2, 2], (2, 2)), ([math.nan], (0, 0))]


@pytest.mark.parametrize(("numbers", "shown"), FRAMES)
def test_a_frame_shows_all_but_the_far_ones(numbers, shown):
    low, high = module.frame(np.array(numbers, dtype=float))
    assert shown[0] - 1 < low < shown[0] and shown[1] < high < shown[1] + 1


# method: forget accuracy, retain accuracy, divergences on forget and retain set, recall of a probe, relearn steps
KNOWN = {
    "original": (95.0, 95.0, 0.9, 0.01, 96.0, 0),
    "mimu": (0.0, 93.0, 0.1, 0.01, 91.0, 10),
    "retrain": (0.0, 97.0, 0.0, 0.0, 80.0, 30),
    "far": (0.5, 17.0, 0.3, 0.02, 84.0, 200),
    "loud": (50.0, 97.0, 0.2, 0.001, 80.0, None),
}


def audited(seed, digit, methods=(*KNOWN,), cost=0.0, kappa="auto", **changes) -> dict:
    """A seed and a digit shift numbers up, those of the retrained classifier down; mimu loses with cost and kappa."""
    lost = cost / 4 + (0 if kappa == "auto" else kappa / 10)
    more, forget, retain, audits = seed + (digit == 9) / 4, {}, {}, {}
    for method in methods:
        forgotten, score, js_forget, js_retain, recall, steps = KNOWN[method]
        shift = -more if method == "retrain" else more - lost * (method == "mimu")
        forget[method], retain[method] = {"score": forgotten}, {"score": score + shift}
        audits[method] = {
            "js_forget": js_forget + (digit - 6) / 100, "js_retain": js_retain, "loss_attack": 0.5, "mine": recall / 5,
            "entropy_attack": 10.0, "probe_recall": {"linear": recall + shift}, "weights_changed": 6,
            "usable_bits": {"representation": {"a": 0.1, "b": (recall + shift) / 100}, "hidden_0": {"a": 0.4}},
            "prototype_recall": {"1": recall + 2 * shift, "10": 50.0}, "came_back": steps != 200,
            "relearn_from": {"1": 40 + seed, "10": None if method == "mimu" else 10}, "relearn_steps": steps,
        }  # fmt: skip
    named = {name: {"title": name, "spec": spec} for name, spec in (("loss_attack", ".3f"), ("entropy_attack", ".1f"))}
    changes = {FORGET: forget, RETAIN: retain, "audit_metrics": audits, "audits": named} | changes
    return experiment(seed, digit, kappa, methods, **changes)


@pytest.fixture
def beside(tmp_path):
    return Experiments(write(tmp_path, [audited(0, 3), audited(0, 9)]))


SORTED = ["retrain", "mimu", "loud", "far", "original"]
AUDIT_TABLES = {  # section: its first columns, the means in the order of the methods
    "distances": [["0.000", "0.100", "0.200", "0.300", "0.900"], ["0.0000", "0.0100", "0.0010", "0.0200", "0.0100"]],
    "gaps": [["+0.00", "+0.00", "+50.00", "+0.50", "+95.00"], ["+0.00", "-3.75", "+0.25", "-79.75", "-1.75"]],
    "audits": [["0.500"] * 5, ["10.0"] * 5, ["+0.00", "+0.69", "+0.02", "+0.26", "+1.00"],
               ["79.9", "91.1", "80.1", "84.1", "96.1"], ["30.0", "10.0", "–", "> 200.0", "0.0"]],
    "cost": [["0.25"] * 5, ["6"] * 5],
}  # fmt: skip


def test_the_methods_stand_in_the_order_of_their_distance_to_retraining(beside):
    for each in beside.every:
        each[FORGET]["by hand"] = {"loss": 1.0, "score": 1.0, "probability": 0.5}
    assert by_distance(beside) == SORTED, "no model that was evaluated by hand was audited"
    tables = (comparison.DIVERGENCES, comparison.GAPS, audit_columns(beside), comparison.COST)
    for columns, means in zip(tables, AUDIT_TABLES.values(), strict=True):
        table = audit_table(beside, columns)
        assert [*rows_of(table)] == ["method", *SORTED]
        assert [means_of(table, index) for index in range(len(means))] == means
    far = rows_of(audit_table(beside, comparison.DIVERGENCES))["far"][0]
    assert far == f"0.300 ± {stdev([0.27, 0.33]):.3f}", "over digits of one seed"


def test_an_audit_that_the_json_names_has_a_column_and_a_panel(tmp_path):
    named = {name: {"title": f"audit {name}", "spec": ".1f"} for name in ("js_forget", "mine", "relearn_steps")}
    experiments = Experiments(write(tmp_path, [audited(0, digit, audits=named) for digit in DIGITS]))
    table = audit_table(experiments, audit_columns(experiments))
    assert rows_of(table)["method"][:2] == ["audit mine", "IDI"] and len(rows_of(table)["method"]) == 4
    assert means_of(table, 0) == ["16.0", "18.2", "16.0", "16.8", "19.2"]
    assert "audit mine" in [axes.get_xlabel() for axes in draw_audits(experiments).axes]


def test_every_audit_has_a_panel_with_a_line_at_retraining(beside):
    panels = draw_audits(beside).axes
    assert len(panels) == 8 and all(axes.get_xlabel() for axes in panels)
    assert texts(panels[0].get_yticklabels()) == SORTED and panels[1].get_xscale() == "linear"
    small, large, *_, line = panels[5].lines[2:]
    assert list(small.get_xdata()) == [91.0, 91.25] and large.get_xydata().tolist() == [[91.125, 1.0]]
    assert small.get_color() == large.get_color() == STYLES["mimu"]["color"]
    assert list(line.get_xdata()) == [79.875, 79.875]


@pytest.mark.parametrize("count", [1, 5, 10])
def test_as_many_panels_are_seen_as_there_are_columns(beside, count):
    names = [f"column {index}" for index in range(count)]
    figure, panels = draw_panels([Row("mine", beside, "mimu")], [Column(FORGET_SCORE.keys, name) for name in names])
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_visible()] == names
    assert len(panels) == count and texts(panels[0].get_yticklabels()) == ["mine"]


def test_the_trade_off_is_against_retraining(beside):
    figure = draw_accuracies([Row(name, beside, name) for name in beside.methods])
    forget, retain = figure.axes
    assert texts(forget.get_yticklabels()) == beside.methods, "told apart by their names"
    row = beside.methods.index("far")
    assert forget.lines[2 * row + 1].get_xydata().tolist() == [[0.5, row]]
    assert retain.lines[2 * row + 1].get_xydata().tolist() == [[-79.75, row]]
    assert forget.get_xscale() == retain.get_xscale() == "symlog"
    assert forget.get_xlabel() == "forget accuracy, %\n(symmetric log scale)"
    low, high = retain.get_xlim()
    assert low < retain.dataLim.xmin and retain.dataLim.xmax < high
    assert sorted(tick for tick in retain.get_xticks() if low <= tick <= high) == [-100, -30, -10, -3, -1, 0]


def variant(folder, methods=("mimu",), cost=0.0, kappas=("auto",), **changes) -> Experiments:
    requests = product(PLACES, kappas)
    return Experiments(write(folder, [audited(*at, methods, cost, kappa, **changes) for at, kappa in requests]))


def test_variants_are_compared_with_retraining_the_same_classifier(tmp_path):
    config, three = {"dataset": "digits", "held_out": 0, "classifier": 5}, ["original", "mimu", "retrain"]
    variants = {
        "strong": variant(tmp_path / "strong", cost=8.0),
        "none": variant(tmp_path / "none", three),
        "weak": variant(tmp_path / "weak", cost=2.0, kappas=("auto", 20, 10)),
        "other": variant(tmp_path / "other", cost=4.0, dataset="digits", config=config),
        "silent": variant(tmp_path / "silent", three, cost=6.0, audit_metrics={}),
    }
    tables, figure = compare(variants)
    table, audits = map(rows_of, tables)
    assert variants["strong"].by_seed(RETAIN_GAP, "mimu") == pytest.approx((-6 + 0.25, -6 + 0.25 + 2))
    assert variants["weak"].by_seed(PROBE_GAP, "mimu", 20) == pytest.approx((8.5 + 0.25, 8.5 + 0.25 + 2))
    assert table["variant"][1:4] == ["worst", "retain accuracy against retrain, points", "worst"]
    assert table["strong"] == ["0.00 ± 0.00", "0.00", "-4.75 ± 1.41", "-6.00", "8.00 ± 0.00", "0.25 ± 0.00"]
    assert table["other"][2:4] == ["–", "–"], "another classifier"
    assert "none: retrain" not in table and table["none: original"][:2] == ["95.00 ± 0.00", "95.00"]
    names = [f"{each} a class" for each in ("prototype, 1", "prototype, 10", "steps, 1", "steps, 10")]
    assert audits["variant"] == ["IDI, representation", "IDI, hidden layer 0", PROBE_GAP.name, *names]
    by_hand = [18.5 / 32.5, 22.5 / 36.5]  # of each seed
    assert variants["strong"].by_seed(INDEX, "mimu") == pytest.approx(by_hand)
    probes = [f"{fmean(by_hand):+.2f} ± {stdev(by_hand):.2f}", "–", "+10.2 ± 1.4", "+9.5 ± 2.8", "+0.0 ± 0.0"]
    assert audits["strong"] == [*probes, "40 ± 1", "–"]
    assert audits["none: retrain"] == ["+0.00 ± 0.00", "–"] + ["+0.0 ± 0.0"] * 3 + ["40 ± 1", "10 ± 0"]
    assert audits["other"] == ["–"] * 5 + ["40 ± 1", "–"] and "silent" not in audits
    forget, retain = figure.axes
    assert texts(forget.get_yticklabels()) == [*variants]
    assert [line.get_xdata()[0] for line in retain.lines[1:4:2]] == pytest.approx([-4.75, -2.75])
    assert figure.get_suptitle() == "MNIST / digits, classes 3, 9 (boot), the test split, 784-8-10", "all that differs"


@pytest.mark.parametrize(("recall", "is_given"), [(85.0, True), (66.0, True), (97.0, False), (62.0, False)])
def test_the_index_is_not_given_if_another_retrained_classifier_is_as_far(tmp_path, monkeypatch, recall, is_given):
    monkeypatch.setitem(KNOWN, "retrain_again", (0.0, 97.0, 0.1, 0.1, recall, 30))
    alone = variant(tmp_path / "alone", ["original", "retrain", "retrain_again", "mimu"])
    assert alone.cells([INDEX], "original") == ["+1.00 ± 0.00" if is_given else "–"]
    if is_given:
        excess = recall - 80 + 0.25  # the mean over the digits for the first seed; the second adds 2
        assert alone.by_seed(INDEX, "retrain_again") == pytest.approx([excess / 16.25, (excess + 2) / 18.25])


def test_reports_take_the_place_of_those_before_and_of_nothing_else(tmp_path, no_pictures):
    reports, elsewhere = tmp_path / "reports", tmp_path / "elsewhere"
    for name in ("mine.md", "first_try/summary.png", "variants/mine.md", "../elsewhere/summary.md", "trade_off.pdf"):
        write_text(reports / name, "mine")
    for folder in (reports / "first_try", elsewhere):
        write_text(folder / ".written", "summary.md\nsummary.png\n")
    listed = ("trade_off.pdf", "link.png", "../elsewhere/summary.md", "first_try/summary.png", "variants", "..", "")
    write_text(reports / ".written", "\n".join(listed))
    (reports / "variants" / "empty").mkdir()
    (reports / "variants" / "link").symlink_to(elsewhere)
    (reports / "link.png").symlink_to(reports / "mine.md")
    mine = {*files(reports)} - {"trade_off.pdf", ".written"}

    def new_files(*folders: str) -> list[set[str]]:
        """The names in each folder, which must be all but those that were there before."""
        assert (elsewhere / "summary.md").exists() and (reports / "variants" / "empty").exists()
        names = {*files(reports)}
        assert mine <= names and {str(Path(name).parent) for name in names - mine} == {*folders}
        return [{Path(name).name for name in names - mine if str(Path(name).parent) == folder} for folder in folders]

    written = {".written", "summary.md"}
    two = write(tmp_path, [experiment(0, digit, methods=("mimu", "retrain")) for digit in DIGITS])
    other = write(tmp_path, [experiment(1, 3, methods=("mimu",), top_k=6)])
    closing = report({("", 5): (CONFIG, two), ("", 6): (CONFIG, other)}, reports)
    assert ["classes 3, 9 (boot)" in closing[0], "class 3, evaluated" in closing[1], len(closing)] == [True, True, 2]
    drawn = written | {"mask_efficacy.png"}
    assert new_files("top_k_5", "top_k_6") == [drawn | {"trade_off.png"}, drawn]
    own, alone = module.ReporterConfig(50, ("pdf", "svg")), write(tmp_path, [audited(0, 3)])
    report({("first one", 6): (CONFIG, other), ("other", 5): (own, alone)}, reports)
    folders = new_files(".", "variants/first_one", "variants/other")
    assert folders == [{".written", "variants.md", "variants.png"}, written, written | {"audits.pdf", "audits.svg"}]
    assert (reports / "variants.png").read_text() == "png 25"
    assert (reports / "variants" / "other" / "audits.svg").read_text() == "svg 50", "with its own settings"
    report({("", 5): (CONFIG, alone)}, reports)
    assert new_files(".") == [drawn | {"trade_off.png", "audits.png"}]
    assert "## Distance to retraining" in (reports / "summary.md").read_text()
    assert not (reports / "variants" / "other").exists()


SCORED = {  # the metrics of a forget set, and how each is written
    "original": {"score": (100.0, "100.00"), "probability": (1.0, "1.0000"), "loss": (0.0, "0.00")},
    "mimu": {"score": (0.0, "0.00"), "probability": (1e-9, "0.0000"), "loss": (500.0, "500.00")},
    "retrain": {"score": (0.25, "0.25"), "probability": (0.125, "0.1250"), "loss": (None, "–")},
}


@pytest.fixture
def plotted(tmp_path):
    histogram = {"layer": 1, "shape": [1, 2], "edges": [-1.0, 0.0, 1.0], "all": [9, 5], "zeroed": [0, 4]}
    forget = {name: {key: value for key, (value, _) in metrics.items()} for name, metrics in SCORED.items()}
    changes = {"class_probabilities": dict.fromkeys(SCORED, [0.1] * 10), "weight_histograms": [histogram]}
    return write(tmp_path, [experiment(0, 9, methods=(*SCORED,), **changes, **{FORGET: forget})])[0]


def test_the_plots_of_an_experiment_are_drawn_where_they_are_missing_or_old(plotted, tmp_path, no_pictures):
    draw = lambda: plots.draw(plotted, tmp_path / "plots", module.ReporterConfig(25, ("png", "pdf")))  # noqa: E731
    draw()
    names = ("unlearning", "performance_degradation", "class_probabilities", "weights")
    drawn = {f"{name}.{suffix}": f"{suffix} 25" for name, suffix in product(names, ("png", "pdf"))}
    paths = [tmp_path / "plots" / name for name in drawn]
    assert {path.name: path.read_text() for path in paths} == drawn
    assert (tmp_path / "plots" / ".written").read_text().splitlines() == sorted(drawn)
    for age, missing, expected in ((1, False, "kept"), (3, False, "png 25"), (1, True, "png 25")):
        for path in paths:
            path.write_text("kept")
            os.utime(path, (2, 2))
        os.utime(plotted, (age, age))
        if missing:
            paths[1].unlink()
        draw()
        assert paths[0].read_text() == expected


def test_plots_of_an_experiment_say_what_they_show_with_a_number_beside_every_mark(plotted, tmp_path, drawn):
    plots.draw(plotted, tmp_path / "plots", CONFIG)
    forget, retain, probabilities, weights = drawn
    heading = "MNIST, class 9 (boot), the test split, 784-8-10, kappa = auto"
    assert forget.get_suptitle() == retain.get_suptitle() == weights.get_suptitle() == heading
    assert probabilities.axes[0].get_title() == f"{heading}, forget set", "centred above the matrix"
    assert texts(forget.axes[0].get_yticklabels()) == texts(probabilities.axes[0].get_yticklabels()) == [*SCORED]
    assert texts(probabilities.axes[0].get_xticklabels()) == [*map(str, range(9)), "boot"]
    assert texts(probabilities.axes[0].texts) == ["0.10"] * 30
    assert texts(weights.axes[0].get_legend().get_texts()) == ["all 14 weights", "4 zeroed by mimu"]
    assert [axes.get_xlabel() for axes in retain.axes] == ["retain accuracy, %", "retain loss, nats"]
    for axes, metric in zip(forget.axes, ("score", "probability", "loss"), strict=True):
        values, numbers = zip(*(metrics[metric] for metrics in SCORED.values()))
        assert texts(axes.texts) == list(numbers) and {text.get_position()[0] > 1 for text in axes.texts} == {True}
        *means, line = axes.lines[1::2] + axes.lines[-1:]
        assert [mark.get_xdata()[0] for mark in means] == pytest.approx(np.array(values, float), nan_ok=True)
        assert not any(mark.get_clip_on() for mark in means), "whole at the ends of the axis"
        assert line.get_xdata() == pytest.approx([math.nan if values[2] is None else values[2]] * 2, nan_ok=True)
    score, _, loss = forget.axes
    assert loss.get_xscale() == "symlog" and loss.get_xlabel() == "forget loss, nats\n(symmetric log scale)"
    assert to_hex(score.lines[3].get_color()) == STYLES["mimu"]["color"].lower()
    efficacy = plots.draw_metrics(Experiments([plotted]), "K = 5", KEPT)
    assert efficacy.get_suptitle() == "K = 5" and texts(efficacy.axes[0].get_yticklabels()) == ["mimu"]
