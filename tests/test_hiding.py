"""Hiding: the logits of retained classes stay to the bit, and those of hidden ones are never the largest."""

import copy

import pytest
import torch
from conftest import IN_FEATURES, random_split, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mimu import Mask, unlearn
from mimu.judgement import Judgement

CLASSES = 5
SPLIT = random_split(num_classes=CLASSES)
SAMPLES = {"inputs": SPLIT.images, "labels": SPLIT.labels}


class Pooled(nn.Module):
    """A network whose logits are means over places behind a convolution, so that no layer gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Conv2d(1, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels(x.view(-1, 1, IN_FEATURES, 1)).mean((2, 3))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(IN_FEATURES, CLASSES), nn.Linear(IN_FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


def perceptron(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN_FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES, bias))


def with_kernels() -> nn.Sequential:
    """A network whose last layer is a convolution of single places."""
    torch.manual_seed(0)
    layers = nn.Unflatten(1, (IN_FEATURES, 1, 1)), nn.Conv2d(IN_FEATURES, 8, 1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)
    return nn.Sequential(*layers, nn.Flatten())


@pytest.mark.parametrize("make", [perceptron, lambda: perceptron(False), with_kernels], ids=["bias", "none", "kernels"])
@pytest.mark.parametrize("has_samples", [True, False], ids=["samples", "by name"])
@pytest.mark.parametrize("is_together", [True, False], ids=["together", "in turn"])
def test_hidden_classes_are_never_predicted_and_all_other_logits_stay(make, has_samples, is_together, tmp_path):
    model = trained(make(), SPLIT)
    before, state = model(SPLIT.images), copy.deepcopy(model.state_dict())
    samples = (SPLIT.images, SPLIT.labels) if has_samples else (None, None)
    name = "auto" if has_samples else "3" if make is with_kernels else "2"
    for classes in [[1, 3]] if is_together else [1, 3]:
        mask = unlearn(model, *samples, classes, mask_layer=name, method="hide")
        mask.apply(model)
    assert mask.method == "hide" and mask.forgets == (1, 3)
    retained, logits = [0, 2, 4], model(SPLIT.images)
    assert torch.allclose(logits[:, retained], before[:, retained], atol=1e-5)
    assert torch.equal(logits.argmax(1), before.index_fill(1, torch.tensor([1, 3]), float("-inf")).argmax(1))
    if "2.weight" in state and "2.bias" not in state:
        assert torch.allclose(logits[:, 1], before[:, retained].mean(1), atol=1e-5), "the mean of the retained logits"
    mask.save(tmp_path / "mask.pt")
    loaded = Mask.load(tmp_path / "mask.pt")
    assert loaded.method == "hide" and repr(loaded) == repr(mask) and "representation" in repr(mask)
    loaded.remove(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    mask.apply(model, permanent=True)
    assert model.state_dict().keys() == state.keys() and torch.allclose(model(SPLIT.images), logits, atol=1e-5)


@pytest.mark.parametrize(
    "model, arguments, message",
    [
        (perceptron(), {}, "the only linear layer, or named by mask_layer; linear layers are 0, 2$"),
        (perceptron(), {"mask_layer": "fc"}, "named by mask_layer; linear layers are 0, 2$"),
        (perceptron(), {"mask_layer": "0"} | SAMPLES, "whose output is the logits"),
        (Pooled(), {}, "linear layers are none$"),
        (Pooled(), SAMPLES, "output is the logits; linear layers are kernels$"),
        (TwoHeads(), SAMPLES, "output is the logits; linear layers are one, other"),
        (nn.Linear(7, 5), {"forget_class": range(5)}, r"there must be classes to retain beside \[0, 1, 2, 3, 4\]"),
        (nn.Linear(7, 5, False), {"forget_class": range(4)}, "biases two classes must be retained, not 4 alone"),
        (nn.Linear(7, 5), {"forget_class": 5}, r"forget_class must be from 0 to 4, not .* \[5\]"),
        (nn.Linear(7, 5), {"method": "forget"}, "method must be erase, mask or hide, not 'forget'"),
    ],
)  # fmt: skip
def test_what_cannot_be_hidden_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        unlearn(model, **{"forget_class": 1, "method": "hide"} | arguments)


def test_the_method_follows_from_what_is_asked():
    model = trained(perceptron(), random_split(200, num_classes=CLASSES))
    samples = random_split(200, num_classes=CLASSES)
    free = {"max_fall": None, "max_class_fall": None}

    def method_of(**arguments) -> str:
        return unlearn(model, samples.images, samples.labels, 1, **free, **arguments).method

    assert method_of() == "erase" and method_of(scorer="saliency") == method_of(mask_layer=-1) == "mask"


def test_without_a_method_classes_of_too_few_samples_are_hidden_and_by_name_a_method_is_never_replaced():
    samples = random_split(200, num_classes=CLASSES)
    model = trained(perceptron(), samples)
    few = samples[(samples.labels != 1) | ((samples.labels == 1).cumsum(0) <= 9)]
    batches = iter(zip(few.images.split(50), few.labels.split(50)))  # they can be read once
    once = type("Once", (IterableDataset,), {"__iter__": lambda self: batches})()
    with pytest.warns(UserWarning, match=r"classes are hidden, and stay in the representation: .* fewer: \[1\]"):
        mask = unlearn(model, DataLoader(once, batch_size=None), forget_class=1)
    assert mask.method == "hide" and mask.forgets == (1,) and "the representation still holds the class" in repr(mask)
    with pytest.warns(UserWarning, match=r"class 1 cannot be judged by 9 samples"):
        assert unlearn(model, few.images, few.labels, 1, method="erase", max_fall=None).method == "erase"


@pytest.mark.parametrize("errors, is_behind", [(0, False), (3, False), (6, True)])
def test_a_mask_that_keeps_less_than_hiding_says_so_where_the_samples_show_it(errors, is_behind):
    labels = torch.arange(3).repeat_interleave(500)
    before = torch.eye(3)[labels]
    before[0] = torch.tensor([1.0, 2.0, 0.0])  # a sample that is right once class 1 is hidden
    after = before.clone()
    after[1000 : 1000 + errors - 1] = torch.tensor([1.0, 0.0, 0.0])
    judgement = Judgement(labels, before, [0, 2], (None, None), 0.5, False)
    kept = f"the retained classes keep {100 - errors / 10:.1f} %, and 100.0 % by method='hide'"
    assert judgement.behind_hiding(after, [1]) == (kept if is_behind else "")
