"""Data sets on disk; vertex features and first-order updates against autograd."""

import gzip
import hashlib
import os
import pickle
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    IN_FEATURES,
    NUM_CLASSES,
    Group,
    assert_by_hand,
    averaged,
    graph_config,
    graph_generator,
    random_split,
)
from PIL import Image
from running import write_image
from torch import Tensor, nn

from data import FILES, DataError, GraphGenerator, checksum, data_set, load_image_data
from mimu.hooked import HookedClassifier, log_odds
from mimu.layers import FeatureRecord
from mimu.saliency import FEATURES
from mimu.saliency import FORGETTING_TEMPERATURE as T
from mimu.samples import some_of_every_class
from mimu.seeds import seeded
from model import HookedMNISTClassifier

IMAGES, LABELS = torch.arange(30 * 784).view(30, 28, 28) % 251, torch.arange(30) % 10
SIXTY = np.arange(60) % 10  # labels
CLASSES = ("cat", "dog", "eel")
GREY = np.arange(20, dtype=np.uint8).reshape(5, 4)


def write_data_set(root: Path, name="KMNIST", images=IMAGES, labels=LABELS, test_labels=LABELS[:10]) -> Path:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for image_file, label_file, numbers in ((*FILES[:2], labels), (*FILES[2:], test_labels)):
        for file, magic, content in ((image_file, 0x803, images[: len(numbers)]), (label_file, 0x801, numbers)):
            header = b"".join(number.to_bytes(4, "big") for number in (magic, *content.shape))
            (raw / file).write_bytes(header + content.to(torch.uint8).numpy().tobytes())
    return raw


@pytest.mark.parametrize(
    "name, folder, held_out, is_packed",
    [("MNIST", "raw", 0, True), ("FashionMNIST", "raw", 10, False), ("mine", "raw", 0, False), ("mine", ".", 10, True)],
)
def test_files_like_those_of_mnist_are_standardised_by_the_training_split(tmp_path, name, folder, held_out, is_packed):
    images, labels = (IMAGES[:, :5, :4], LABELS % 3) if name == "mine" else (IMAGES, LABELS)
    raw = write_data_set(tmp_path, name, images, labels, labels[:10])
    for path in raw.iterdir():
        target = path.rename(raw.parent / folder / path.name)
        if is_packed:
            content = target.read_bytes()  # of two members
            target.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content[:9]) + gzip.compress(content[9:]))
            target.unlink()
    paths = sorted(tmp_path.rglob("*"))
    identity, source, pixels = checksum(name, tmp_path), data_set(name, tmp_path), images.flatten(1).double()
    assert source.size == images.shape[1:] and len(source.class_names) == labels.max() + 1
    loaded = load_image_data(name, tmp_path, held_out=held_out)
    train, test = (pixels[:20], pixels[20:]) if held_out else (pixels, pixels[:10])
    for split, expected, rows in ((loaded.train, train, labels), (loaded.test, test, labels[20 if held_out else 0 :])):
        standardised = (expected - train.mean()) / train.std()
        assert torch.allclose(split.images, standardised.float(), atol=1e-5)
        assert torch.equal(split.labels, rows[: len(expected)])
    assert checksum(name, tmp_path) == identity != ""
    assert sorted(tmp_path.rglob("*")) == paths, "the folder may be one that is only read"
    with pytest.raises(DataError, match="held_out must be below 30 and leave every class on both sides, not 28"):
        load_image_data(name, tmp_path, held_out=28)


CUT = {FILES[0]: 7, FILES[1]: 0, FILES[2]: -1}  # where
OF_SIZE = r"must be images of \(28, 28\) pixels .* not "
WRONG_FILES = [
    ("KMNIST", {"labels": LABELS.clamp(max=8)}, "", "the training split must .* from 0 to 9, .* 6, 0. labels"),
    ("KMNIST", {"test_labels": LABELS[:9]}, "", "the test split must be .* every class from 0 to 9, .* 1, 0. labels"),
    ("KMNIST", {"images": IMAGES[:, :20]}, "", OF_SIZE + r"\(30, 20, 28\) and \[3"),
    ("KMNIST", {"images": IMAGES[:20]}, "", OF_SIZE + r"\(20, 28, 28\) and \[3, 3"),
    ("mine", {"labels": LABELS * 0, "test_labels": LABELS[:10] * 0}, "", r"two classes at least, .*, not .'0',."),
    ("mine", {"labels": LABELS.clamp(min=1)}, "", r"every class from 0 to 9, not \(30, 28, 28\) and \[0, 6"),
    ("mine", {"test_labels": torch.arange(11)}, "", "the test split must .* from 0 to 9, .* 1, 1. labels"),
    ("mine", {}, FILES[0], "buffer size"),
    ("mine", {}, FILES[1], "cannot be read .index out of range"),
    ("mine", {}, FILES[2], "shape .* is invalid"),
]


@pytest.mark.parametrize("name, changes, cut, message", WRONG_FILES)
def test_files_in_the_format_of_mnist_that_cannot_work_are_refused(tmp_path, name, changes, cut, message):
    raw = write_data_set(tmp_path, name, **changes)
    if cut:
        (raw / cut).write_bytes((raw / cut).read_bytes()[: CUT[cut]])
    with pytest.raises(DataError, match=rf"\Adataset {name} in .*{name}.*: cannot be used .*{message}.*\Z"):
        load_image_data(name, tmp_path)


def test_the_packed_file_is_read_and_what_is_damaged_or_missing_is_named(tmp_path, monkeypatch):
    raw = write_data_set(tmp_path)
    for file in FILES:
        (raw / f"{file}.gz").write_bytes(gzip.compress((raw / file).read_bytes()))
    md5 = [(f"{file}.gz", hashlib.md5((raw / f"{file}.gz").read_bytes()).hexdigest()) for file in FILES]
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", md5)
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", ["file:///nowhere/"])
    identity, packed = checksum("KMNIST", tmp_path), raw / f"{FILES[0]}.gz"
    for file in FILES[:2]:
        (raw / file).write_bytes(b"damaged, but not read")
        assert checksum("KMNIST", tmp_path) == identity != checksum("FashionMNIST", tmp_path) == ""
        (raw / file).unlink()
    assert torch.equal(data_set("KMNIST", tmp_path).read(True)[0], IMAGES)
    assert torch.equal(load_image_data("KMNIST", tmp_path).train.labels, LABELS)

    for spoil, message in (
        (lambda: packed.write_bytes(packed.read_bytes()[:-9]), f".{packed.name} cannot be read .Compressed"),
        (packed.unlink, f".Error downloading {packed.name}"),
    ):
        spoil()
        with pytest.raises(DataError, match=f"dataset KMNIST in .*: cannot be used .*{message}"):
            load_image_data("KMNIST", tmp_path)


def write_cifar10(folder: Path, images: np.ndarray) -> None:
    """Five training batches and a test batch; an image is a row: all of red, of green, of blue."""
    batches = [{"data": some.reshape(10, 3072), "labels": SIXTY[:10].tolist()} for some in np.split(images, 6)]
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in zip(names, [*batches, {"label_names": list("0123456789")}]):
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content))


def test_cifar10_is_read_by_channel_and_downloaded(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), np.uint8)
    original, downloads, name = torchvision.datasets.CIFAR10, [], "CIFAR10"
    download = lambda self: downloads or downloads.append(write_cifar10(tmp_path / name, images))  # noqa: E731
    monkeypatch.setattr(original, "download", download)
    monkeypatch.setattr(original, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    for _ in range(2):
        source, loaded = data_set(name, tmp_path), load_image_data(name, tmp_path)
        assert source.size == (3, 32, 32) and loaded.class_names[3] == "cat" and len(downloads) == 1
    pixels = images.reshape(60, -1).astype(float)
    for split, some in ((loaded.train, slice(50)), (loaded.test, slice(50, 60))):
        expected = (pixels[some] - pixels[:50].mean()) / pixels[:50].std(ddof=1)
        assert np.allclose(split.images, expected, atol=1e-5) and split.labels.tolist() == SIXTY[some].tolist()
    identity = checksum(name, tmp_path)
    (tmp_path / name / "cifar-10-python.tar.gz").touch()
    assert checksum(name, tmp_path) == identity != ""


def write_images(root: Path, shape: tuple[int, ...] = (5, 4)) -> dict[str, np.ndarray]:
    """Writes images of three classes in folders; returns them by their path in the data set, channels first."""
    numbers, images = np.random.default_rng(0), {}
    for part, label, index in product(("train", "test"), CLASSES, range(4)):
        path, image = f"{part}/{label}/{index}.png", numbers.integers(0, 256, shape, np.uint8)
        images[path] = image.transpose(2, 0, 1) if len(shape) == 3 else image
        write_image(root / "pets" / path, image)
    return images


@pytest.mark.parametrize("shape, size", [((5, 4), (5, 4)), ((5, 4, 3), (3, 5, 4))])
def test_images_in_folders_are_a_data_set_of_the_classes_that_their_folders_name(tmp_path, shape, size):
    images = write_images(tmp_path, shape)
    (tmp_path / "pets" / "train" / "cat" / ".hidden").write_text("no image")
    source, loaded = data_set("pets", tmp_path), load_image_data("pets", tmp_path)
    assert source.size == size and loaded.class_names == source.class_names == CLASSES
    train = np.stack([image for path, image in images.items() if path.startswith("train")]).astype(float)
    samples = set()
    for part, split in (("train", loaded.train), ("test", loaded.test)):
        pixels = (split.images.double() * train.std(ddof=1) + train.mean()).round().tolist()
        samples |= {(part, CLASSES[label], *image) for image, label in zip(pixels, split.labels.tolist())}
    assert samples == {(*path.split("/")[:2], *image.ravel().tolist()) for path, image in images.items()}


def test_the_checksum_covers_all_that_is_read(tmp_path):
    images, pets = write_images(tmp_path), tmp_path / "pets"
    path = pets / "train" / "cat" / "0.png"
    identities = [checksum("pets", tmp_path)]
    for change in (
        lambda: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
        lambda: (path.with_name(".hidden")).write_text("a remark"),
        lambda: path.rename(path.with_name("9.png")),
        lambda: Image.fromarray(images["train/eel/1.png"]).save(path),
        lambda: path.write_bytes(bytes(path.stat().st_size)),
        lambda: (pets / "test" / "eel" / "3.png").unlink(),
    ):
        change()
        identities.append(checksum("pets", tmp_path))
    assert len(set(identities[:3])) == 1 and len(set(identities)) == 5


BAD_FOLDERS = [  # files or folders, what takes their place (None: nothing, a string: a name), the message
    ("*", None, "it must hold images in train/<class>/ and test/<class>/, or the four files of MNIST"),
    ("test", None, "it must hold images in train/<class>/ and test/<class>/"),
    ("train/*", None, "class folder in .*train"),
    ("train/eel", None, "have the same classes, not eel in one alone"),
    ("*/[!c]*", None, r"two classes at least, .*, not .'cat',."),
    ("*/cat", "$x$", r"without \$, .*'\$x\$'"),
    ("test/dog/*", None, "no valid file for the classes dog"),
    ("test/dog/1.png", b"\x89PNG", "test/dog/1.png must be an image"),
    ("train/dog/1.png", GREY.T, r"train/dog/1.png is of .4, 5., but .*train/cat/0.png is of .5, 4."),
    ("test/dog/1.png", np.stack([GREY] * 3, 2), r"test/dog/1.png is of .3, 5, 4., but .* is of .5, 4."),
    ("test/dog/1.png", np.stack([GREY] * 4, 2), "1.png must be an image, grey or RGB .* .its mode is RGBA"),
]


@pytest.mark.parametrize("pattern, content, message", BAD_FOLDERS, ids=[message for *_, message in BAD_FOLDERS])
def test_bad_folders_are_one_line_that_says_what_is_wrong(tmp_path, pattern, content, message):
    write_images(tmp_path)
    for path in list((tmp_path / "pets").glob(pattern)):
        if isinstance(content, str):
            path.rename(path.with_name(content))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            write_image(path, content)
        else:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(DataError, match=rf"\Adataset pets in {tmp_path}/pets: .*{message}.*\Z"):
        load_image_data("pets", tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "pets/train", "../outside", "/", "x" * 300, "a\0b", "Graphs", "other"])
def test_a_data_set_is_a_folder_among_the_data_sets_by_its_name(tmp_path, name):
    for folder in ("datasets/pets", "datasets/Graphs", "outside/pets"):
        (tmp_path / folder / "train").mkdir(parents=True)
    (tmp_path / "datasets" / "pets.cache.pt").touch()
    valid = "MNIST, FashionMNIST, KMNIST, CIFAR10, pets, or another folder in .*"
    with pytest.raises(DataError, match=f"^dataset must be {valid}, not"):
        load_image_data(name, tmp_path / "datasets")


@pytest.mark.parametrize("count, expected", [(6, 6), (50, 20)])
def test_some_of_every_class_are_different_samples_of_each_that_is_there(split, count, expected):
    some = some_of_every_class(split.retain(1), count, "test")
    assert some.labels.tolist() == [0] * expected + [2] * expected
    label_of = {tuple(image): label for image, label in zip(split.images.tolist(), split.labels.tolist())}
    rows = [tuple(image) for image in some.images.tolist()]
    assert [label_of[row] for row in rows] == some.labels.tolist() and len(set(rows)) == len(rows)
    for key, is_same in ((("test",), True), (("other",), False), (("test", 1), False)):
        assert torch.equal(some_of_every_class(split.retain(1), count, *key).images, some.images) == is_same


def test_draws_take_samples_of_their_class_without_repetition_and_no_more_than_there_are(split):
    graphs = graph_generator(samples_per_class=1000)
    for samples, count in ((graphs.draw(10, seeded("test")), 10), (graphs.by_class, 20)):
        assert torch.equal(graphs.labels[samples], torch.arange(NUM_CLASSES)[:, None].expand(-1, count))
        assert len(samples.unique()) == 3 * count
    with pytest.raises(ValueError, match="there must be samples of two classes at least, not of .1. alone"):
        GraphGenerator(graphs.classifier, split.forget(1), graphs.config, 0)


EVERY = [0, 1, 2, 3]


def graphs_of(present: list[int], mask_layer: int | None = -2, size: tuple[int, ...] = ()) -> GraphGenerator:
    """Graphs of a multilayer perceptron, or of depthwise and grouped convolutions that read images of a size."""
    torch.manual_seed(0)
    split = random_split(dtype=torch.float64, num_classes=4)
    split = split[torch.isin(split.labels, torch.tensor(present))]
    classifier = HookedMNISTClassifier((6, 5), IN_FEATURES, 4)
    if size:
        first, grouped = nn.Conv2d(size[0], 14, 3, 1, 1, groups=size[0]), nn.Conv2d(14, 6, 3, 1, 1, groups=2)
        last = nn.Linear(42 // size[0], 4)
        layers = nn.Unflatten(1, size), first, nn.ReLU(), grouped, nn.ReLU(), nn.Flatten(), last
        classifier = HookedClassifier(nn.Sequential(*layers), split.images[:2].float())
    return GraphGenerator(classifier.double(), split, graph_config(mask_layer), 0)


# What is zeroed, the classes of which there are samples, what the softmax is restricted to, and the samples.
GROUPS = [
    ([], EVERY, 1, [0, 2, 3], EVERY, [0, 1, 2, 3, 4]),
    ([0, 3, 17], [0, 1, 3], 0, [1, 3], EVERY, [0, 1, 0, 2, 0]),
    ([0, 3, 17], [0, 3], 1, [0, 3], [0, 3], [0, 1, 2, 3, 4]),  # a single other class is seen among both
]


@pytest.mark.parametrize("zeroed, present, class_index, others_among, own_among, columns", GROUPS)
def test_features_are_those_of_autograd(zeroed, present, class_index, others_among, own_among, columns):
    graphs = graphs_of(present)
    samples, zeroed = graphs.draw(5, seeded("test"))[:, columns], torch.tensor(zeroed, dtype=torch.long)
    snapshot = graphs.snapshot(samples, class_index, zeroed, tuple(FEATURES))
    among = {class_index: own_among}
    groups = [Group(graphs, zeroed, chosen, among.get(row, others_among)) for row, chosen in enumerate(samples)]
    assert graphs.classes == present and groups[0].features().keys() == FEATURES.keys()
    assert_by_hand(snapshot, groups.pop(class_index), groups)
    numbers_run = [sum(len(record.log_odds) for record in records) for records in snapshot.records]
    assert numbers_run == [len({*columns}), len({*columns}) * len(groups)], "a sample that repeats is run once"
    assert len(zeroed) or snapshot.feature("retention", snapshot.retained).abs().max() == 0, "nothing is lost yet"


def test_log_odds_of_labels_that_are_left_out_or_all_but_certain():
    logits = torch.tensor([[900.0, 0.0, 30.0], [-900.0, 1.0, 4.0], [1.0, 2.0, 4.0]], dtype=torch.float64)
    without_one = log_odds(logits, torch.tensor([0, 0, 2]), [1])
    assert torch.allclose(without_one, torch.tensor([870.0, -904.0, 3.0], dtype=torch.float64), atol=1e-12)
    p = logits.softmax(1)[2, 1]
    whole = log_odds(logits, torch.tensor([1, 2, 1]), [1])
    assert whole[:2].tolist() == [-900, 904] and torch.allclose(whole[2], (p / (1 - p)).log())


@pytest.mark.parametrize("mask_layer, last, size", [(-2, 25, ()), (-2, 373, (7, 1, 1)), (None, 290, (1, 7, 1))])
def test_a_first_order_update_is_linear_in_what_it_zeroes(mask_layer, last, size):
    graphs, zeroed, further = graphs_of(EVERY, mask_layer, size), torch.tensor([3, 8]), [0, 11, last]
    samples = graphs.draw(3, seeded("test"))[:, [0, 1, 2, 1]]
    before = graphs.snapshot(samples, 2, zeroed, tuple(FEATURES))
    update = before.first_order_update(torch.tensor([0, 11])).first_order_update(torch.tensor([last]))
    weight = before.feature("weight", before.own)
    w = weight.index_fill(0, torch.tensor(further), 0.0)
    assert torch.equal(update.feature("weight", update.own), w)
    own, others = Group(graphs, zeroed, samples[2], EVERY), []
    for row in (0, 1, 3):
        others.append(Group(graphs, zeroed, samples[row], [0, 1, 3]))
    for sums, before_sums, groups, each_odds in (
        (update.own, before.own, [own], update.log_odds[:1]),
        (update.others, before.others, others, update.log_odds[1]),
    ):
        g = torch.cat([group.gradients(group.log_odds) for group in groups])
        odds = torch.cat([group.log_odds.detach() for group in groups]) - g[:, further] @ weight[further]
        assert torch.allclose(torch.cat([*each_odds]), odds, atol=1e-9)
        p, t = odds.sigmoid()[:, None], torch.cat([group.t for group in groups])[:, None]
        factors = {"taylor": p - 1, "forgetting": (odds / T).sigmoid()[:, None], "retention": p - t}
        for name, factor in factors.items():
            assert torch.allclose(update.feature(name, sums), w * (factor * g).mean(0), atol=1e-9), name
        curvature = w.abs() * (p * (1 - p) * g**2).mean(0).sqrt()
        assert torch.allclose(update.feature("curvature", sums), curvature, atol=1e-9)
        unchanged = (each.feature("input_activation", means) for each, means in ((update, sums), (before, before_sums)))
        assert torch.equal(*unchanged)


def class_graph_by_hand(own: dict[str, Tensor], retained: dict[str, Tensor]) -> Tensor:
    """A class's features, then their means over the other classes (but the weight), standardised per feature."""
    x = torch.stack([*own.values(), *(retained[name] for name in own if name != "weight")], 1)
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-12)


@pytest.mark.parametrize("zeroed", [[], [0, 3, 17]])
def test_class_graphs_are_the_features_and_their_means_over_the_other_classes_standardised(zeroed):
    graphs, some = (graph_generator(-2, torch.float64, **each) for each in ({}, {"features": ("weight", "taylor")}))
    samples, zeroed = graphs.draw(5, seeded("test")), torch.tensor(zeroed, dtype=torch.long)
    by_class = [Group(graphs, zeroed, chosen, [0, 1, 2]) for chosen in samples]
    for row, own in enumerate(by_class):
        others = averaged(by_class[:row] + by_class[row + 1 :], torch.full((2,), 0.5, dtype=torch.float64))
        expected = class_graph_by_hand(own.features(), others)
        assert expected.shape == (30, 17) == (30, graphs.config.num_features)
        for each, columns in ((graphs, range(17)), (some, [2, 4, 12])):
            x = each.snapshot(samples, row, zeroed, each.config.features, forgets=False).class_graph()
            assert torch.allclose(x, expected[None, :, columns], atol=1e-9)
    alone = graph_generator(-2, torch.float64, features=("weight", "taylor"), other_classes=False)
    x = alone.snapshot(samples, 2, zeroed, alone.config.features, forgets=False).class_graph()
    assert alone.config.num_features == 2 and torch.allclose(x[0], expected[:, [2, 4]], atol=1e-9)


def test_get_data_is_the_graph_of_one_sample_beside_the_other_classes():
    graphs = graph_generator(-2, torch.float64)
    groups = torch.tensor([20]), *graphs.by_class[[0, 2]]
    own, *others = (Group(graphs, graphs.nothing, samples, [0, 1, 2]) for samples in groups)
    data, edges = graphs.get_data(20, graphs.graph.num_edges), graphs.graph.num_edges
    retained = averaged(others, torch.full((2,), 0.5, dtype=torch.float64))
    expected = class_graph_by_hand(own.features(), retained)
    assert torch.allclose(data.x, expected, atol=1e-9) and data.y.tolist() == [1] and data.validate()
    assert torch.equal(data.edge_index, graphs.graph.edge_index()) and data.edge_index.shape == (2, edges)
    with pytest.raises(IndexError, match="^index 45 is out of bounds"):
        graphs.get_data(45, edges)
    with pytest.raises(ValueError, match=rf"max_edges must be at least {edges:,} \(.* GB\), not {edges - 1:,}"):
        graphs.get_data(0, edges - 1)


def test_all_layers_are_recorded():
    graphs = graph_generator(None)
    logits, recorded = graphs.classifier(graphs.samples.images), graphs.recorded()
    layers = [FeatureRecord(**record) for record in recorded["records"]]
    assert torch.equal(layers[-1].outputs, logits) and (logits < 0).any(), "the output layer has no ReLU"
    assert layers[-1].active.min() == 1 and set(layers[0].active.unique().tolist()) == {0.0, 1.0}
    assert recorded["layers"] == [0, 1, 2] and torch.equal(recorded["labels"], graphs.labels)
    assert torch.equal(recorded["log_odds"], log_odds(logits, graphs.labels))
