"""The membership attack by shadow models on unlearned classifiers, U-LiRA, for docs/shadow.md.

Run it with `uv run docs/shadow.py`; it writes docs/shadow.md; with overrides of the config, as of sweep.forget_digits,
it prints the table alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from build import ROOT, write_block
from torch import Tensor
from torch.distributions import Normal
from tqdm import tqdm

from data import GraphGenerator, ImageData, load_image_data
from eval import Request, run_method
from experiment.config import Config, load_config
from mimu.pretrained import TrainedGCN
from mimu.seeds import seeded
from mimu.settings import number_of_weights
from mimu.tracing import log_odds
from reporter import markdown_table
from trainer import Trainer

OVERRIDES = ("gcn.pretrained=true", "eval.methods=all")
# Controls, variants of the formula, what takes longer than two seconds, and what gives a class the odds zero.
LEFT_OUT = {"random", "magnitude", "logit_removed"}
RETRAINED = ("retrain", "retrain_again")
PAIRS = 32  # of shadow classifiers, trained on either half of the training split
FIRST_SEED = 2_000  # of theirs
DRAWS = 10_000  # of the bootstrap


def is_in_first_half(samples: int, pair: int) -> Tensor:
    """Which samples of the training split the first classifier of a pair is trained on, (samples)."""
    order = torch.randperm(samples, generator=seeded("shadow", pair))
    return order < samples // 2


def odds_by_method(config: Config, data: ImageData, chosen: Tensor, seed: int) -> dict[str, Tensor]:
    """What every method makes of a shadow classifier, which is trained on some samples of the training split.

    Returns the log-odds of all samples of the classes to forget, one class after the other, by method, (samples)
    """
    half, classes = data.train[chosen], len(data.class_names)
    trainer, gcn = Trainer(config.classifier, seed, config.source.size), TrainedGCN.load().gcn
    classifier = trainer.train(half, classes)
    graphs, kept = GraphGenerator(classifier, half, config.graphs, seed), {}
    top_k = number_of_weights(config.sweep.top_k[0], graphs.graph.num_vertices)
    names = [*RETRAINED, *(name for name in config.eval.method_names if name not in LEFT_OUT)]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for label in config.forget_digits:
        asked = Request(config.eval, classifier, trainer, half, graphs, gcn, label, top_k, seed, "auto", kept=kept)
        samples = data.train.forget(label)
        for name, of_classes in found.items():
            model = run_method(asked, name).model
            with torch.no_grad():
                of_classes.append(log_odds(model(samples.images).double(), samples.labels))
    return {name: torch.cat(of_classes) for name, of_classes in found.items()}


def measured(overrides: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """By method, the log-odds under its models of classifiers with a sample and without it, (pairs, samples) each."""
    config = load_config(overrides=[*OVERRIDES, *overrides])
    data = load_image_data(config.dataset, ROOT / "datasets", "cpu")
    labels = data.train.labels
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for pair in tqdm(range(PAIRS), "shadow classifiers", unit="pair"):
        is_first, seed = is_in_first_half(len(labels), pair), FIRST_SEED + 2 * pair
        first = odds_by_method(config, data, is_first, seed)
        second = odds_by_method(config, data, ~is_first, seed + 1)
        is_in = torch.cat([is_first[labels == label] for label in config.forget_digits])
        for name, odds in first.items():
            with_it, without_it = odds.where(is_in, second[name]), second[name].where(is_in, odds)
            pairs.setdefault(name, []).append((with_it, without_it))
    return {name: tuple(map(torch.stack, zip(*of_pairs))) for name, of_pairs in pairs.items()}


def gaussians_of_others(x: Tensor) -> Normal:
    """For each row of (rows, samples) the Gaussian of every sample in all other rows, its variance unbiased."""
    count, centred = len(x) - 1, x - x.mean(0)
    shift = -centred / count  # of the mean where the row is left out
    variance = (centred.square().sum(0) - centred.square() - count * shift.square()) / (count - 1)
    return Normal(x.mean(0) + shift, variance.sqrt())


def likelihood_ratio_attack(members: Tensor, others: Tensor) -> Tensor:
    """The accuracy on each pair, (pairs), of telling by the likelier Gaussian which of the two is the member.

    members, others: (pairs, samples) in double, three pairs at least. The Gaussians of a sample are of all other pairs
    Ties count half. Hayes et al. 2024, arXiv:2403.01218, after Carlini et al. 2022, arXiv:2112.03570.
    """
    gaussians = [gaussians_of_others(x) for x in (members, others)]

    def answers(x: Tensor) -> Tensor:  # 1: a member, -1: none
        of_members, of_others = (each.log_prob(x) for each in gaussians)
        return (of_members - of_others).sign()

    return ((answers(members) - answers(others)) / 4 + 0.5).mean(1)


def accuracy(members: Tensor, others: Tensor) -> str:
    """The mean accuracy of the attack and its 95 % interval, by bootstrap over the pairs."""
    of_pairs = likelihood_ratio_attack(members, others)
    drawn = torch.randint(len(of_pairs), (DRAWS, len(of_pairs)), generator=seeded("bootstrap"))
    low, high = of_pairs[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return f"{of_pairs.mean():.3f} ({low:.3f} to {high:.3f})"


def main(overrides: Sequence[str]) -> None:
    odds = measured(overrides)
    retrained, _ = odds["retrain"]
    rows = []
    for name, (with_it, without_it) in odds.items():
        against_retrained = "" if name == "retrain" else accuracy(with_it, retrained)
        rows.append([name, accuracy(with_it, without_it), against_retrained, f"{with_it.mean():.1f}"])
    table = markdown_table(["method", "with or without the sample", "unlearned or retrained", "log-odds"], rows)
    print(table)
    if not overrides:
        write_block("shadow", table)


if __name__ == "__main__":
    main(sys.argv[1:])
