"""Curves, summary, tables and plots against numbers worked out by hand, from JSON that the tests write."""

import json
import math
import os
import random
import re
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from running import files

from mimu.files import write_text
from reporter import FORGET, RETAIN, Experiments, Reporter, ReporterConfig, markdown_table, method_styles
from tables import report
from tables.comparison import compare
from tables.figures import draw

CONFIG = ReporterConfig(dpi=25)
KAPPAS = [10, 20, 40]
SEEDS, DIGITS = (0, 1), (3, 9)
PLACES = [*product(SEEDS, DIGITS)]
METHODS = ["original", "mimu", "retrain", "saliency", "mine"]
STYLES = method_styles(METHODS)
CURVES = ["loss_forget_set", "score_forget_set", "loss_retain_set", "score_retain_set", "probability_on_forget_class"]


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
    about = {"does": "Something.", "paper": "", "touches": "a mask", "needs": "both sets"}
    return {
        "id": f"{seed}_{digit}_{kappa}", "seed": seed, "forget_digit": digit, "kappa": zeroed,
        "kappa_choice": "auto" if is_auto else "fixed", "top_k": 5, "num_graph_vertices": 200, "num_weights": 1000,
        "mask_efficacy_metrics": {"mimu": {"loss": 0.5, "score": 90.0, "probability": 0.7}},
        "audit_metrics": {}, "audits": {}, "methods": dict.fromkeys(methods, about),
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


@pytest.fixture(autouse=True)
def figure_of(monkeypatch):
    """Returns the figure of a file that has its number, format and resolution. Only 20 dpi draws a picture."""
    saved, save = [], Figure.savefig

    def note(figure, file, format, dpi) -> None:
        if dpi == 20:
            return save(figure, file, format=format, dpi=dpi)
        file.write(f"{len(saved)} {format} {dpi}".encode())
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", note)
    return lambda path: saved[int(path.read_text().split()[0])]


@pytest.fixture
def reporter_of(tmp_path):
    return lambda experiments: Reporter(CONFIG, write(tmp_path, experiments), tmp_path / "reports")


def reported(folder, experiments) -> Path:
    """Writes the reports of experiments; returns their folder."""
    report({"": (CONFIG, write(folder, experiments))}, folder / "reports")
    return folder / "reports"


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of a table by the first of each row, the header's included."""
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if not line.startswith("| -")]
    return {row[0]: row[1:] for row in rows}


def tables_of(path) -> list[dict[str, list[str]]]:
    return [rows_of(part) for part in path.read_text().split("\n\n") if part.startswith("| ")]


def texts(artists) -> list[str]:
    return [artist.get_text() for artist in artists]


def by_hand(evaluation, method, metric, kappa="auto", seeds=SEEDS) -> list[float]:
    """The mean over the digits for each seed."""
    return [fmean(number(evaluation, method, metric, seed, digit, kappa) for digit in DIGITS) for seed in seeds]


def written(numbers, spec=".2f") -> str:
    return f"{fmean(numbers):{spec}} ± {stdev(numbers):{spec.removeprefix('+')}}"


def test_tables_have_aligned_columns():
    lines = markdown_table(["name", "n"], [["a", 1], ["long name", 22]]).splitlines()
    assert lines == ["| name      |  n |", "| --------- | -: |", "| a         |  1 |", "| long name | 22 |"]


@pytest.mark.parametrize("is_missing", [False, True])
def test_what_is_null_or_missing_is_a_gap_in_a_curve_and_a_dash_in_a_table(reporter_of, is_missing):
    results = sweep(*KAPPAS)
    results[0][FORGET]["mine"]["loss"] = None
    for each in results:
        each[FORGET]["saliency"]["loss"] = 2e17
        each[RETAIN]["original"]["loss"] = None
    reporter = reporter_of(results[is_missing:])
    assert [math.isnan(loss) for loss in reporter.get_mine_unlearning_forget_set_loss()] == [True, False, False]
    reporter.plot()
    summary = (reporter.folder / "summary.md").read_text()
    mine, exploded = (re.search(rf"\n\| {name} +\| +10 .*", summary)[0].split("|") for name in ("mine", "saliency"))
    assert mine[6].strip() == "–" and exploded[6].strip() == ("–" if is_missing else "2.0e+17")
    assert reporter.about().startswith("Of the fixed kappas, 40 is the largest: 40 weights, 20 % of")


def test_curves_show_every_method_and_getters_give_them(reporter_of, figure_of):
    reporter = reporter_of(sweep("auto", *KAPPAS)[::-1])
    reporter.draw_loss_curves_on_forget_set()
    reporter.draw_score_curves_on_forget_set()
    reporter.draw_loss_curves_on_retain_set()
    reporter.draw_score_curves_on_retain_set()
    reporter.draw_classifier_probability_on_forget_class()
    for file in CURVES:
        metric = file.split("_")[0]
        samples, evaluation = ("retain", RETAIN) if "retain" in file else ("forget", FORGET)
        figure = figure_of(reporter.folder / f"{file}.png")
        (axes,) = figure.axes
        assert texts(figure.legends[0].get_texts()) == [*METHODS, "kappa auto"]
        assert axes.get_title() == "MNIST, classes 3, 9 (boot), the test split, 784-8-10"
        axis = {"loss": f"cross entropy on the {samples} set (nats)", "score": f"{samples} accuracy (%)"}.get(metric)
        assert axes.get_xlabel() == "weights zeroed, kappa"
        assert axes.get_ylabel() == (axis or "probability of the forget class")
        assert texts(axes.get_xticklabels()) == ["10", "20", "40"]
        for method, line in zip(METHODS, axes.lines):
            y = getattr(reporter, f"get_{method}_unlearning_{samples}_set_{metric}")()
            assert y == pytest.approx([fmean(by_hand(evaluation, method, metric, kappa)) for kappa in KAPPAS])
            assert line.get_label() == method and line.get_color() == STYLES[method]["color"]
            if method == "retrain":
                assert line.get_ydata() == [y[0], y[0]] and line.is_dashed() and line.get_marker() == "None"
                assert line.get_transform() == axes.get_yaxis_transform(), "from edge to edge"
            else:
                assert line.get_xydata().T.tolist() == [KAPPAS, y]
                assert not line.is_dashed() and line.get_marker() == STYLES[method]["marker"]
        rings = [line for line in axes.lines if line.get_label() == "kappa auto"]
        for method, zeroed, ring in zip(("mimu", "saliency"), (16, 17), rings, strict=True):
            assert ring.get_xydata()[0] == pytest.approx([zeroed, fmean(by_hand(evaluation, method, metric))])
            assert ring.get_color() == STYLES[method]["color"]
    assert not hasattr(reporter, "get_nobody_unlearning_forget_set_score")


def test_the_summary_has_the_numbers_of_auto_and_of_every_kappa(reporter_of):
    reporter = reporter_of(sweep("auto", *KAPPAS)[::-1])
    reporter.plot(["## Mine", "More."])
    names = {f"{name}.png" for name in CURVES} | {"summary.md", "summary.png"}
    assert set(files(reporter.folder)) == names
    summary = (reporter.folder / "summary.md").read_text()
    headings = ["Every method, kappa = auto", "Mine", "Mask efficacy, K = 5", "Every kappa"]
    assert re.findall("^## (.*)", summary, re.MULTILINE) == headings
    every, worst, efficacy, _ = tables_of(reporter.folder / "summary.md")
    assert efficacy["mimu"] == ["90.000 ± 0.000", "0.700 ± 0.000", "0.500 ± 0.000"]
    scores = {name: [number(RETAIN, name, "score", *place, "auto") for place in PLACES] for name in METHODS}
    for name in METHODS:
        gaps = np.subtract(scores[name], scores["retrain"])
        gap = written(gaps.reshape(2, 2).mean(1), "+.2f")
        forget, probability, loss = (by_hand(FORGET, name, metric) for metric in ("score", "probability", "loss"))
        retain, retain_loss = (by_hand(RETAIN, name, metric) for metric in ("score", "loss"))
        cells = [written(forget), written(retain), gap, "–", written(probability, ".4f"), written(loss)]
        zeroed = {"mimu": "16 ± 0", "saliency": "17 ± 0"}.get(name, "–")
        assert every[name] == [*cells, written(retain_loss, ".3f"), zeroed, "0.25 ± 0.00"]
        largest = max(number(FORGET, name, "score", *place, "auto") for place in PLACES)
        assert worst[name] == [f"{largest:.2f}", f"{min(gaps):+.2f}"]
    rows = [line.split() for line in summary.splitlines()[-4 * len(METHODS) :]]
    assert [row[1:4:2] for row in rows[4:8]] == [["mimu", kappa] for kappa in ("10", "20", "40", "auto")]
    cells = "| ".join(f"{written(by_hand(FORGET, 'mimu', metric, 20), '.3f')} " for metric in ("probability", "loss"))
    assert cells in " ".join(rows[5])
    about, table = reporter.closing_table().split("\n\n")
    assert about.startswith("MNIST, 784-8-10: forgetting classes 3, 9 (boot), evaluated on the test split. kappa is ")
    assert about.endswith("16 weights, 8 % of the masked ones and 1.6 % of all on average.")
    assert rows_of(table)["mimu"] == every["mimu"][:2] + ["16 ± 0"]


def test_a_sweep_of_auto_alone_has_no_curves_and_names_the_methods_that_gave_up(reporter_of):
    results = sweep("auto")
    for index, each in enumerate(results):
        each["gave_up"] = {"mimu": index > 1, "saliency": index == 1, "random": False}
        each |= {"split": "100 held-out training samples", "gcn_untrained": True}
    alone = reporter_of(results)
    alone.plot()
    assert set(files(alone.folder)) == {"summary.md"}
    summary = (alone.folder / "summary.md").read_text()
    scope = "evaluated on 100 held-out training samples. Mean over classes: 2, ± standard deviation over seeds: 2."
    assert summary.startswith(f"# Forgetting classes 3, 9 (boot) of MNIST\n\n784-8-10, {scope}\n")
    text = "gave up before the class was forgotten on"
    about = f"mimu {text} 2 of 4 requests. saliency {text} 1 of 4 requests. The GCN stayed untrained on 4 of 4:"
    assert about in alone.about() in summary and "Every kappa" not in summary


def test_lines_that_coincide_remain_visible(reporter_of, figure_of):
    """Each line lies below those that are thinner, or whose dashes are shorter."""
    methods = ["original", "mimu", "sft", "saliency", "retrain"]
    same = {FORGET: dict.fromkeys(methods, {"score": 0.0})}
    reporter = reporter_of([experiment(kappa=each, methods=methods, **same) for each in KAPPAS])
    reporter.draw_score_curves_on_forget_set()
    original, mimu, sft, saliency, retrain = figure_of(reporter.folder / "score_forget_set.png").axes[0].lines
    assert mimu.get_linewidth() > saliency.get_linewidth() and mimu.get_markersize() > saliency.get_markersize()
    orders = [line.get_zorder() for line in (mimu, saliency, original, sft, retrain)]
    assert orders == sorted(orders) and len(set(orders)) == 4, "of one order, later ones are above"
    dashes = [line._unscaled_dash_pattern[1][0] for line in (retrain, sft, original)]
    assert dashes == sorted(dashes) and len(set(dashes)) == 3


def test_further_methods_have_colours_of_their_own():
    known, more = method_styles([]), method_styles("abcdef")
    assert known.items() <= STYLES.items() and len({each["color"] for each in more.values()}) == len(known) + 6


def test_the_frame_leaves_out_what_is_far_and_the_summary_enlarges_what_is_forgotten(reporter_of, figure_of):
    retain = {"original": 96.9, "mimu": 96.6, "retrain": 97.0, "mine": 96.3, "sft": 96.7, "bad": 20.0}
    forget = {"original": 95.0, "mimu": 0.4, "retrain": 0.0, "mine": 0.1, "sft": 0.3, "bad": 0.2, "other": 50.0}
    scores = {RETAIN: {name: {"score": retain[name]} for name in retain}}
    scores[FORGET] = {name: {"score": forget[name]} for name in forget}
    reporter = reporter_of([experiment(kappa=kappa, methods=[*forget], **scores) for kappa in KAPPAS])
    reporter.plot()
    curves, summary = (figure_of(reporter.folder / f"{name}.png") for name in ("score_retain_set", "summary"))
    zoomed, (everything, near) = curves.axes[0], summary.axes
    for axes in (zoomed, near):
        low, high = axes.get_ylim()
        assert 96 < low < 96.3 and 97 < high < 97.2
    assert zoomed.get_xlabel().endswith("\noutside the frame (mean): bad 20")
    assert everything.get_ylim()[0] < 20 and everything.get_xlim()[1] > 95, "on the left is all"
    low, high = near.get_xlim()
    assert low < 0 and 0.4 < high < 0.5 and near.get_title().startswith("enlarged: ")
    assert everything.get_xlabel() == near.get_xlabel() == "forget accuracy (%), one mark per kappa"
    assert texts(summary.legends[0].get_texts()) == [*forget], "the last has no retain accuracy"


# method: forget accuracy, retain accuracy, divergences on forget and retain set, recall of a probe, relearn steps
KNOWN = {
    "original": (95.0, 95.0, 0.9, 0.01, 96.0, 0),
    "mimu": (0.0, 93.0, 0.1, 0.01, 91.0, 10),
    "retrain": (0.0, 97.0, 0.0, 0.0, 80.0, 30),
    "far": (0.5, 17.0, 0.3, 0.02, 84.0, 200),
    "loud": (50.0, 97.0, 0.2, 0.001, 80.0, None),
}


def audited(seed, digit, methods=(*KNOWN,), cost=0.0, **changes) -> dict:
    """A seed and a digit shift numbers up, those of the retrained classifier down; mimu loses with cost."""
    more, forget, retain, audits = seed + (digit == 9) / 4, {}, {}, {}
    for method in methods:
        forgotten, score, js_forget, js_retain, recall, steps = KNOWN[method]
        shift = -more if method == "retrain" else more - cost / 4 * (method == "mimu")
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
    return experiment(seed, digit, methods=methods, **changes)


SORTED = ["retrain", "mimu", "loud", "far", "original"]
AUDIT_TABLES = [  # of distances, audits and cost: the means of the first columns, in the order of the methods
    {0: ["0.000", "0.100", "0.200", "0.300", "0.900"], 1: ["0.0000", "0.0100", "0.0010", "0.0200", "0.0100"],
     2: ["+0.00", "+0.00", "+50.00", "+0.50", "+95.00"], 3: ["+0.00", "-3.75", "+0.25", "-79.75", "-1.75"]},
    {0: ["0.500"] * 5, 1: ["10.0"] * 5, 2: ["+0.00", "+0.69", "+0.02", "+0.26", "+1.00"],
     3: ["79.9", "91.1", "80.1", "84.1", "96.1"], 4: ["30.0", "10.0", "–", "> 200.0", "0.0"]},
    {0: ["0.25"] * 5, 1: ["6"] * 5},
]  # fmt: skip


def means_of(table: dict[str, list[str]], index: int) -> list[str]:
    """A column without its header and the deviations."""
    return [cells[index].partition(" ±")[0] for cells in [*table.values()][1:]]


def test_methods_are_audited_in_the_order_of_their_distance_to_retraining_in_tables_and_panels(tmp_path, figure_of):
    experiments = [audited(0, 3), audited(0, 9)]
    for each in experiments:
        each[FORGET]["by hand"] = {"loss": 1.0, "score": 1.0, "probability": 0.5}  # it was not audited
    folder = reported(tmp_path, experiments)
    every, _, *audits, methods, efficacy = tables_of(folder / "summary.md")
    for table, columns in zip(audits, AUDIT_TABLES, strict=True):
        assert [*table] == ["method", *SORTED]
        assert {index: means_of(table, index) for index in columns} == columns
    assert audits[0]["far"][0] == f"0.300 ± {stdev([0.27, 0.33]):.3f}", "over digits of one seed"
    assert methods["mimu"] == ["Something.", "a mask", "both sets", ""]
    panels = figure_of(folder / "audits.png").axes
    assert len(panels) == 8 and all(axes.get_xlabel() for axes in panels)
    assert texts(panels[0].get_yticklabels()) == SORTED and panels[1].get_xscale() == "linear"
    small, large, *_, line = panels[5].lines[2:]
    assert list(small.get_xdata()) == [91.0, 91.25] and large.get_xydata().tolist() == [[91.125, 1.0]]
    assert large.get_color() == STYLES["mimu"]["color"] and list(line.get_xdata()) == [79.875, 79.875]
    forget, retain = figure_of(folder / "trade_off.png").axes
    row = [*every].index("far") - 1
    assert texts(forget.get_yticklabels()) == [*every][1:], "told apart by their names"
    assert forget.lines[2 * row + 1].get_xydata().tolist() == [[0.5, row]]
    assert retain.lines[2 * row + 1].get_xydata().tolist() == [[-79.75, row]]
    assert retain.get_xscale() == "symlog" and forget.get_xlabel() == "forget accuracy, %\n(symmetric log scale)"
    low, high = retain.get_xlim()
    assert low < retain.dataLim.xmin and retain.dataLim.xmax < high
    assert sorted(tick for tick in retain.get_xticks() if low <= tick <= high) == [-100, -30, -10, -3, -1, 0]
    assert [*efficacy][1:] == ["mimu"]


def test_an_audit_that_the_json_names_has_a_column_and_a_panel(tmp_path, figure_of):
    named = {name: {"title": f"audit {name}", "spec": ".1f"} for name in ("js_forget", "mine", "relearn_steps")}
    folder = reported(tmp_path, [audited(0, digit, audits=named) for digit in DIGITS])
    table = tables_of(folder / "summary.md")[3]
    assert table["method"][:2] == ["audit mine", "IDI"] and len(table["method"]) == 4
    assert means_of(table, 0) == ["16.0", "18.2", "16.0", "16.8", "19.2"]
    panels = [axes.get_xlabel() for axes in figure_of(folder / "audits.png").axes if axes.get_visible()]
    assert len(panels) == 7 and panels[2] == "audit mine"


def test_variants_are_compared_with_retraining_the_same_classifier(tmp_path):
    def variant(name, methods=("mimu",), cost=0.0, **changes) -> Experiments:
        return Experiments(write(tmp_path / name, [audited(*place, methods, cost, **changes) for place in PLACES]))

    config, three = {"dataset": "digits", "held_out": 0, "classifier": 5}, ["original", "mimu", "retrain"]
    variants = {
        "strong": variant("strong", cost=8.0),
        "none": variant("none", three),
        "weak": variant("weak", cost=2.0),
        "other": variant("other", cost=4.0, dataset="digits", config=config),
        "silent": variant("silent", three, cost=6.0, audit_metrics={}, audits={}),
    }
    tables, figure = compare(variants)
    table, audits = map(rows_of, tables)
    assert table["variant"][1:4] == ["worst", "gap to retraining, points", "worst"]
    scores, divergence = ["0.00 ± 0.00", "0.00", "-4.75 ± 1.41", "-6.00"], "0.100 ± 0.000"
    assert table["strong"] == [*scores, divergence, "8.00 ± 0.00", "0.25 ± 0.00"]
    assert table["other"][2:4] == ["–", "–"], "another classifier"
    assert "none: retrain" not in table and table["none: original"][:2] == ["95.00 ± 0.00", "95.00"]
    names = [f"{each} a class" for each in ("prototype, 1", "prototype, 10", "steps, 1", "steps, 10")]
    probe = "probe recall, gap to retraining, points"
    assert audits["variant"] == ["IDI, representation", "IDI, hidden layer 0", probe, *names]
    index = written([18.5 / 32.5, 22.5 / 36.5], "+.2f")  # a quotient of each seed
    assert audits["strong"] == [index, "–", "+10.2 ± 1.4", "+9.5 ± 2.8", "+0.0 ± 0.0", "40 ± 1", "–"]
    assert audits["none: retrain"] == ["+0.00 ± 0.00", "–"] + ["+0.0 ± 0.0"] * 3 + ["40 ± 1", "10 ± 0"]
    assert audits["other"] == ["–"] * 5 + ["40 ± 1", "–"] and "silent" not in audits
    forget, retain = figure.axes
    assert texts(forget.get_yticklabels()) == [*variants]
    assert [line.get_xdata()[0] for line in retain.lines[1:4:2]] == pytest.approx([-4.75, -2.75])
    assert figure.get_suptitle() == "MNIST / digits, classes 3, 9 (boot), the test split, 784-8-10", "all that differs"


@pytest.mark.parametrize(("recall", "is_given"), [(85.0, True), (97.0, False), (62.0, False)])
def test_the_index_is_not_given_if_another_retrained_classifier_is_as_far(tmp_path, monkeypatch, recall, is_given):
    monkeypatch.setitem(KNOWN, "retrain_again", (0.0, 97.0, 0.1, 0.1, recall, 30))
    methods = ["original", "retrain", "retrain_again", "mimu"]
    folder = reported(tmp_path, [audited(*place, methods) for place in PLACES])
    indices = {name: cells[2] for name, cells in tables_of(folder / "summary.md")[3].items()}
    excess = recall - 80 + 0.25  # the mean over the digits for the first seed; the second adds 2
    expected = ["+1.00 ± 0.00", written([excess / 16.25, (excess + 2) / 18.25], "+.2f")] if is_given else ["–", "–"]
    assert [indices["original"], indices["retrain_again"]] == expected


def test_reports_take_the_place_of_those_before_and_of_nothing_else(tmp_path):
    reports = tmp_path / "reports"
    write_text(reports / "mine.md", "mine")
    two = write(tmp_path, [experiment(0, digit, methods=("mimu", "retrain")) for digit in DIGITS])
    other = write(tmp_path, [experiment(1, 3, methods=("mimu",))])
    alone = {"mine.md", "summary.md", "trade_off.png"}
    (closing,) = report({"": (CONFIG, two)}, reports)
    assert "classes 3, 9 (boot)" in closing and {*files(reports)} == alone
    audits = write(tmp_path / "audits", [audited(0, 3)])
    report({"first one": (CONFIG, other), "other": (ReporterConfig(50), audits)}, reports)
    names = ("first_one/summary.md", "other/summary.md", "other/audits.png")
    assert {*files(reports)} == {"mine.md", "variants.md", "variants.png", *(f"variants/{name}" for name in names)}
    assert (reports / "variants.png").read_text().endswith("png 25")
    assert (reports / "variants" / "other" / "audits.png").read_text().endswith("png 50"), "with its own settings"
    report({"": (CONFIG, two)}, reports)
    assert {*files(reports)} == alone and not (reports / "variants").exists()


SCORED = {  # the metrics of a forget set, and how each is written
    "original": {"score": (100.0, "100.00"), "probability": (1.0, "1.0000"), "loss": (0.0, "0.00")},
    "mimu": {"score": (0.0, "0.00"), "probability": (1e-9, "0.0000"), "loss": (500.0, "500.00")},
    "retrain": {"score": (0.25, "0.25"), "probability": (0.125, "0.1250"), "loss": (None, "–")},
}


def test_plots_of_an_experiment_have_a_number_beside_every_mark_and_are_drawn_where_missing_or_old(tmp_path, figure_of):
    histogram = {"layer": 1, "shape": [1, 2], "edges": [-1.0, 0.0, 1.0], "all": [9, 5], "zeroed": [0, 4]}
    scored = {name: {key: value for key, (value, _) in metrics.items()} for name, metrics in SCORED.items()}
    changes = {"class_probabilities": dict.fromkeys(SCORED, [0.1] * 10), "weight_histograms": [histogram]}
    (path,) = write(tmp_path, [experiment(0, 9, methods=(*SCORED,), **changes, **{FORGET: scored})])
    folder = tmp_path / "plots"
    draw(path, folder, CONFIG)
    names = [f"{name}.png" for name in ("unlearning", "performance_degradation", "class_probabilities", "weights")]
    assert {*files(folder)} == {*names}
    forget, retain, probabilities, weights = (figure_of(folder / name) for name in names)
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

    for age, missing, is_kept in ((1, [], True), (3, [], False), (1, ["weights.png"], False)):
        for name in names:
            (folder / name).write_text("kept")
            os.utime(folder / name, (2, 2))
        os.utime(path, (age, age))
        for name in missing:
            (folder / name).unlink()
        draw(path, folder, CONFIG)
        assert ((folder / "unlearning.png").read_text() == "kept") == is_kept
    draw(path, tmp_path / "drawn", ReporterConfig(20))
    assert [(tmp_path / "drawn" / name).read_bytes()[:4] for name in names] == [b"\x89PNG"] * 4
