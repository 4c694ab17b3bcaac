"""Requests on few samples: what is held out, what is said, and what ranks where the GCN costs too much."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import scores, trained_problem
from test_unlearning import FREE, TEST, TRAIN, learned, patient_gcn, stack
from torch import nn

from data import GraphGenerator
from mimu import Mask, RetainScoreError, unlearn
from mimu.attempts import Attempt, forget_by_mask
from mimu.erasing import ErasingConfig, held_out, split_samples
from mimu.judgement import lower_end
from mimu.masks import LayerMask
from mimu.pruning import FEW
from mimu.samples import Split, margins
from mimu.unlearning import FOLDS, held_out_logits

HELD_OUT_LOGITS = "mimu.unlearning.held_out_logits"


@pytest.fixture
def model() -> nn.Module:
    return copy.deepcopy(learned(stack))


def of_each(*counts: int) -> Split:
    """So many samples of each class."""
    parts = [TRAIN.forget(label)[torch.arange(count)] for label, count in enumerate(counts)]
    return joined(*parts)


def joined(*parts: Split) -> Split:
    return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def request(model: nn.Module, samples: Split, **changes) -> tuple[Mask, str]:
    """A mask, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arguments = {"gcn": patient_gcn(step=20), "max_class_fall": None} | changes
        mask = unlearn(model, samples.images, samples.labels, 1, **arguments)
    return mask, " ".join(str(each.message) for each in caught)


@pytest.mark.parametrize("found, count, among", [(1, 20, 1), (4, 20, 1), (1, 1, 1), (12, 900, 1), (5, 5, 9)])
def test_the_lower_end_is_where_as_many_would_be_about_as_unlikely_as_the_confidence_says(found, count, among):
    p = lower_end(100 * found / count, count, among) / 100
    exact = sum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(found, count + 1))
    assert 0.4 * 0.05 / among < exact < 1.6 * 0.05 / among
    assert lower_end(-3.0, count) == lower_end(0.0, count) == 0


def test_samples_that_are_few_are_judged_by_masks_that_are_made_without_them(model, monkeypatch):
    judged, counts = {}, (7, FEW, 6)
    samples = of_each(*counts)
    monkeypatch.setattr(HELD_OUT_LOGITS, lambda *args: judged.setdefault("logits", held_out_logits(*args)))
    mask = request(model, samples, scorer="saliency", **FREE)[0]
    with mask.applied_to(model):
        expected = model(samples.images)
    monkeypatch.setattr(HELD_OUT_LOGITS, lambda request, attempt, *_: attempt.logits)
    for fold in range(FOLDS):
        is_held_out = torch.zeros(len(samples.labels), dtype=torch.bool)
        for label in (0, 2):
            is_held_out[(samples.labels == label).nonzero()[fold::FOLDS, 0]] = True
        without = request(model, samples[~is_held_out], scorer="saliency", **FREE)[0]
        with without.applied_to(model):
            expected[is_held_out] = model(samples.images[is_held_out])
    assert torch.allclose(judged["logits"], expected, atol=1e-5)


def test_what_few_samples_cannot_show_is_said(model):
    mask, said = request(model, of_each(30, 1, 30))
    assert "one sample of class 1: up to 95 % of it may remain" in said and said.split(" (")[0] in repr(mask)
    assert "two samples of class 1: up to 78 % of it may remain" in request(model, of_each(30, 2, 30))[1]
    assert request(model, of_each(FEW, FEW, FEW), gcn=patient_gcn(step=8))[1] == ""


def test_a_single_sample_that_others_classify_wrongly_is_no_class_to_forget(model):
    wrong = TRAIN.forget(0)[(model(TRAIN.forget(0).images).argmax(1) != 0).nonzero()[:1, 0]]
    mask, said = request(model, joined(wrong, of_each(0, 20, 20)), **FREE)
    assert "class 0" not in said and 0 not in mask.forgets


def test_a_class_with_few_samples_leaves_those_of_the_others(model):
    graphs = GraphGenerator(trained_problem()[2], of_each(50, 3, 20), patient_gcn().graphs, 0)
    expected = [[*range(50)], [50, 51, 52] * 16 + [50, 51], [*range(53, 73), *range(53, 73), *range(53, 63)]]
    assert graphs.by_class.tolist() == expected and len(graphs.labels) == 73
    with request(model, of_each(200, 200, 1), **FREE)[0].applied_to(model):
        forget, retain = scores(model, TEST, 1)
    assert forget < 5 and retain > 80


def test_a_class_with_a_sample_or_two_leaves_the_bounds_of_the_others(model):
    for last in (200, 2):
        with pytest.raises(RetainScoreError):
            request(model, of_each(200, 200, last), gcn=patient_gcn(step=60), mask_layer=0)


def test_a_class_whose_only_sample_is_classified_wrongly_is_masked_all_the_same(model):
    of_class = TRAIN.forget(1)
    of_samples = margins(model(of_class.images), of_class.labels).detach()
    lowest = of_samples.argsort()[:1]
    model[5].bias.data[1] -= float(of_samples[lowest]) + 0.1
    mask, said = request(model, joined(of_each(100, 0, 100), of_class[lowest]), **FREE)
    assert mask.num_zeroed > 0 and "in the first place" not in said and mask.forgets == (1,)
    with mask.applied_to(model):
        assert scores(model, TEST, 1)[0] < 20


def test_one_lost_sample_of_few_is_no_error_and_harm_that_is_shown_is_one(model, monkeypatch):
    samples = of_each(10, 10, 10)

    def judging(count: int):
        # That many of class 0 are lost to class 2, as is all of class 1.
        labels = samples.labels.index_fill(0, torch.cat([torch.arange(count), torch.arange(10, 20)]), 2)
        monkeypatch.setattr(HELD_OUT_LOGITS, lambda *_: 40.0 * nn.functional.one_hot(labels, 3))

    judging(1)
    assert request(model, samples)[1] == ""
    judging(4)
    with pytest.raises(RetainScoreError, match=r"lose 20.0 points .*, one retained class loses 40.0"):
        request(model, samples)


@pytest.mark.parametrize("counts", [(24, 24, 24), (23, 23, 23), (30, 1, 30)])
def test_of_few_samples_a_class_is_erased_all_the_same(model, counts, monkeypatch):
    quick = replace(ErasingConfig.configured(), steps=60)
    monkeypatch.setattr(ErasingConfig, "configured", lambda: quick)
    mask, said = request(model, of_each(*counts), method="erase", **FREE)
    with mask.applied_to(model):
        forget, retain = scores(model, TEST, 1)
    assert forget < 5 and retain > 90 and ("one sample of class 1" in said) == (counts[1] == 1)
    assert ("cannot be judged by 1 sample (" in repr(mask)) == (counts[1] == 1)
    assert ("3.weight" in mask.by_layer) == (counts[1] > 1), "by one sample attackers find nothing to take away"


@pytest.mark.parametrize(
    "own, others, is_held_out", [(250, 400, True), (249, 400, False), (400, 250, True), (400, 249, False)]
)
def test_what_was_not_learned_from_says_what_is_left_where_it_can(own, others, is_held_out):
    labels = torch.cat([torch.ones(own), torch.zeros(others)]).long()
    known, unseen = split_samples(labels, [1], replace(ErasingConfig.configured(), samples=30), 0)
    assert set(known.tolist()).isdisjoint(unseen.tolist()) == is_held_out
    assert set(known.tolist()).issuperset(unseen.tolist()) != is_held_out
    assert held_out(labels)[unseen].all() == is_held_out and not held_out(labels)[known].any()
    assert labels[known].bincount().tolist() == [30, 30]


def test_the_mask_of_an_error_is_made_from_some_samples_and_chosen_by_others(model, monkeypatch):
    samples, made_from = of_each(20, 20, 20), []

    def forget(request, judgement):
        made_from.append(request.train.images)
        keep = [torch.ones(3, 12).index_fill(0, torch.tensor(rows), 0) for rows in ([1], [0, 1, 2])]
        masks = [request.start, *(Mask({"5.weight": LayerMask.of(each)}) for each in keep)]
        return Attempt(masks, request.logits(masks[-1]), "", 0, {})

    monkeypatch.setattr("mimu.unlearning.forget_classes", forget)
    with pytest.raises(RetainScoreError, match="keeps to that on samples that it was not made from") as error:
        unlearn(model, samples.images, samples.labels, 1, mask_layer=-1, max_class_fall=None)
    assert len(made_from[-1]) == 48 < len(made_from[0]) == 60 and error.value.mask.num_zeroed == 12


@pytest.mark.parametrize("lost, ranks", [((3, 0), "GCN"), ((5, 0), "formula"), ((5, 6), "GCN")])
def test_the_formula_is_tried_if_the_gcn_costs_more_than_a_point(model, lost, ranks, monkeypatch):
    def forget(request, judgement):
        logits = judgement.before.clone()
        logits[:, 1] = -100.0
        right = ((judgement.labels == 0) & (logits.argmax(1) == 0)).nonzero()[:, 0]
        logits[right[: lost[request.trained.gcn is None]], 2] = 100.0  # of 400; four are a point
        return forget_by_mask(request, judgement)._replace(logits=logits)

    monkeypatch.setattr("mimu.unlearning.forget_classes", forget)
    mask = request(model, TRAIN, **FREE)[0]
    assert f"ranked by the {ranks}" in repr(mask)
    alone = request(model, TRAIN, scorer="saliency", **FREE)[0]
    assert torch.equal(mask.as_tensor(), alone.as_tensor()) == (ranks == "formula")
