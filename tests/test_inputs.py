"""Models and samples as they come: loaders that are streamed, inputs of several tensors, and models inside modules."""

import copy
import io
import re
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mask_of, random_split, scores, trained
from test_unlearning import FREE, TEST, TRAIN, learned, stack
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from tqdm import tqdm

from mimu import Mask, unlearn
from mimu.batches import SKETCHED, batches_of, joined, sketch
from mimu.erasing import ErasingConfig
from mimu.inputs import CustomModel

BATCH = 50
FIRST_WORD = 2700  # bfloat16 does not tell it from the next one


class Stream(IterableDataset):
    """The samples, one after the other, whose number nobody knows; it counts how often it is read."""

    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.count += 1
        return iter(TensorDataset(TRAIN.images, TRAIN.labels))


METHODS = [{"method": "mask", "scorer": "saliency", "mask_layer": -1}, {"method": "erase"}]


@pytest.mark.parametrize("method", METHODS)
def test_a_loader_is_read_once_and_gives_the_mask_of_its_tensors(method):
    stream = Stream()
    mask, expected = (
        unlearn(learned(stack), *inputs, forget_class=1, **method, **FREE)
        for inputs in ((DataLoader(stream, BATCH),), (TRAIN.images, TRAIN.labels))
    )
    assert stream.count == 1 and mask.includes(expected) and expected.includes(mask)


class Images(Dataset):
    """Images that it makes when they are asked for, and how many of them are in memory."""

    def __init__(self, count: int = 300) -> None:
        self.count, self.alive, self.most = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def freed(self) -> None:
        self.alive -= 1

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        values = np.random.default_rng(index).random((2, 40, 40), dtype=np.float32) + index % 3
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(values, self.freed)
        return torch.from_numpy(values), index % 3


def convolved() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 4, 4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def test_of_a_loader_the_inputs_of_the_masked_layer_are_held_and_a_sketch_of_its_own(monkeypatch):
    images, model = Images(), convolved()
    loader = DataLoader(images, batch_size=1, collate_fn=lambda pairs: (pairs[0][0][None], torch.tensor([pairs[0][1]])))
    held = CustomModel.of(model, loader, None, "auto", progress=False)
    assert images.most <= 4 and held.cached_inputs.shape == (300, 6) and held.model_inputs.shape == (300, 0)
    x = torch.stack([images[index][0] for index in range(300)])
    assert torch.allclose(held.cached_inputs, model[:8](x), atol=1e-6)
    assert held.labels.tolist() == [index % 3 for index in range(300)]
    held = CustomModel.of(model, x, held.labels, "auto", progress=False, erase=True)
    assert held.cached_inputs[0].shape == (2, 40, 40) and held.model_inputs.shape == (300, SKETCHED)
    monkeypatch.setattr("mimu.inputs.HELD", 300 * 500)  # the second convolution is given 400 numbers, the first 3,200
    held = CustomModel.of(model, x, held.labels, "auto", progress=False, erase=True)
    assert held.cached_inputs[0].shape == (4, 10, 10) and len(held.masked) == 3
    monkeypatch.setattr("mimu.inputs.HELD", 1)
    assert len(CustomModel.of(model, x, held.labels, "auto", progress=False, erase=True).masked) == 2


def test_a_sketch_keeps_inner_products_and_what_attackers_find():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 5000, generator=generator)
    is_class = torch.arange(1000) < 200
    x[is_class] += 0.3 * torch.randn(5000, generator=generator)
    reduced = sketch(x.view(1000, 50, 100))
    assert reduced.shape == (1000, SKETCHED) and torch.equal(sketch(x[:7]), reduced[:7])
    # An inner product of two independent samples differs by about the root of |x|^2 |y|^2 / SKETCHED.
    error = (reduced @ reduced.T - x @ x.T)[200:300, 300:400] / (5000 / SKETCHED**0.5)
    assert 0.8 < error.std() < 1.2 and abs(error.mean()) < 0.1
    config = ErasingConfig.configured()
    in_inputs, in_sketch = (config.mean_r_squared(each, is_class[:, None], seed=0).item() for each in (x, reduced))
    assert in_sketch == pytest.approx(in_inputs, abs=0.1) and 0.3 < in_inputs < 0.9
    small = torch.randn(3, 4, 5)
    assert torch.equal(sketch(small), small.flatten(1))


@pytest.mark.parametrize("expected", [0, 10, 25, 99])
def test_batches_are_joined_whatever_number_of_samples_was_expected(expected):
    x, y = torch.randn(25, 3, 2), torch.arange(25)
    batches = zip(x.split(4), y.split(4))
    found = joined(batches, expected)
    assert torch.equal(found[0], x) and torch.equal(found[1], y)


def test_a_bar_counts_the_batches_of_a_loader(monkeypatch):
    at_once = {"delay": 0, "mininterval": 0}
    monkeypatch.setattr("mimu.batches.tqdm", lambda *given, **options: tqdm(*given, **options | at_once))
    monkeypatch.setattr("sys.stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    loader = DataLoader(TensorDataset(TRAIN.images, TRAIN.labels), BATCH)
    CustomModel.of(learned(stack), loader, None, "auto")
    assert [*map(int, re.findall(r"samples:[^\r]* (\d+)/12 \[[^\r]*batches", terminal.getvalue()))] == [*range(13)]


class Reader(nn.Module):
    """Reads numbers and words, of which only some count; its logits stand in an object of any class."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(FIRST_WORD + 200, 8), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, numbers: Tensor, words: Tensor, is_read: Tensor) -> SimpleNamespace:
        meaning = (self.words(words) * is_read[..., None]).sum(1)
        return SimpleNamespace(logits=self.head(self.inner(torch.cat([numbers, meaning], 1)).relu()))


def texts(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers, words, which of these count, and labels; words are odd in class 0, even in class 1, and both in 2."""
    split, generator = random_split(200, seed), torch.Generator().manual_seed(seed)
    size = (len(split.labels), 6)
    is_odd = torch.rand(size, generator=generator) < torch.tensor([1.0, 0.0, 0.5])[split.labels][:, None]
    words = FIRST_WORD + 2 * torch.randint(100, size, generator=generator) + is_odd
    return split.images[:, :4] / 3, words, torch.rand(size, generator=generator) < 0.7, split.labels


@cache
def reader() -> tuple[Reader, tuple, tuple]:
    torch.manual_seed(0)
    model, train, test = Reader(), texts(0), texts(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(*train[:3]).logits, train[3]).backward()
        optimizer.step()
    return model.eval(), train, test


def named(tensors: tuple, label: str = "labels") -> dict[str, Tensor]:
    return dict(zip(("numbers", "words", "is_read", label), tensors))


class Rows(Dataset):
    """Samples, each as a function has it."""

    def __init__(self, tensors: tuple, sample: Callable) -> None:
        self.tensors, self.sample = tensors, sample

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple | dict:
        return self.sample([each[index] for each in self.tensors])


# What is given for tensors (numbers, words, is_read, labels).
SEVERAL = {
    "a tuple": lambda all: (all[:3], all[3]),
    "a dict": lambda all: ({name: each for name, each in named(all).items() if name != "labels"}, all[3]),
    "a dict with labels": lambda all: (named(all, "label"), None),
    "loader of tuples": lambda all: (DataLoader(TensorDataset(*all), BATCH), None),
    "loader of dicts": lambda all: (DataLoader(Rows(all, named), BATCH), None),
    "data set of pairs of a tuple": lambda all: (Rows(all, lambda row: (row[:3], row[3])), None),
    "loader of pairs of a dict": lambda all: (DataLoader(Rows(all, lambda row: (named(row[:3]), row[3])), 2), None),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_tensors_are_read_in_every_way_that_people_have_them(case):
    tensors = texts(0)
    count, batches = batches_of(*SEVERAL[case](tensors))
    images, labels, forms = zip(*batches)
    assert count == 600 and torch.equal(torch.cat(labels), tensors[3])
    assert torch.equal(torch.cat(images), torch.cat([each.float() for each in tensors[:3]], 1))
    types = [((4,), torch.float32), ((6,), torch.int64), ((6,), torch.bool)]
    names = ["numbers", "words", "is_read"] if "dict" in case else [0, 1, 2]
    assert all(form == dict(zip(names, types)) for form in forms)


def recall(model: nn.Module, test: tuple) -> list[float]:
    correct = model(*test[:3]).logits.argmax(1) == test[3]
    return [100 * correct[test[3] == label].float().mean().item() for label in range(3)]


class OfOne(nn.Module):
    """The reader as people had to write it, of one tensor."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(x[:, :4], x[:, 4:10].long(), x[:, 10:].bool()).logits


@pytest.mark.parametrize("case", ["a tuple", "loader of dicts"])
def test_a_model_of_several_tensors_gets_the_mask_that_it_gets_when_it_takes_one(case):
    model, train, test = copy.deepcopy(reader())
    x = torch.cat([each.float() for each in train[:3]], 1)
    inputs, labels = SEVERAL[case](train)
    mask, expected = (
        unlearn(*of, forget_class=1, **METHODS[0], **FREE)
        for of in ((model, inputs, labels), (OfOne(model), x, train[3]))
    )
    assert mask.layers == ("head.weight",) and torch.equal(mask.as_tensor(), expected.as_tensor())
    assert 0 < mask.num_zeroed and min(recall(model, test)) > 80
    mask.apply(model)
    after = recall(model, test)
    assert after[1] < 10 and min(after[0], after[2]) > 80


@pytest.mark.parametrize("method", ["hide", "erase"])
def test_words_are_read_to_the_last_one_in_any_precision(method):
    model, train, test = copy.deepcopy(reader())
    mask = unlearn(model.bfloat16(), named(train), forget_class=1, method=method, **FREE)
    mask.apply(model)
    after = recall(model, (test[0].bfloat16(), *test[1:]))
    assert after[1] < 5 and min(after[0], after[2]) > 80


LARGE = torch.full((600, 6), 2**24 + 1)


def padded(tensors: tuple) -> DataLoader:
    """A loader of two batches, the texts of one of which are shorter."""
    numbers, words, is_read, labels = (each[:100] for each in tensors)
    batches = [
        named((numbers[each], words[each, : 4 + each // 50], is_read[each, : 4 + each // 50], labels[each]))
        for each in range(100)
    ]
    return DataLoader(batches, 50)


# What is given for tensors of the reader, and the line.
WRONG = {
    "large": (lambda all: ((all[0], LARGE, all[2]), all[3]), r"inputs\[1\] must be whole numbers that float32 holds"),
    "unknown": (lambda all: (named(all) | {"index": all[3]},), r"fails on inputs {'numbers': .*argument 'index'\)"),
    "no labels": (lambda all: (named(all[:3]),), r"or of dicts with labels, not \['numbers', 'words', 'is_read'\]"),
    "fewer": (lambda all: ((all[0], all[1][1:], all[2]), all[3]), r"labels must be integers of shape \(599,\)"),
    "padded": (
        lambda all: (padded(all),),
        r"one shape .*pad texts .*'words': \(\(4,\), torch.int64\).* \(\(5,\), torch",
    ),
    "empty": (lambda all: (DataLoader(TensorDataset(all[0][:0], all[3][:0])),), "must be samples, not an empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_several_tensors_that_cannot_work_are_one_line(case):
    model, train, _ = reader()
    make, line = WRONG[case]
    with pytest.raises(ValueError, match=line) as raised:
        unlearn(model, *make(train), forget_class=1)
    assert "\n" not in str(raised.value)


class Around(nn.Module):
    """A module of a user around a model, such as one that returns the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside, self.unused = nn.ModuleDict({"model": model}), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside["model"](x)


@pytest.mark.parametrize("method", [*METHODS, {"method": "hide"}])
def test_the_mask_of_a_module_around_a_model_goes_onto_the_model_inside_and_onto_no_other(method):
    model, other = copy.deepcopy(learned(stack)), trained(stack(), TRAIN)
    around, (before, _) = Around(model), scores(model, TEST, 1)
    mask = unlearn(around, TRAIN.images, TRAIN.labels, 1, **method, **FREE)
    assert all(name.startswith("inside.model.") for name in mask.layers)
    with mask.applied_to(around):
        expected = around(TEST.images)
    with mask.applied_to(model):
        assert torch.equal(model(TEST.images), expected) and scores(model, TEST, 1)[0] < before - 20
        assert Mask.on(model).layers == tuple(name.removeprefix("inside.model.") for name in mask.layers)
    assert Mask.on(model) is None
    with pytest.raises(ValueError, match="has other weights than the mask was made on"):
        mask.apply(other)
    with pytest.raises(ValueError, match="'a.1.weight' must be a parameter"):
        mask_of({"a.1.weight": torch.ones(16, 7), "b.3.weight": torch.ones(12, 16)}).apply(model)


def classifiers() -> dict[str, tuple]:
    """Tiny classifiers of Hugging Face, and samples as dicts, whose classes are easily told apart."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes["num_labels"] = 3
    vit = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)
    bert = transformers.BertConfig(vocab_size=40, max_position_embeddings=8, **sizes)
    generator, labels = torch.Generator().manual_seed(0), torch.arange(600) % 3
    pixels = torch.randn(3, 1, 8, 8, generator=generator)[labels] + torch.randn(600, 1, 8, 8, generator=generator) / 2
    words = torch.randint(10, (600, 8), generator=generator) + 10 * labels[:, None]
    is_read = torch.arange(8) < torch.randint(3, 9, (600, 1), generator=generator)
    return {
        "vit": (transformers.ViTForImageClassification(vit), {"pixel_values": pixels, "labels": labels}),
        "bert": (
            transformers.BertForSequenceClassification(bert),
            {"input_ids": words * is_read, "attention_mask": is_read.long(), "labels": labels},
        ),
    }


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_classifiers_of_hugging_face_forget_in_every_way(kind):
    torch.manual_seed(0)
    model, samples = classifiers()[kind]
    optimizer = torch.optim.Adam(model.train().parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        model(**samples).loss.backward()
        optimizer.step()
    loader = DataLoader(Rows(tuple(samples.values()), lambda row: dict(zip(samples, row))), BATCH)
    for method in ("hide", "mask", "erase"):
        mask = unlearn(model, loader, forget_class=1, method=method, **FREE)
        with mask.applied_to(model.eval()):
            correct = model(**samples).logits.argmax(1) == samples["labels"]
        by_class = [correct[samples["labels"] == label].float().mean().item() for label in range(3)]
        assert by_class[1] < 0.05 and min(by_class[0], by_class[2]) > 0.9, (method, by_class)
