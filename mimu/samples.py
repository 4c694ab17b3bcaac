"""Samples in memory, random choices among them, and which of them are classified correctly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from mimu.seeds import seeded

SCORED_AT_ONCE = 10_000  # samples of a batch without a backward pass


@dataclass(frozen=True)
class Split:
    """Samples in memory. images: (samples, pixels) float, labels: (samples) int64."""

    images: Tensor
    labels: Tensor

    def forget(self, forget_class: int) -> Split:
        """The samples of the forget class."""
        return self[self.labels == forget_class]

    def retain(self, forget_class: int) -> Split:
        """The samples of all other classes."""
        return self[self.labels != forget_class]

    def __getitem__(self, chosen: Tensor | slice) -> Split:
        return Split(self.images[chosen], self.labels[chosen])

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Split]:
        """Random batches of the samples, again and again."""
        while True:
            order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
            for batch in order.split(batch_size):
                yield Split(self.images.index_select(0, batch), self.labels[batch])

    def loader(self, batch_size: int = SCORED_AT_ONCE) -> DataLoader:
        """Whole batches (images, labels) in order, cut from the tensors at once rather than sample by sample."""
        samples = TensorDataset(self.images, self.labels)
        batches = BatchSampler(SequentialSampler(samples), batch_size, drop_last=False)
        return DataLoader(samples, sampler=batches, batch_size=None)


def drawn_of_every_class(labels: Tensor, count: int, generator_of: Callable[[int], torch.Generator]) -> Tensor:
    """Indices of random samples, class after class: `count` of every one that is there, or all where it has fewer."""
    chosen = []
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=generator_of(label))
        chosen.append(of_class[order[:count].to(of_class.device)])
    return torch.cat(chosen)


def some_of_every_class(split: Split, count: int, *key: object) -> Split:
    """`drawn_of_every_class`, those of each by a generator of its own, seeded by a key and the class."""
    found = drawn_of_every_class(split.labels, count, lambda label: seeded(*key, label))
    # Copies rows; indexing copies numbers one by one.
    return Split(split.images.index_select(0, found), split.labels[found])


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples are classified correctly, (samples): none whose logits (samples, classes) are not numbers."""
    # The largest of logits that are not numbers would be the first class.
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the logit of each sample's class is above the largest other one, (samples)."""
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return logits.gather(1, labels[:, None])[:, 0] - others.amax(1)
