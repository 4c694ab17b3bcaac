"""What methods leave in the representation beside retraining, as tables and as a frontier, against means by hand."""

import json
import math
from statistics import fmean

import matplotlib.pyplot as plt
import pytest

from comparison import RETAIN_SCORE, Column, Comparison
from frontier import COST, PROBE, Frontier, Point
from reporter import FORGET, METHOD_STYLES, RETAIN, Reporter, ReporterConfig, Value

CONFIG = ReporterConfig(dpi=50, width=4, height=3)
SEEDS, DIGITS = (0, 1), (3, 9)
RETAINED = {"original": 95.0, "mimu": 93.0, "retrain": 97.0}
PROBED = {"original": 96.0, "mimu": 91.0, "retrain": 80.0}


def shift(method: str, seed: int, digit: int) -> float:
    """What another seed or digit adds, with another sign for the retrained classifier."""
    return (seed + (digit == 9) / 4) * (-1 if method == "retrain" else 1)


def result(seed, digit, kappa, methods, erasure, audited, classifier) -> dict:
    is_auto = kappa == "auto"
    lost = erasure / 4 + (0 if is_auto else kappa / 10)

    def audits(method: str) -> dict:
        far = shift(method, seed, digit) - (lost if method == "mimu" else 0)
        return {
            "probe_recall": PROBED[method] + far + 1,
            "probes": {"softmax": PROBED[method] + far, "hidden_0": 99.0},
            "relearn_from": {"1": 40 + seed, "10": None if method == "mimu" else 10},
        }

    return {
        "seed": seed, "forget_digit": digit, "kappa": 10 + digit if is_auto else kappa,
        "kappa_choice": "auto" if is_auto else "fixed", "top_k": 5, "mask_layer": None,
        "num_graph_vertices": 200, "num_weights": 200, "num_zeroed": {m: 10 for m in methods},
        FORGET: {m: {"score": 0.0} for m in methods},
        RETAIN: {
            m: {"score": RETAINED[m] + shift(m, seed, digit) - (lost if m == "mimu" else 0)} for m in methods
        },
        "training_split_metrics": {"mimu": {"forget": {"score": 0.0}, "retain": {"score": 90.0}}},
        "mask_efficacy_metrics": {}, "seconds": {m: 0.5 for m in methods},
        "audit_metrics": {m: audits(m) for m in methods} if audited else {},
        "config": {
            "dataset": "MNIST", "held_out": 0, "classifier": {"hidden_sizes": classifier},
            "eval": {"erasure": erasure},
        },
    }  # fmt: skip


@pytest.fixture
def variant(tmp_path):
    """Makes the reporter of a variant."""

    def make(
        name, methods=("mimu",), erasure=0.0, kappas=("auto",), audited=True, classifier=(8,), change=None, left_out=()
    ) -> Reporter:
        paths = []
        for seed in SEEDS:
            for digit in DIGITS:
                for kappa in kappas:
                    if (seed, digit, kappa) in left_out:
                        continue
                    content = result(seed, digit, kappa, methods, erasure, audited, classifier)
                    if change:
                        change(content)
                    paths.append(tmp_path / f"{name}_{seed}_{digit}_{kappa}.json")
                    paths[-1].write_text(json.dumps(content))
        return Reporter(CONFIG, paths, tmp_path)

    return make


ALL = ("original", "mimu", "retrain")


@pytest.fixture
def comparison(variant, tmp_path) -> Comparison:
    return Comparison(
        {
            "strong": variant("strong", erasure=8.0),
            "none": variant("none", ALL),
            "weak": variant("weak", erasure=2.0, kappas=("auto", 20, 10)),
            "other classifier": variant("other", erasure=4.0, classifier=(5,)),
            "not audited": variant("silent", erasure=6.0, audited=False),
        },
        tmp_path / "reports",
    )


def test_figures_are_those_less_the_retrained_classifiers_digit_by_digit(comparison):
    """The shift of another seed or digit counts twice, as the retrained classifier's has the other sign."""
    digits = fmean([0.0, 2 * 0.25])
    retain = comparison.against_retraining("strong", RETAIN_SCORE, "mimu", "auto")
    assert retain.per_seed == pytest.approx((93 - 2 - 97 + digits, 93 - 2 - 97 + digits + 2))
    probe = comparison.against_retraining("weak", PROBE, "mimu", 20)
    assert probe.per_seed == pytest.approx((91 - 0.5 - 2 - 80 + digits, 91 - 0.5 - 2 - 80 + digits + 2))
    itself = comparison.against_retraining("none", PROBE, "retrain", "auto")
    assert itself.per_seed == (0.0, 0.0)
    unknown = comparison.against_retraining("other classifier", RETAIN_SCORE, "mimu", "auto")
    assert len(unknown.per_seed) == 2 and all(map(math.isnan, unknown.per_seed))
    rows = {row.name: row.gap for row in comparison.rows()}
    assert rows["strong"] == retain


def test_a_digit_that_is_not_known_makes_its_seed_unknown_and_no_other(variant, tmp_path):
    def without_audits(content):
        if (content["seed"], content["forget_digit"]) == (1, 9):
            content["audit_metrics"]["mimu"]["probes"] = None

    reporters = {"whole": variant("whole", ALL), "partly": variant("partly", change=without_audits)}
    first, second = Comparison(reporters, tmp_path).against_retraining("partly", PROBE, "mimu", "auto").per_seed
    assert first == pytest.approx(91 - 80 + 0.25) and math.isnan(second)


@pytest.mark.parametrize("left_out", [[(1, 9, 10)], [(1, 3, 10), (1, 9, 10)]])
def test_an_experiment_that_is_missing_is_a_gap_and_no_other_mean(variant, tmp_path, left_out):
    reporters = {"whole": variant("whole", ALL), "partly": variant("partly", kappas=(10, 20), left_out=left_out)}
    comparison = Comparison(reporters, tmp_path)
    first, second = comparison.against_retraining("partly", PROBE, "mimu", 10).per_seed
    assert first == pytest.approx(91 - 1 - 80 + 0.25) and math.isnan(second)


def test_a_retrained_classifier_that_was_not_audited_stands_before_none_that_was(variant, tmp_path):
    reporters = {"whole": variant("whole", ALL), "silent": variant("silent", ALL, audited=False)}
    for order in (["whole", "silent"], ["silent", "whole"]):
        comparison = Comparison({name: reporters[name] for name in order}, tmp_path)
        assert comparison.against_retraining("whole", PROBE, "retrain", "auto").per_seed == (0.0, 0.0)


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_audits_of_all_variants_stand_in_one_table(comparison):
    rows = cells(comparison.audit_table())
    header = ["softmax", "at layer 1", "to convergence", "steps, 1 a class", "steps, 10 a class"]
    assert rows.pop("variant") == header and rows.pop(next(name for name in rows if "---" in name))
    assert list(rows) == ["strong", "none: original", "none", "none: retrain", "weak", "other classifier"]
    assert rows["strong"] == ["+10.2 ± 1.4", "+0.0 ± 0.0", "+10.2 ± 1.4", "40 ± 1", "–"]
    assert rows["none: retrain"] == ["+0.0 ± 0.0"] * 3 + ["40 ± 1", "10 ± 0"]
    assert rows["none: original"][0] == f"{Value((16.25, 18.25)):+.1f}"
    assert rows["other classifier"] == ["–", "–", "–", "40 ± 1", "–"]


def test_a_variant_may_have_audits_of_its_own(variant, tmp_path):
    def without_probes(content):
        for of_method in content["audit_metrics"].values():
            of_method |= {"probes": {}, "relearn_from": {"5": 7}}

    reporters = {"whole": variant("whole", ALL), "own": variant("own", change=without_probes)}
    rows = cells(Comparison(reporters, tmp_path).audit_table())
    assert rows["variant"][-1] == "steps, 5 a class" and rows["own"][-1] == "7 ± 0" and rows["whole"][-1] == "–"
    assert rows["own"][:2] == ["–", "–"] and rows["own"][2] != "–"


def test_without_audits_there_is_one_table(variant, comparison, tmp_path):
    silent = Comparison({"silent": variant("silent", ALL, audited=False)}, tmp_path)
    assert silent.tables() == [silent.table()] and silent.audit_columns() == []
    assert comparison.tables() == [comparison.table(), comparison.audit_table()]


def test_both_tables_stand_in_the_file_of_the_variants(comparison):
    comparison.plot()
    text = (comparison.folder / "variants.md").read_text()
    assert text == f"# Variants\n\n{comparison.table()}\n\n{comparison.audit_table()}\n"


def test_every_method_of_every_variant_is_a_point_at_every_kappa(comparison):
    points = Frontier(comparison).points
    assert [(point.variant, point.method, point.kappa, point.weight) for point in points] == [
        ("strong", "mimu", "auto", 8.0),
        *(("none", method, "auto", 0.0) for method in ALL),
        *(("weak", "mimu", kappa, 2.0) for kappa in (10, 20, "auto")),
    ]
    for point in points:
        assert point.excess == comparison.against_retraining(point.variant, PROBE, point.method, point.kappa)
        assert point.gap == comparison.against_retraining(point.variant, RETAIN_SCORE, point.method, point.kappa)
    assert points[0].excess.mean == pytest.approx(10.25) and points[0].gap.mean == pytest.approx(-4.75)


@pytest.mark.parametrize(
    "excess, gap, is_finite", [(1.0, 2.0, True), (math.nan, 2.0, False), (1.0, math.inf, False), (1.0, math.nan, False)]
)
def test_a_point_without_both_of_its_values_is_not_finite(excess, gap, is_finite):
    assert Point("a", "mimu", "auto", 0.0, "None", Value((0.0, excess)), Value((gap, 0.0))).is_finite == is_finite


def test_a_method_is_a_curve_over_the_weight_and_one_over_the_kappas_of_every_variant(comparison, variant):
    comparison.reporters["middle"] = variant("middle", erasure=4.0, kappas=(10, 20, 40))
    frontier = Frontier(comparison)
    assert [point.weight for point in frontier.over_weight("mimu")] == [0.0, 2.0, 8.0]
    assert [point.variant for point in frontier.over_weight("retrain")] == ["none"]
    curves = [[(point.variant, point.kappa) for point in points] for points in frontier.over_kappa("mimu")]
    assert curves == [[("weak", 10), ("weak", 20)], [("middle", kappa) for kappa in (10, 20, 40)]]
    assert frontier.over_kappa("retrain") == []


def test_a_variant_that_masks_other_layers_is_a_hollow_mark_beside_the_curve(comparison, variant, drawn):
    def of_the_first_layers(content):
        content["mask_layer"] = [0, 1]

    comparison.reporters["elsewhere"] = variant("elsewhere", erasure=8.0, change=of_the_first_layers)
    frontier = Frontier(comparison)
    assert "elsewhere" not in [point.variant for point in frontier.over_weight("mimu")]
    (point,) = frontier.on_other_layers("mimu")
    assert point.variant == "elsewhere" and frontier.on_other_layers("retrain") == []
    frontier.draw()
    hollow = [line.get_xydata().tolist() for line in drawn[0].axes[0].lines if line.get_fillstyle() == "none"]
    assert hollow == [[[point.excess.mean, point.gap.mean]]]


def test_there_is_no_frontier_without_the_softmax_probe(variant, tmp_path, comparison):
    def without_softmax(content):
        for of_method in content["audit_metrics"].values():
            del of_method["probes"]["softmax"]

    blind = {"blind": variant("blind", ALL, change=without_softmax), "silent": variant("silent", ALL, audited=False)}
    assert not Frontier(Comparison(blind, tmp_path)).is_there
    alone = Comparison({"alone": variant("alone", ("original", "mimu"))}, tmp_path)
    assert not Frontier(alone).is_there, "nothing to measure against"
    assert Frontier(comparison).is_there


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are closed."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    plt.close("all")


def test_the_frontier_is_drawn(comparison, drawn):
    frontier = Frontier(comparison)
    comparison.folder.mkdir(exist_ok=True)
    frontier.draw()
    assert (comparison.folder / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    (figure,) = drawn
    (axes,) = figure.axes
    assert axes.get_xlabel() == PROBE.name == "probe recall against the retrained classifier's (points)"
    assert axes.get_ylabel() == COST == "retain score against the retrained classifier's (points)"
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == sorted(ALL)
    lines = {(line.get_linestyle(), line.get_color()): line.get_xydata().tolist() for line in axes.lines}
    blue = METHOD_STYLES["mimu"]["color"]
    over_weight, (over_kappa,) = frontier.over_weight("mimu"), frontier.over_kappa("mimu")
    assert lines["-", blue] == [[point.excess.mean, point.gap.mean] for point in over_weight]
    assert lines[":", blue] == [[point.excess.mean, point.gap.mean] for point in over_kappa]
    assert [text.get_text() for text in axes.texts] == ["0", "8"], "the ends of the curve"
    assert not any(style == "-" and color == METHOD_STYLES["retrain"]["color"] for style, color in lines)
    seeds = [line.get_xydata().tolist() for line in axes.lines if line.get_markersize() == 2.5]
    assert list(map(list, zip(over_weight[0].excess.per_seed, over_weight[0].gap.per_seed))) in seeds


def test_methods_at_fixed_kappas_alone_are_named_in_the_frontier(variant, tmp_path, drawn):
    comparison = Comparison({"fixed": variant("fixed", ALL, kappas=(10, 20))}, tmp_path)
    Frontier(comparison).draw()
    assert sorted(text.get_text() for text in drawn[0].legends[0].get_texts()) == sorted(ALL)


def test_a_column_is_found_under_its_method():
    assert PROBE.of("mimu") == ("audit_metrics", "mimu", "probes", "softmax")
    assert Column(("seconds",), "", "").of("mimu") == ("seconds", "mimu")
