"""Curves and tables against means by hand, from written JSON."""

import json
import math
import re
from statistics import fmean, stdev

import matplotlib.pyplot as plt
import pytest

from comparison import DIVERGENCES, LEFT_BEHIND, METRICS, AuditReport, Comparison
from reporter import (
    FORGET,
    METHOD_STYLES,
    RETAIN,
    Reporter,
    ReporterConfig,
    Value,
    draw_masks,
    markdown_table,
    method_styles,
)

CONFIG = ReporterConfig(dpi=50, width=4, height=3)
KAPPAS, SEEDS, DIGITS, METHODS = (10, 20, 40), (0, 1), (3, 9), ("original", "mimu", "retrain", "mine")
CURVES = [
    ("draw_loss_curves_on_forget_set", "loss_forget_set.png", FORGET, "loss"),
    ("draw_score_curves_on_forget_set", "score_forget_set.png", FORGET, "score"),
    ("draw_loss_curves_on_retain_set", "loss_retain_set.png", RETAIN, "loss"),
    ("draw_score_curves_on_retain_set", "score_retain_set.png", RETAIN, "score"),
    ("draw_classifier_probability_on_forget_class", "probability_on_forget_class.png", FORGET, "probability"),
]  # fmt: skip


def number(*key) -> float:
    """A number between 0 and 1 that belongs to its key."""
    return (hash(key) % 10_007) / 10_007


def experiment(seed, digit, kappa) -> dict:
    def metrics(evaluation, *names):
        return {m: {n: number(evaluation, m, n, seed, digit, kappa) for n in names} for m in METHODS}

    # On training samples the retain score falls with kappa, the forget score is 0 from 20 on.
    training = {"forget": {"score": 50.0 if kappa < 20 else 0.0}, "retain": {"score": 97.0 - kappa / 100}}
    return {
        "seed": seed, "forget_digit": digit, "kappa": kappa, "kappa_choice": "fixed", "top_k": 5,
        "mask_layer": -2, "num_graph_vertices": 200, "num_weights": 1000,
        "unlearning_metrics": metrics("unlearning_metrics", "loss", "score", "probability"),
        "performance_degradation_metrics": metrics("performance_degradation_metrics", "loss", "score"),
        "mask_efficacy_metrics": {"mimu": {"loss": 0.5, "score": 90.0, "probability": 0.7}},
        "training_split_metrics": {"mimu": training},
        "seconds": {"gcn": 3.0, "original": 0.0, "mimu": 0.25, "retrain": 2.0},
    }  # fmt: skip


@pytest.fixture
def written(tmp_path):
    paths = []
    for seed in SEEDS:
        for digit in DIGITS:
            for kappa in KAPPAS:
                paths.append(tmp_path / f"{seed}_{digit}_{kappa}.json")
                paths[-1].write_text(json.dumps(experiment(seed, digit, kappa)))
    return paths


@pytest.fixture
def reporter(written, tmp_path):
    (tmp_path / "reports").mkdir()
    return Reporter(CONFIG, reversed(written), tmp_path / "reports")


def mean_by_hand(evaluation, method, metric, kappa, seeds=SEEDS, digits=DIGITS):
    return fmean(number(evaluation, method, metric, seed, digit, kappa) for seed in seeds for digit in digits)


@pytest.mark.parametrize("samples, evaluation", [("forget", FORGET), ("retain", RETAIN)])
def test_every_getter_gives_one_mean_per_kappa(reporter, samples, evaluation):
    for method in METHODS:
        for metric in ("loss", "score", "probability")[: 3 if samples == "forget" else 2]:
            values = getattr(reporter, f"get_{method}_unlearning_{samples}_set_{metric}")()
            assert values == pytest.approx([mean_by_hand(evaluation, method, metric, kappa) for kappa in KAPPAS])


def test_an_unknown_getter_is_an_attribute_error(reporter):
    with pytest.raises(AttributeError, match="get_nobody_unlearning_forget_set_score"):
        reporter.get_nobody_unlearning_forget_set_score()
    with pytest.raises(AttributeError):
        reporter.nonsense  # noqa: B018


def test_a_value_has_the_deviation_over_seeds(reporter):
    value = reporter.value("unlearning_metrics", "mimu", "score", kappa=20)
    seeds = [mean_by_hand("unlearning_metrics", "mimu", "score", 20, seeds=[seed]) for seed in SEEDS]
    assert value.per_seed == pytest.approx(seeds)
    assert f"{value:.3f}" == f"{fmean(seeds):.3f} ± {stdev(seeds):.3f}"
    one_digit = reporter.value("unlearning_metrics", "mimu", "score", kappa=20, digits=[9])
    assert one_digit.mean == pytest.approx(mean_by_hand("unlearning_metrics", "mimu", "score", 20, digits=[9]))


def test_values_are_written_as_people_read_them():
    assert f"{Value((1.25,)):.1f}" == "1.2" and f"{Value((1.0, 3.0)):+.1f}" == "+2.0 ± 1.4"
    assert f"{Value((math.nan,)):.2f}" == "–"
    assert (Value((3.0, 5.0)) - Value((1.0, 2.0))).per_seed == (2.0, 3.0)


def test_null_is_drawn_as_a_gap_and_written_as_a_dash(written, tmp_path):
    broken = json.loads(written[0].read_text())
    broken["unlearning_metrics"]["mine"]["loss"] = None
    written[0].write_text(json.dumps(broken))
    reporter = Reporter(CONFIG, written, tmp_path / "reports")
    losses = reporter.get_mine_unlearning_forget_set_loss()
    assert math.isnan(losses[0]) and not any(map(math.isnan, losses[1:]))
    reporter.plot()
    assert "–" in (tmp_path / "reports" / "summary.md").read_text()


def test_the_best_kappa_is_chosen_on_the_training_split(reporter):
    assert reporter.best_kappa() == 20


@pytest.mark.parametrize("draw, file, evaluation, metric", CURVES)
def test_curves_show_every_method(reporter, monkeypatch, draw, file, evaluation, metric):
    drawn = {}
    close = plt.close

    def keep(figure):
        for line in figure.axes[0].lines:
            drawn[line.get_label()] = (line.get_xydata().tolist(), line.get_color())
        drawn["legend"] = [text.get_text() for text in figure.legends[0].get_texts()]
        drawn["labels"] = (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel())
        close(figure)

    monkeypatch.setattr(plt, "close", keep)
    getattr(reporter, draw)()
    assert (reporter.folder / file).read_bytes()[:4] == b"\x89PNG"
    assert drawn["legend"] == list(METHODS) and all(drawn["labels"])
    for method in METHODS:
        points = [[kappa, mean_by_hand(evaluation, method, metric, kappa)] for kappa in KAPPAS]
        assert drawn[method][0] == [pytest.approx(point) for point in points]
        assert drawn[method][1] == method_styles(METHODS)[method]["color"]


@pytest.fixture
def auto_reporter(written, tmp_path):
    """A sweep with kappas chosen for each request beside the fixed ones: 10 + digit for every seed."""
    for seed in SEEDS:
        for digit in DIGITS:
            written.append(tmp_path / f"{seed}_{digit}_auto.json")
            chosen = experiment(seed, digit, 10 + digit) | {"kappa_choice": "auto"}
            written[-1].write_text(json.dumps(chosen))
    return Reporter(CONFIG, written, tmp_path / "reports")


def test_auto_stands_apart_from_the_fixed_kappas(auto_reporter):
    assert auto_reporter.kappas == list(KAPPAS) and auto_reporter.headline_kappa() == "auto"
    assert auto_reporter.best_kappa() == 20
    assert auto_reporter.value("kappa", kappa="auto").mean == 10 + fmean(DIGITS)
    by_hand = fmean(number("unlearning_metrics", "mimu", "loss", s, d, 10 + d) for s in SEEDS for d in DIGITS)
    assert auto_reporter.value("unlearning_metrics", "mimu", "loss", kappa="auto").mean == pytest.approx(by_hand)
    assert "16 weights, 8 % of the masked ones and 1.6 % of all" in auto_reporter.about("auto")


def test_auto_is_marked_in_every_figure(auto_reporter, monkeypatch):
    labels = []
    close = plt.close

    def keep(figure):
        labels.append([text.get_text() for text in figure.legends[0].get_texts()])
        close(figure)

    monkeypatch.setattr(plt, "close", keep)
    auto_reporter.plot()
    assert len(labels) == 6 and all("mimu, kappa auto" in legend for legend in labels)


def test_a_sweep_of_auto_alone_is_reported(auto_reporter, written, tmp_path):
    alone = Reporter(CONFIG, [path for path in written if "auto" in path.name], tmp_path / "alone")
    alone.plot()
    assert alone.best_kappa() == "auto" and "kappa = auto" in (tmp_path / "alone" / "summary.md").read_text()


def test_the_worst_digit_of_any_seed_by_hand(reporter):
    forget = max(number("unlearning_metrics", "mimu", "score", s, d, 20) for s in SEEDS for d in DIGITS)
    retain = "performance_degradation_metrics"
    gap = min(
        number(retain, "mimu", "score", s, d, 20) - number(retain, "retrain", "score", s, d, 20)
        for s in SEEDS
        for d in DIGITS
    )
    (row,) = [line for line in reporter.worst_table(20).splitlines() if line.startswith("| mimu")]
    assert [cell.strip() for cell in row.split("|")[2:4]] == [f"{forget:.2f}", f"{gap:+.2f}"]


def test_every_figure_and_table_is_written(reporter):
    reporter.plot()
    files = [*(file for _, file, _, _ in CURVES), "summary.png", "summary.md"]
    assert sorted(path.name for path in reporter.folder.iterdir()) == sorted(files)
    summary = (reporter.folder / "summary.md").read_text()
    for method in METHODS:
        value = reporter.value("performance_degradation_metrics", method, "score", kappa=20)
        assert f"{value:.2f}" in summary
    assert plt.get_fignums() == []


def test_colours_are_the_same_with_and_without_other_methods():
    styles = method_styles(["mimu", "mine", "original", "yours"])
    assert styles["mimu"] == METHOD_STYLES["mimu"] and styles["original"] == METHOD_STYLES["original"]
    assert len({style["color"] for style in styles.values()}) == 4


def test_tables_are_aligned():
    lines = markdown_table(["name", "n"], [["a", 1], ["long name", 22]]).splitlines()
    assert lines == ["| name      |  n |", "| --------- | -: |", "| a         |  1 |", "| long name | 22 |"]


def test_experiments_that_do_not_belong_together_are_refused(written, tmp_path):
    with pytest.raises(ValueError, match="differ in the rest"):
        Reporter(CONFIG, [*written, written[0]], tmp_path)
    other = json.loads(written[0].read_text()) | {"top_k": 6, "kappa": 80}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="must share mask layer and top_k"):
        Reporter(CONFIG, [*written, tmp_path / "other.json"], tmp_path)


def test_a_missing_experiment_is_a_gap_and_no_other_mean(written, tmp_path):
    reporter = Reporter(CONFIG, written[1:], tmp_path)
    assert math.isnan(reporter.get_mimu_unlearning_forget_set_score()[0])
    assert not math.isnan(reporter.get_mimu_unlearning_forget_set_score()[1])
    assert reporter.best_kappa() == 20


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no experiment"):
        Reporter(CONFIG, [], tmp_path)


@pytest.mark.parametrize("change", [{"dpi": 0}, {"dpi": 99999}, {"width": -1.0}, {"height": math.inf}, {"width": 0.01}])
def test_impossible_figures_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ReporterConfig(**{"dpi": 50, "width": 4.0, "height": 3.0} | change)


def variant(folder, name, methods, scores, classifier=(128, 64)):
    """A reporter of two seeds and two digits; scores: method to (forget, retain) of seed 0, digit 3.

    Another seed or digit adds 1 to both.
    """
    paths = []
    for seed in SEEDS:
        for digit in DIGITS:
            shift = (seed == 1) + (digit == 9)
            result = experiment(seed, digit, 10) | {
                "config": {"dataset": "MNIST", "held_out": 0, "classifier": {"hidden_sizes": classifier}},
                "kappa_choice": "auto",
                "unlearning_metrics": {m: {"score": scores[m][0] + shift} for m in methods},
                "performance_degradation_metrics": {m: {"score": scores[m][1] + shift} for m in methods},
                "audit_metrics": {},
                "num_zeroed": {m: 10 if m == "mimu" else None for m in methods},
                "seconds": {m: 0.5 for m in methods},
            }
            paths.append(folder / f"{name}_{seed}_{digit}.json")
            paths[-1].write_text(json.dumps(result))
    return Reporter(CONFIG, paths, folder)


@pytest.fixture
def comparison(tmp_path):
    scores = {"original": (95.0, 95.0), "mimu": (0.0, 96.0), "retrain": (0.0, 97.0)}
    return Comparison(
        {
            "whole": variant(tmp_path, "whole", ("original", "mimu", "retrain"), scores),
            "poor": variant(tmp_path, "poor", ("mimu",), {"mimu": (4.0, 90.0)}),
            "unknown": variant(tmp_path, "unknown", ("mimu",), {"mimu": (4.0, 90.0)}, classifier=(5,)),
        },
        tmp_path / "reports",
    )


def test_variants_are_compared_with_retraining_the_same_classifier(comparison):
    rows = {row.name: row for row in comparison.rows()}
    assert list(rows) == ["whole: original", "whole", "poor", "unknown"]
    assert rows["whole"].gap.per_seed == (-1.0, -1.0) and rows["poor"].gap.per_seed == (-7.0, -7.0)
    assert rows["poor"].forget.per_seed == (4.5, 5.5) and rows["poor"].worst_forget == 6.0
    assert rows["whole"].zeroed.mean == 5.0 and math.isnan(rows["unknown"].gap.mean)


def test_the_worst_request_of_a_variant_is_found(comparison, tmp_path):
    path = tmp_path / "poor_1_3.json"
    result = json.loads(path.read_text())
    result["performance_degradation_metrics"]["mimu"]["score"] = 50.0
    path.write_text(json.dumps(result))
    poor = Reporter(CONFIG, sorted(tmp_path.glob("poor_*.json")), tmp_path)
    row = next(row for row in Comparison({**comparison.reporters, "poor": poor}, tmp_path).rows() if row.name == "poor")
    assert row.worst_gap == 50.0 - 98.0 and row.gap.per_seed == (-7.0, (-48.0 - 7.0) / 2)


def test_every_digit_has_a_table_of_its_own(reporter):
    reporter.write_summary()
    text = (reporter.folder / "summary.md").read_text()
    best = reporter.best_kappa()
    for digit in DIGITS:
        section = text.split(f"## Digit {digit}, kappa = {best}")[1].split("## ")[0]
        row = next(line for line in section.splitlines() if line.startswith("| mine"))
        losses = [number(FORGET, "mine", "loss", seed, digit, best) for seed in SEEDS]
        assert f"{fmean(losses):.2f} ± {stdev(losses):.2f}" in row


def test_the_comparison_is_written_and_drawn(comparison, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", lambda figure: drawn.append(figure))
    comparison.plot()
    lines = (comparison.folder / "variants.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["whole: original", "whole", "poor", "unknown"]
    assert "-7.00 ± 0.00" in lines[6] and "–" in lines[7] and "nan" not in lines[7]
    assert (comparison.folder / "variants.png").stat().st_size > 0
    (figure,) = drawn
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["whole", "poor", "unknown"]
    means = [line.get_xdata()[0] for line in figure.axes[1].lines if line.get_markersize() == 7]
    assert means[:2] == [-1.0, -7.0]


def test_the_summary_says_in_which_layers_the_zeroed_weights_are(tmp_path):
    paths = []
    for digit, counts in ((3, {"layer 0": 6, "output row": 4}), (9, {"layer 0": 1, "output row": 9})):
        paths.append(tmp_path / f"{digit}.json")
        zeroed = {"zeroed_by_layer": {"mimu": counts, "retrain": None}, "num_zeroed": {"mimu": 10, "retrain": None}}
        paths[-1].write_text(json.dumps(experiment(0, digit, 10) | zeroed))
    reporter = Reporter(CONFIG, paths, tmp_path)
    header, _, *rows = reporter.layers_table(10).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["weights zeroed", "layer 0", "output row"]
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows] == [["mimu", "3.5", "6.5"]]
    reporter.write_summary()
    assert reporter.layers_table(10) in (tmp_path / "summary.md").read_text()


AUDITED = ("original", "mimu", "retrain", "far", "loud")
# method: forget score, divergence on the forget set, on the retain set, probe recall, relearn steps
AUDIT_FIGURES = {
    "original": (95.0, 0.9, 0.01, 95.0, 0),
    "mimu": (0.0, 0.1, 0.01, 94.0, 10),
    "retrain": (0.0, 0.0, 0.0, 88.0, 30),
    "far": (0.5, 0.3, 0.02, 90.0, None),
    "loud": (50.0, 0.2, 0.001, 88.0, 30),
}


def audited(digit: int) -> dict:
    about = {"does": "Something.", "paper": "", "touches": "a mask", "needs": "both sets"}
    return {
        "seed": 0, "forget_digit": digit, "kappa": 7, "kappa_choice": "auto", "top_k": 5, "mask_layer": -2,
        "mask_shapes": [[4, 5]], "num_graph_vertices": 20, "num_weights": 100,
        "zeroed": [0, 1, 2, 3, 5 + digit, 19], "zeroed_by_layer": {},
        "unlearning_metrics": {
            name: {"loss": 3.0, "score": of[0], "probability": 0.1} for name, of in AUDIT_FIGURES.items()
        },
        "performance_degradation_metrics": {name: {"loss": 0.1, "score": 97.0} for name in AUDITED},
        "mask_efficacy_metrics": {}, "training_split_metrics": {},
        "num_zeroed": {name: None for name in AUDITED}, "seconds": {name: 1.0 + digit for name in AUDITED},
        "methods": {name: about for name in AUDITED},
        "audit_metrics": {
            name: {
                "js_forget": of[1] + (digit - 5) / 100, "js_retain": of[2], "loss_attack": 0.5, "entropy_attack": 10.0,
                "probe_recall": of[3], "probe_retain": 97.0, "relearn_steps": of[4] or 0,
                "came_back": of[4] is not None, "weights_changed": 6,
            }
            for name, of in AUDIT_FIGURES.items()
        },
        "config": {"held_out": 0, "eval": {"audit": {"relearn_steps": 200}}},
    }  # fmt: skip


@pytest.fixture
def audit_reporter(tmp_path):
    for digit in (4, 6):
        (tmp_path / f"{digit}.json").write_text(json.dumps(audited(digit)))
    (tmp_path / "reports").mkdir()
    return Reporter(CONFIG, [tmp_path / "4.json", tmp_path / "6.json"], tmp_path / "reports")


def table_rows(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_methods_stand_in_the_order_of_their_distance_to_retraining(audit_reporter):
    report = AuditReport(audit_reporter)
    assert report.methods == ["retrain", "mimu", "loud", "far", "original"]
    assert report.distance("mimu").mean == pytest.approx((0.1 + 0.01) / 2)
    assert list(table_rows(report.table(DIVERGENCES))) == report.methods


def without_spread(rows: dict[str, list[str]], column: int) -> list[str]:
    return [re.sub(r" ± [\d.]+", "", row[column]) for row in rows.values()]


def test_the_best_figures_are_bold_by_rule(audit_reporter):
    """The nearest to retraining, of the methods that forget: no reference, nor what leaves half of the class."""
    report = AuditReport(audit_reporter)
    distances, audits = table_rows(report.table(DIVERGENCES)), table_rows(report.table(LEFT_BEHIND))
    assert without_spread(distances, 0) == ["0.000", "**0.100**", "0.200", "0.300", "0.900"]
    assert without_spread(distances, 1) == ["0.0000", "**0.0100**", "0.0010", "0.0200", "0.0100"]
    assert without_spread(audits, 2) == ["88.0", "94.0", "88.0", "**90.0**", "95.0"]
    # Alike as they are written, so both are bold.
    assert without_spread(audits, 0) == ["0.500", "**0.500**", "0.500", "**0.500**", "0.500"]


def test_gaps_that_cancel_over_the_digits_are_not_the_best(audit_reporter):
    for experiment, away in zip(audit_reporter.experiments, (-6.0, 6.0)):
        experiment["audit_metrics"]["mimu"]["probe_recall"] = 88.0 + away
    audits = table_rows(AuditReport(audit_reporter).table(LEFT_BEHIND))
    assert without_spread(audits, 2)[1] == "88.0" and without_spread(audits, 2)[3] == "**90.0**"


def test_with_one_seed_the_spread_is_over_the_digits(audit_reporter):
    rows = table_rows(AuditReport(audit_reporter).table(DIVERGENCES))
    assert rows["far"][0] == f"0.300 ± {stdev([0.29, 0.31]):.3f}"


def test_a_class_that_does_not_come_back_is_marked(audit_reporter):
    for experiment in audit_reporter.experiments:
        experiment["audit_metrics"]["far"]["relearn_steps"] = 200
    rows = table_rows(AuditReport(audit_reporter).table(LEFT_BEHIND))
    assert without_spread(rows, 4) == ["30.0", "**10.0**", "30.0", "> 200.0", "0.0"]
    for experiment in audit_reporter.experiments:
        experiment["audit_metrics"]["far"]["relearn_steps"] = None
    assert without_spread(table_rows(AuditReport(audit_reporter).table(LEFT_BEHIND)), 4)[3] == "–"


def test_gaps_are_to_the_retrained_classifier(audit_reporter):
    rows = table_rows(AuditReport(audit_reporter).table(METRICS, METRICS))
    assert without_spread(rows, 0) == ["+0.00", "**+0.00**", "+50.00", "+0.50", "+95.00"]


def test_what_does_not_forget_or_takes_the_others_along_is_named_and_never_bold(audit_reporter):
    for experiment in audit_reporter.experiments:
        experiment["performance_degradation_metrics"]["far"]["score"] = 94.0
    report = AuditReport(audit_reporter)
    assert "above 1 %: loud. Retain score more than 2 points below the original's: far." in report.shortfalls()
    assert without_spread(table_rows(report.table(LEFT_BEHIND)), 2) == ["88.0", "**94.0**", "88.0", "90.0", "95.0"]


def test_a_model_scored_by_hand_is_left_out_of_the_audits(audit_reporter):
    for experiment in audit_reporter.experiments:
        experiment["unlearning_metrics"]["by hand"] = {"loss": 1.0, "score": 1.0, "probability": 0.5}
    assert "by hand" not in AuditReport(audit_reporter).methods


def test_the_audits_stand_in_the_summary_and_are_drawn(audit_reporter):
    report = AuditReport(audit_reporter)
    audit_reporter.plot(report.tables())
    report.draw_audits()
    written = sorted(path.name for path in audit_reporter.folder.iterdir())
    assert written == ["audits.png", "masks.png", "summary.md", "trade_off.png"]
    summary = (audit_reporter.folder / "summary.md").read_text()
    for title in ("Distance to retraining", "Audits", "Cost", "The methods"):
        assert f"\n## {title}\n" in summary
    assert all((audit_reporter.folder / name).stat().st_size > 3000 for name in written if name.endswith("png"))


def test_the_picture_of_the_masks_shows_what_digits_have_in_common(audit_reporter, monkeypatch):
    images = []
    close = plt.close

    def keep(figure):
        images.extend(image.get_array().tolist() for axes in figure.axes for image in axes.images)
        close(figure)

    monkeypatch.setattr(plt, "close", keep)
    draw_masks(audit_reporter)
    counts, shares = images
    by_hand = [[2, 2, 2, 2, 0], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 2]]
    assert counts == by_hand
    assert shares == [[100.0, pytest.approx(500 / 6)], [pytest.approx(500 / 6), 100.0]]
