"""Methods beside retraining, variants, and the plots of an experiment, against figures by hand, from written JSON."""

import json
import math
import os
import re
from itertools import product
from statistics import stdev

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from running import files
from test_reporter import CONFIG, DIGITS, SEEDS, drawn, experiment, rows_of, texts, write  # noqa: F401

from mimu.reporter import FORGET, RETAIN, RETAIN_GAP, Reporter, ReporterConfig, method_styles
from mimu.runs.files import write_text
from mimu.tables import Result, report
from mimu.tables import experiment as plots
from mimu.tables.pictures import PROBE, Row, draw_frontier, draw_masks, draw_scores
from mimu.tables.retraining import COST, DIVERGENCES, GAPS, LEFT_BEHIND, audit_table, by_distance, draw_audits
from mimu.tables.variants import compare

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
            "entropy_attack": 10.0, "probe_recall": {"linear": recall}, "probe_retain": 97.0, "relearn_from": {},
            "relearn_steps": steps or 0, "came_back": steps is not None, "weights_changed": 6,
        }  # fmt: skip
    retain = dict.fromkeys(AUDITED, {"loss": 0.1, "score": 97.0})
    changes = {FORGET: forget, RETAIN: retain, "audit_metrics": audits, "zeroed": [0, 1, 2, 3, 5 + digit, 19]}
    return experiment(0, digit, 7, "auto", AUDITED, **changes)


@pytest.fixture
def reporter(tmp_path):
    return Reporter(CONFIG, write(tmp_path, [audited(4), audited(6)]), tmp_path / "reports")


def column(table: str, index: int) -> list[str]:
    """The numbers of a column, without their deviations."""
    return [re.sub(r" ± [\d.]+", "", cells[index]) for cells in [*rows_of(table).values()][1:]]


def test_the_methods_stand_in_the_order_of_their_distance_to_retraining(reporter):
    for each in reporter.experiments:
        each[FORGET]["by hand"] = {"loss": 1.0, "score": 1.0, "probability": 0.5}
    methods = ["retrain", "mimu", "loud", "far", "original"]
    assert by_distance(reporter) == methods, "no model that was scored by hand was audited"
    distances, left, gaps, cost = (audit_table(reporter, of) for of in (DIVERGENCES, LEFT_BEHIND, GAPS, COST))
    assert [*rows_of(distances)][1:] == methods
    assert rows_of(distances)["far"][0] == f"0.300 ± {stdev([0.29, 0.31]):.3f}", "with one seed it is over the digits"
    assert column(distances, 0) == ["0.000", "0.100", "0.200", "0.300", "0.900"]
    assert column(distances, 1) == ["0.0000", "0.0100", "0.0010", "0.0200", "0.0100"]
    assert column(left, 2) == ["88.0", "94.0", "88.0", "90.0", "95.0"] and column(left, 0) == ["0.500"] * 5
    assert column(gaps, 0) == ["+0.00", "+0.00", "+50.00", "+0.50", "+95.00"]
    assert rows_of(gaps)["method"][:2] == ["forget score, points", "retain score, points"]
    assert column(cost, 1)[0] == "6"


def test_a_class_that_does_not_come_back_is_marked(reporter):
    for steps, text in ((200, "> 200.0"), (None, "–")):
        for each in reporter.experiments:
            each["audit_metrics"]["far"]["relearn_steps"] = steps
        assert column(audit_table(reporter, LEFT_BEHIND), 4) == ["30.0", "10.0", "30.0", text, "0.0"]


def test_every_audit_has_a_panel_with_a_line_at_retraining(reporter, drawn):  # noqa: F811
    draw_audits(reporter)
    assert len(drawn[0].axes) == 8 and all(axes.get_xlabel() for axes in drawn[0].axes)
    assert texts(drawn[0].axes[0].get_yticklabels()) == by_distance(reporter)
    recall = drawn[0].axes[4]
    assert list(recall.lines[-1].get_xdata()) == [88.0, 88.0]
    small, large = recall.lines[2:4]  # of mimu
    assert list(small.get_xdata()) == [94.0, 94.0] and large.get_xydata().tolist() == [[94.0, 1.0]]
    assert small.get_color() == large.get_color() == BLUE
    assert drawn[0].axes[1].get_xscale() == "linear", "no divergence is far away"


def test_the_trade_off_is_against_retraining(reporter, drawn):  # noqa: F811
    for each in reporter.experiments:
        each[RETAIN]["far"]["score"] = 17.0
    rows = [Row(name, reporter, name) for name in reporter.methods]
    draw_scores(rows, reporter.folder / "trade_off.png", CONFIG)
    forget, retain = drawn[0].axes
    assert texts(forget.get_yticklabels()) == reporter.methods, "told apart by their names"
    row = reporter.methods.index("far")
    assert forget.lines[2 * row + 1].get_xydata().tolist() == [[0.5, row]]
    assert retain.lines[2 * row + 1].get_xydata().tolist() == [[-80.0, row]]
    assert forget.get_xscale() == retain.get_xscale() == "symlog"
    assert drawn[0].get_suptitle() == "MNIST, classes 4, 6, the test split, 784-8-10"
    low, high = retain.get_xlim()
    assert low < retain.dataLim.xmin and retain.dataLim.xmax < high
    assert sorted(tick for tick in retain.get_xticks() if low <= tick <= high) == [-100, -30, -10, -3, -1, 0]


def test_the_picture_of_the_masks_shows_what_digits_have_in_common(reporter, drawn):  # noqa: F811
    draw_masks(reporter)
    first, shares = (part.axes[0] for part in drawn[0].subfigs)
    assert first.get_title() == "class 4: 6 weights" and drawn[0].get_suptitle() == "MNIST, 784-8-10"
    assert sorted(map(tuple, first.lines[0].get_xydata())) == [(0, 0), (1, 0), (2, 0), (3, 0), (9, 0), (19, 0)]
    half = pytest.approx(500 / 6)
    assert shares.images[0].get_array().tolist() == [[100.0, half], [half, 100.0]]
    assert texts(shares.get_xticklabels()) == ["4", "6"]


# method: retain score, recall of the probe
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
            "probe_recall": {"linear": recall + far, "two_layer": recall, "hidden_0": 99.0},
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
    assert left_behind["variant"] == ["linear", "two layer", "hidden layer 0", *names]
    probes = ["+10.2 ± 1.4", "+11.0 ± 0.0", "+0.0 ± 0.0", "+9.5 ± 2.8", "+0.0 ± 0.0"]
    assert left_behind["strong"] == [*probes, "40 ± 1", "–"]
    assert left_behind["none: retrain"] == ["+0.0 ± 0.0"] * 5 + ["40 ± 1", "10 ± 0"]
    assert left_behind["other"] == ["–"] * 5 + ["40 ± 1", "–"] and "silent" not in left_behind


def test_variants_and_the_frontier_are_drawn(variants, tmp_path, drawn):  # noqa: F811
    tables = compare(variants, tmp_path)
    assert (tmp_path / "variants.md").read_text() == "\n\n".join(["# Variants", *tables]) + "\n"
    panels, frontier = (figure.axes for figure in drawn)
    assert texts(panels[0].get_yticklabels()) == ["strong", "none", "weak", "other", "silent", "elsewhere"]
    assert [line.get_xdata()[0] for line in panels[1].lines[1:4:2]] == pytest.approx([-4.75, -2.75])
    (axes,) = frontier
    assert texts(drawn[1].legends[0].get_texts()) == ["retrain", "mimu", "original"], "the nearest first"
    assert axes.get_xlabel() == "probe recall against retrain, points" and axes.get_ylabel() == RETAIN_GAP.name
    (line,) = (each for each in axes.lines if each.get_color() == BLUE and each.get_linestyle() == "-")
    curve = [[12.25 - lost, -2.75 - lost] for lost in (2, 0.5, 0)]
    assert line.get_xydata().tolist() == curve, "in the order of what the probe finds"
    (hollow,) = (line for line in axes.lines if line.get_fillstyle() == "none" and len(line.get_xdata()))
    assert hollow.get_xydata().tolist() == [[10.25, -4.75]]


def test_titles_name_all_that_differs_and_of_many_methods_the_nearest_are_drawn(tmp_path, monkeypatch, drawn):  # noqa: F811
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
    closing = report([*(Result("", 5, CONFIG, paths) for paths in two), Result("", 6, CONFIG, other)], reports)
    said = ["forgetting classes 3, 9 (boot)", "forgetting class 3"]
    assert [table.split(", scored")[0].split(": ")[1] for table in closing] == said
    of_top_k = {f"top_k_5/{name}" for name in ("summary.md", "trade_off.png", "masks.png")} | {"top_k_6/summary.md"}
    assert set(files(reports)) == mine | of_top_k
    own = ReporterConfig(50, ("pdf", "svg"))
    alone = write(tmp_path, [audited(4)])
    report([Result("first one", 6, CONFIG, other), Result("other", 5, own, alone)], reports)
    of_first = {"variants.md", "variants.png", "frontier.png", "variants/first_one/summary.md"}
    of_other = {f"variants/other/{name}" for name in ("summary.md", "audits.pdf", "audits.svg")}
    assert set(files(reports)) == mine | of_first | of_other
    assert (reports / "variants.png").read_text() == "png 25"
    assert (reports / "variants" / "other" / "audits.svg").read_text() == "svg 50", "with its own settings"
    report([Result("", 5, CONFIG, alone)], reports)
    assert set(files(reports)) == mine | {"summary.md", "trade_off.png", "audits.png"}
    assert "## Distance to retraining" in (reports / "summary.md").read_text()
    assert (reports / "variants" / "empty").exists() and not (reports / "variants" / "other").exists()


@pytest.fixture
def plotted(tmp_path) -> dict:
    """The JSON of an experiment in the folder of an evaluation."""
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
    config = ReporterConfig(25, ("png", "pdf"))
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


def test_plots_of_an_experiment_say_what_they_show_with_a_number_beside_every_mark(plotted, tmp_path, drawn):  # noqa: F811
    plots.draw(plotted, tmp_path, CONFIG)
    forget, retain, efficacy, probabilities, weights = drawn
    of = "MNIST, class 9 (boot), the test split, 784-8-10"
    assert forget.get_suptitle() == retain.get_suptitle() == weights.get_suptitle() == f"{of}, kappa = auto"
    assert efficacy.get_suptitle() == f"{of}, K = 5 weights kept (original: all)"
    assert probabilities.get_suptitle() == f"{of}, kappa = auto, forget set"
    names = ["original", "mimu", "row"]
    assert texts(forget.axes[0].get_yticklabels()) == texts(probabilities.axes[0].get_yticklabels()) == names
    assert texts(efficacy.axes[0].get_yticklabels()) == ["mimu"]
    assert texts(probabilities.axes[0].get_xticklabels()) == [*map(str, range(9)), "boot"]
    assert texts(weights.axes[0].get_legend().get_texts()) == ["all 14 weights", "4 zeroed by mimu"]
    (score,) = (axes for axes in retain.axes if axes.get_xlabel() == "retain score, %")
    values = [plotted[RETAIN][name]["score"] for name in names]
    assert [line.get_xdata()[0] for line in score.lines[1::2]] == pytest.approx(values)
    assert texts(score.texts) == [f"{round(value, 4):.3g}" for value in values]
    assert [to_hex(line.get_color()) for line in score.lines[1::2]][:2] == ["#000000", BLUE.lower()]
