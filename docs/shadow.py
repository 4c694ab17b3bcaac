"""Runs the membership attack by shadow models, U-LiRA, against every method, for docs/shadow.md.

`uv run docs/shadow.py` writes its table to docs/shadow.md. With overrides of the config, as of sweep.forget_digits, it
prints the table and writes nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Normal
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from build import ROOT, write_block

from data import GraphGenerator, ImageData, load_image_data
from eval import Request, run_method
from experiment.config import Config, load_config
from mimu.hooked import log_odds
from mimu.pretrained import TrainedGCN
from mimu.seeds import seeded
from mimu.settings import number_of_weights
from reporter import markdown_table
from trainer import Trainer

OVERRIDES = ("gcn.pretrained=true", "eval.methods=all")
# Two controls, and the method that gives a class the odds zero.
LEFT_OUT = {"random", "magnitude", "logit_removed"}
RETRAINED = ("retrain", "retrain_again")
PAIRS = 32  # of shadow classifiers, each trained on one half of the training split
FIRST_SEED = 2_000  # of these
DRAWS = 10_000  # of the bootstrap


def is_in_first_half(samples: int, pair: int) -> Tensor:
    """Tells which samples of the training split the first classifier of a pair is trained on, (samples)."""
    order = torch.randperm(samples, generator=seeded("shadow", pair))
    return order < samples // 2


def odds_by_method(config: Config, data: ImageData, chosen: Tensor, seed: int) -> dict[str, Tensor]:
    """Trains a shadow classifier on the chosen training samples, and forgets every class by every method.

    Returns, by method, the log-odds of all samples of the classes to forget, class after class, (samples).
    """
    half, classes = data.train[chosen], len(data.class_names)
    trainer, gcn = Trainer(config.classifier, seed, config.source.size), TrainedGCN.load().gcn
    classifier = trainer.train(half, classes)
    graphs, kept = GraphGenerator(classifier, half, config.graphs, seed), {}
    top_k = number_of_weights(config.sweep.top_k, graphs.graph.num_vertices)
    names = [*RETRAINED, *(name for name in config.eval.method_names if name not in LEFT_OUT)]
    odds: dict[str, list[Tensor]] = {name: [] for name in names}
    for label in config.forget_digits:
        request = Request(config.eval, classifier, trainer, half, graphs, gcn, label, top_k, seed, "auto", kept=kept)
        samples = data.train.forget(label)
        for name in names:
            model = run_method(request, name).model
            with torch.no_grad():
                odds[name].append(log_odds(model(samples.images).double(), samples.labels))
    return {name: torch.cat(parts) for name, parts in odds.items()}


def measure(overrides: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns, by method, the log-odds under classifiers with a sample and without it, (pairs, samples) each."""
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
    return {name: tuple(map(torch.stack, zip(*odds))) for name, odds in pairs.items()}


def leave_one_out_gaussians(x: Tensor) -> Normal:
    """Fits, for each row of x (rows, samples), a Gaussian per sample to all other rows, its variance unbiased."""
    count, centred = len(x) - 1, x - x.mean(0)
    shift = -centred / count  # of the mean when the row is omitted
    variance = (centred.square().sum(0) - centred.square() - count * shift.square()) / (count - 1)
    return Normal(x.mean(0) + shift, variance.sqrt())


def likelihood_ratio_attack(members: Tensor, nonmembers: Tensor) -> Tensor:
    """Tells by the likelier Gaussian which of two models is the member; returns the accuracy on each pair, (pairs).

    A sample's Gaussians are fitted to all other pairs. Ties count half. Hayes et al. 2024, arXiv:2403.01218, after
    Carlini et al. 2022, arXiv:2112.03570.

    Args:
        members, nonmembers: log-odds, (pairs, samples), in double precision, of at least three pairs
    """
    in_gaussians, out_gaussians = leave_one_out_gaussians(members), leave_one_out_gaussians(nonmembers)

    def decisions(x: Tensor) -> Tensor:  # 1: a member, -1: none
        return (in_gaussians.log_prob(x) - out_gaussians.log_prob(x)).sign()

    return ((decisions(members) - decisions(nonmembers)) / 4 + 0.5).mean(1)


def accuracy(members: Tensor, nonmembers: Tensor) -> str:
    """Returns the mean accuracy of the attack and its 95 % interval, by bootstrap over the pairs."""
    by_pair = likelihood_ratio_attack(members, nonmembers)
    drawn = torch.randint(len(by_pair), (DRAWS, len(by_pair)), generator=seeded("bootstrap"))
    low, high = by_pair[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return f"{by_pair.mean():.3f} ({low:.3f} to {high:.3f})"


def main(overrides: Sequence[str]) -> None:
    odds = measure(overrides)
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
