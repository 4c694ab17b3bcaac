"""`audit` on models whose answer is known, and its measures against references written out by hand."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import IN_FEATURES, random_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mimu import Mask, audit, auditing, subjects
from mimu.auditing import interval
from mimu.hiding import hiding_mask
from mimu.probes import balanced_bits, linear

CLASSES, FORGET = 5, 1
TRAIN, TEST = (random_split(80, seed, num_classes=CLASSES) for seed in (0, 7))
TESTED = TEST.images, TEST.labels


class Erased(nn.Module):
    """A network whose last layer is given nothing of a class: the representation is projected off what tells it."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = network[:-1], copy.deepcopy(network[-1])
        x, labels = self.body(TRAIN.images).detach().double(), TRAIN.labels
        vectors: list[Tensor] = []
        for _ in range(x.shape[1] - 3):
            direction = x[labels == FORGET].mean(0) - x[labels != FORGET].mean(0)
            vectors.append(F.normalize(direction, dim=0))
            x = x - x @ vectors[-1][:, None] * vectors[-1]
            probe = linear(x.float(), (labels == FORGET).long(), x.float(), 0)[:, 1]
            if probe.std() < 0.02:
                break
        basis = torch.linalg.qr(torch.stack(vectors, 1)).Q
        self.register_buffer("kept", (torch.eye(x.shape[1]).double() - basis @ basis.T).float())
        with torch.no_grad():
            self.head.weight[FORGET], self.head.bias[FORGET] = 0, -100

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) @ self.kept)


def perceptron(seed: int, without: int | None = None) -> nn.Sequential:
    """A perceptron trained on the samples, or on those of all classes but one."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(IN_FEATURES, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    split = TRAIN if without is None else TRAIN.retain(without)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(network(split.images), split.labels).backward()
        optimizer.step()
    return network


def hidden(network: nn.Sequential, label: int = FORGET) -> Mask:
    return hiding_mask(network[-1], "4", [label])


def audited(unlearned, **arguments):
    arguments = {"forget_class": FORGET, "test": TESTED} | arguments
    return audit(ORIGINAL, unlearned, TRAIN.images, TRAIN.labels, progress=False, **arguments)


ORIGINAL, *RETRAINED = perceptron(0), *(perceptron(seed, FORGET) for seed in (1, 2, 3))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(subjects, "MOST_STEPS", 10)
    monkeypatch.setattr(auditing, "STEPS", 100)


def test_the_verdicts_of_models_whose_answer_is_known():
    another, references, state = RETRAINED[0], RETRAINED[1:], torch.get_rng_state()
    before = copy.deepcopy(ORIGINAL.state_dict())
    assert audited(copy.deepcopy(ORIGINAL).double()).verdict == audited(hidden(ORIGINAL, 3)).verdict == "not forgotten"
    for retrained in (references, references[0], None):
        report = audited(hidden(ORIGINAL), retrained=retrained)
        assert report.verdict == "hidden" and "own probe still finds" in report.reason
    assert audited(another, retrained=references).verdict in ("as after retraining", "cannot be judged")
    one = audited(another, retrained=references[0])
    assert one.verdict != "hidden" and "how far retrained models differ is unknown" in str(one)
    alone = audited(another)
    assert alone.verdict == "cannot be judged" and "No retrained model" in str(alone)
    assert audited(Erased(ORIGINAL), retrained=references).verdict in ("less than after retraining", "cannot be judged")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in ORIGINAL.state_dict().items())


def test_every_figure_is_that_of_its_definition():
    mask, retrained = hidden(ORIGINAL), RETRAINED[:2]
    report = audited(mask, retrained=retrained, layers="2")
    original, _, after, *others = report.figures.values()
    assert [*report.figures] == ["original", "hidden", "unlearned", "retrained 1", "retrained 2"]
    with mask.applied_to(ORIGINAL):
        labels = ORIGINAL(TEST.images).argmax(1)
    own = TEST.labels == FORGET
    assert after["forget_accuracy"] == 0 == report.figures["hidden"]["forget_accuracy"]
    assert after["retain_accuracy"] == pytest.approx(100 * (labels == TEST.labels)[~own].double().mean().item())
    shares = labels[own].bincount(minlength=CLASSES).double() / own.sum()
    assert all(after["predicted"][str(label)] == pytest.approx(100 * shares[label]) for label in range(CLASSES))
    x, x_test = (ORIGINAL[:4](split.images).detach() for split in (TRAIN, TEST))
    probability = linear(x, TRAIN.labels, x_test, 0, cost=1.0)
    recall = 100 * (probability[own].argmax(1) == FORGET).double().mean().item()
    assert [*after["probes"]] == ["2", "last"] and after["probes"]["last"]["linear"]["recall"] == pytest.approx(recall)
    assert after["probes"]["last"]["original's"]["bits"] == pytest.approx(after["probes"]["last"]["linear"]["bits"])
    assert original["idi"] == report.figures["hidden"]["idi"] == 1
    assert sum(each["idi"] for each in others) == pytest.approx(0, abs=1e-6)
    assert original["divergence_forget"] > others[0]["divergence_forget"] == others[1]["divergence_forget"]
    assert original["relearning"]["all weights"]["steps"] == 0 and after["relearning"]["output layer"]["steps"] is None
    assert after["relearning"]["reset"] == original["relearning"]["reset"]


def test_balanced_bits_weigh_the_class_and_the_others_alike():
    is_class, p = torch.tensor([True] * 2 + [False] * 6), torch.tensor([0.5, 0.1, 0.2, 0.2, 0.1, 0.0, 0.4, 1.0])
    odds = [each / (1 - each) * 3 for each in p.clamp(1e-4, 1 - 1e-4).tolist()]  # the class was a quarter
    losses = [-math.log2(each / (1 + each) if own else 1 / (1 + each)) for each, own in zip(odds, is_class)]
    mean, error = interval(balanced_bits(p, is_class, 0.25), is_class)
    assert mean == pytest.approx(1 - (sum(losses[:2]) / 2 + sum(losses[2:]) / 6) / 2, abs=1e-4) and error > 0
    assert interval(balanced_bits(torch.full((8,), 0.25), is_class, 0.25), is_class)[0] == pytest.approx(0)


def test_samples_come_from_loaders_or_are_held_out_and_few_of_them_do_not_decide():
    loaders = [DataLoader(TensorDataset(*each), 64) for each in ((TRAIN.images, TRAIN.labels), TESTED)]
    whole = audited(hidden(ORIGINAL))
    streamed = audit(ORIGINAL, hidden(ORIGINAL), loaders[0], forget_class=FORGET, test=loaders[1], progress=False)
    assert streamed.figures["unlearned"]["probes"] == whole.figures["unlearned"]["probes"]
    assert whole.figures["unlearned"]["loss_attack"] is not None
    held_out = audited(hidden(ORIGINAL), test=None)
    assert held_out.verdict == "hidden" and held_out.figures["unlearned"]["loss_attack"] is None
    assert "membership is left out" in str(held_out)
    first = torch.cat([(TRAIN.labels == label).nonzero()[:5, 0] for label in range(CLASSES)])
    few = audit(ORIGINAL, hidden(ORIGINAL), TRAIN.images[first], TRAIN.labels[first], forget_class=FORGET)
    assert few.verdict in ("hidden", "cannot be judged")
    several = audited(hidden(ORIGINAL) & hidden(ORIGINAL, 3), forget_class=[FORGET, 3])
    assert several.verdict == "hidden" and str(several).startswith("Classes 1, 3: hidden.")


def test_a_report_is_a_table_json_and_a_figure(tmp_path):
    report = audited(hidden(ORIGINAL), retrained=RETRAINED[:2], layers=["0", "2"])
    lines = str(report).splitlines()
    assert lines[0] == "Class 1: hidden." and max(map(len, lines[2:])) < 180
    report.save(tmp_path / "audit.json")
    saved = json.loads((tmp_path / "audit.json").read_text())
    assert saved["verdict"] == "hidden" and saved["figures"]["unlearned"]["forget_accuracy"] == 0
    report.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes()[1:4] == b"PNG"


def broken(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    network[0].weight.data[0, 0] = math.nan
    return network


class Divided(nn.Module):
    """Gives logits that are no numbers for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = copy.deepcopy(ORIGINAL)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + (x[:, :1] - 3).log() * 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"unlearned": nn.Linear(IN_FEATURES, 4)}, "same classes, but return logits for .*'unlearned': 4"),
        ({"unlearned": nn.Linear(IN_FEATURES + 1, CLASSES)}, "^unlearned: fails on inputs of shape"),
        ({"unlearned": broken(ORIGINAL)}, "^unlearned: 0.weight has numbers that are not finite"),
        ({"unlearned": Divided()}, "^unlearned: .* not finite"),
        ({"unlearned": 3}, "^unlearned must be a torch.nn.Module, not int"),
        ({"retrained": [RETRAINED[0], ORIGINAL]}, "^retrained 2 must be trained without .* classifies"),
        ({"test": TEST.images}, "^test must be a pair of inputs and labels, not Tensor"),
        ({"test": TEST.images[:2]}, "^test must be a pair of inputs and labels, not Tensor"),
        ({"test": (TEST.images[:, 1:], TEST.labels)}, "^test must have inputs of shapes"),
        (
            {"test": (TEST.retain(FORGET).images, TEST.retain(FORGET).labels)},
            "^test must be of class 1 and others, not of classes 0, 2",
        ),
        ({"forget_class": 7}, "from 0 to 4"),
        ({"forget_class": [0, 1, 2, 3, 4]}, "classes to retain"),
        ({"layers": "body"}, "^original: layers must be auto, None, or some of"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        audited(**{"unlearned": hidden(ORIGINAL)} | arguments)
    assert "\n" not in str(error.value)
