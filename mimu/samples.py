"""Samples in memory, random choices among them, and which of them are classified correctly."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from mimu.seeds import seeded

FEW = 100  # samples of a class; with fewer, none is held out
HELD_OUT = 5  # every fifth sample of a class is held out
SCORED_AT_ONCE = 10_000  # samples of a batch without a backward pass


@dataclass(frozen=True)
class Split:
    """Samples in memory. images: (samples, pixels) float, labels: (samples) int64."""

    images: Tensor
    labels: Tensor

    def forget(self, forget_class: int) -> "Split":
        """Returns the samples of the forget class."""
        return self[self.labels == forget_class]

    def retain(self, forget_class: int) -> "Split":
        """Returns the samples of the retained classes."""
        return self[self.labels != forget_class]

    def __getitem__(self, chosen: Tensor | slice) -> "Split":
        if isinstance(chosen, Tensor) and chosen.dtype == torch.bool and chosen.all():
            return self  # a copy of all samples would take their memory once more
        return Split(self.images[chosen], self.labels[chosen])

    def select(self, indices: Tensor) -> "Split":
        """Returns the samples of these indices; it copies whole rows, which is faster than indexing."""
        return Split(self.images.index_select(0, indices), self.labels[indices])

    def num_batches(self, batch_size: int) -> int:
        """The number of batches in an epoch, the last one of which may be smaller."""
        return -(-len(self.labels) // batch_size)

    def batches(self, batch_size: int, generator: torch.Generator) -> "Iterator[Split]":
        """Yields random batches of the samples, epoch after epoch without end."""
        while True:
            order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
            yield from map(self.select, order.split(batch_size))

    def loader(self, batch_size: int = SCORED_AT_ONCE) -> DataLoader:
        """Returns a loader of batches (images, labels) in order, which are cut whole and not sample by sample."""
        samples = TensorDataset(self.images, self.labels)
        batches = BatchSampler(SequentialSampler(samples), batch_size, drop_last=False)
        return DataLoader(samples, sampler=batches, batch_size=None)


def drawn_of_every_class(labels: Tensor, count: int, *key: object) -> Tensor:
    """Returns the indices of random samples, class after class: `count` of each, or all where a class has fewer.

    key: seeds the draws together with the label of a class, so that no class depends on another one
    """
    chosen = [labels.new_empty(0)]
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=seeded(*key, label))
        chosen.append(members[order[:count].to(members.device)])
    return torch.cat(chosen)


def some_of_every_class(split: Split, count: int, *key: object) -> Split:
    """Returns the samples that `drawn_of_every_class` draws."""
    return split.select(drawn_of_every_class(split.labels, count, *key))


def held_out(labels: Tensor, fewest: int = 1) -> Tensor:
    """Marks every fifth sample of each class that has at least `fewest` samples, (samples)."""
    is_held_out = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        indices = (labels == label).nonzero()[:, 0]
        if len(indices) >= fewest:
            is_held_out[indices[HELD_OUT - 1 :: HELD_OUT]] = True
    return is_held_out


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Says which samples are classified correctly, (samples): none with a logit that is not a number."""
    # If logits are not numbers, the largest one would be that of the first class.
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns by how much the logit of each sample's class exceeds the largest of the other logits, (samples)."""
    other_logits = logits.scatter(1, labels[:, None], float("-inf"))
    return logits.gather(1, labels[:, None])[:, 0] - other_logits.amax(1)
