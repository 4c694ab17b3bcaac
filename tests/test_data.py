"""Data sets on the disk; vertex features and first-order updates against autograd, one sample at a time."""

import copy
import gzip
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import HIDDEN, IN_FEATURES, NUM_CLASSES, graph_config, graph_generator, random_split
from PIL import Image
from running import PROJECT, write_image
from scipy.io import savemat
from torch import Tensor

from mimu.data import (
    FEATURES,
    FORGETTING_TEMPERATURE,
    GraphGenerator,
    ImageData,
    load_image_data,
    seeded,
    some_of_every_class,
)
from mimu.images.sources import FILES, DataError, checksum, data_set
from mimu.model import HookedMNISTClassifier
from mimu.networks.hooked import LayerRecord, log_odds
from mimu.runs.files import save


def test_mnist_is_the_original():
    images = load_image_data("MNIST")
    assert images.train.images.shape == (60000, 784) and images.test.images.shape == (10000, 784)
    assert torch.bincount(images.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.class_names == tuple("0123456789")
    with pytest.raises(DataError, match="must be MNIST, FashionMNIST, KMNIST.*, or another folder .*, not 'CIFAR100'"):
        load_image_data("CIFAR100")


IMAGES, LABELS = torch.arange(30 * 784).view(30, 28, 28) % 251, torch.arange(30) % 10
SIXTY = np.arange(60) % 10  # labels


def write_data_set(root: Path, name="KMNIST", images=IMAGES, labels=LABELS, test_labels=LABELS[:10]) -> Path:
    """A data set of ones own, unpacked, in the format of MNIST."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, of_part in (("train", labels), ("t10k", test_labels)):
        pictures = images[: len(of_part)].to(torch.uint8)
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, *pictures.shape))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pictures.numpy().tobytes())
        header = b"".join(number.to_bytes(4, "big") for number in (0x801, len(of_part)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + of_part.to(torch.uint8).numpy().tobytes())
    return raw


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
@pytest.mark.parametrize("held_out", [0, 10])
def test_a_data_set_is_standardised_by_its_training_split(tmp_path, name, held_out):
    write_data_set(tmp_path, name)
    own, pixels = load_image_data(name, tmp_path, held_out=held_out), IMAGES.flatten(1).double()
    count = 30 - held_out
    train, test = (pixels[:20], pixels[20:]) if held_out else (pixels, pixels[:10])
    for found, expected in ((own.train, train), (own.test, test)):
        standardised = (expected - train.mean()) / train.std()
        assert torch.allclose(found.images, standardised.float(), atol=1e-5)
    assert torch.equal(own.train.labels, LABELS[:count]) and torch.equal(own.test.labels, torch.arange(10))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "KMNIST",
            {"labels": LABELS.clamp(max=8)},
            "the training split must be .* every class from 0 to 9, .* 6, 0. labels",
        ),
        ("KMNIST", {"test_labels": LABELS[:9]}, "the test split must be .* every class from 0 to 9, .* 1, 0. labels"),
        ("KMNIST", {"labels": LABELS + 1}, r"every class from 0 to 9, .* \[0, 3, .* 3, 3\] labels"),
        ("KMNIST", {"images": IMAGES[:, :20]}, r"must be images of \(28, 28\) pixels .* not \(30, 20, 28\) and \[3, 3"),
        ("KMNIST", {"images": IMAGES[:20]}, r"must be images of \(28, 28\) pixels .* not \(20, 28, 28\) and \[3, 3"),
        ("mine", {"labels": LABELS * 0, "test_labels": LABELS[:10] * 0}, r"two classes at least, .*, not .'0',."),
        ("mine", {"labels": LABELS.clamp(min=1)}, r"every class from 0 to 9, not \(30, 28, 28\) and \[0, 6"),
        ("mine", {"images": IMAGES[:29]}, r"must be images of .28, 28. pixels .*, not \(29, 28, 28\) and \[3"),
        (
            "mine",
            {"test_labels": LABELS[:10] % 9},
            "the test split must be images of .28, 28. pixels and every class from 0",
        ),
        ("mine", {"test_labels": torch.arange(11)}, "the test split must .* from 0 to 9, .* 1, 1. labels"),
    ],
)
def test_files_in_the_format_of_mnist_that_cannot_work_are_refused(tmp_path, name, changes, message):
    write_data_set(tmp_path, name, **changes)
    with pytest.raises(DataError, match=f"^dataset {name} in .*{name}.*: cannot be used .*{message}"):
        load_image_data(name, tmp_path)


def test_what_is_damaged_is_unpacked_anew_or_named(tmp_path, monkeypatch):
    raw = write_data_set(tmp_path)
    unpacked = checksum("KMNIST", tmp_path)
    assert unpacked and checksum("FashionMNIST", tmp_path) == ""
    for file in FILES:
        (raw / f"{file}.gz").write_bytes(gzip.compress((raw / file).read_bytes()))
    assert checksum("KMNIST", tmp_path) == unpacked, "as they end a packed file"
    md5 = [(f"{file}.gz", hashlib.md5((raw / f"{file}.gz").read_bytes()).hexdigest()) for file in FILES]
    monkeypatch.setattr(torchvision.datasets.KMNIST, "resources", md5)
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", ["file:///nowhere/"])
    images, labels = raw / FILES[0], raw / FILES[1]
    whole = images.read_bytes()
    images.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert checksum("KMNIST", tmp_path) == unpacked, "it is not what is read"
    load_image_data("KMNIST", tmp_path)
    assert images.read_bytes() == whole
    labels.unlink()
    assert torch.equal(load_image_data("KMNIST", tmp_path).train.labels, LABELS)
    images.write_bytes(b"nothing")
    (raw / f"{FILES[0]}.gz").unlink()
    with pytest.raises(DataError, match="dataset KMNIST in .*: cannot be used"):
        load_image_data("KMNIST", tmp_path)
    images.unlink()
    with pytest.raises(DataError, match=f"dataset KMNIST in .*: cannot be .* .Error downloading {FILES[0]}.gz"):
        load_image_data("KMNIST", tmp_path)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("folder", ["raw", "."])
def test_files_in_the_format_of_mnist_may_have_any_size_and_number_of_classes(tmp_path, folder, is_packed):
    images, labels = IMAGES[:, :5, :4], torch.arange(30) % 3
    raw = write_data_set(tmp_path, "mine", images, labels, labels[:10])
    for path in raw.iterdir():
        target = raw.parent / folder / path.name
        path.rename(target)
        if is_packed:
            target.with_name(f"{path.name}.gz").write_bytes(gzip.compress(target.read_bytes()))
            target.unlink()
    before, source = checksum("mine", tmp_path), data_set("mine", tmp_path)
    assert source.size == (5, 4) and source.class_names == ("0", "1", "2")
    own, pixels = load_image_data("mine", tmp_path), images.flatten(1).double()
    for found, count in ((own.train, 30), (own.test, 10)):
        expected = (pixels[:count] - pixels.mean()) / pixels.std()
        assert torch.allclose(found.images, expected.float(), atol=1e-5) and torch.equal(found.labels, labels[:count])
    assert checksum("mine", tmp_path) == before != "", "unpacked or not"
    with pytest.raises(DataError, match="held_out must be below 30 and leave every class on both sides, not 28"):
        load_image_data("mine", tmp_path, held_out=28)


def write_cifar10(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Five batches and one of test, each of its images in rows: all of red, of green, of blue."""
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    batches = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    content = {
        name: {"data": some.reshape(10, 3072), "labels": labels[:10].tolist()}
        for name, some in zip(batches, np.split(images, 6))
    }
    for name, batch in (content | {"batches.meta": {"label_names": list("0123456789")}}).items():
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))


def write_svhn(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """A file of each split, its samples along the last axis, and zeros under the label 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, some in (("train", slice(50)), ("test", slice(50, 60))):
        of_part = {"X": images[some].transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[some, None]}
        savemat(folder / f"{part}_32x32.mat", of_part)


@pytest.mark.parametrize("name, write, third", [("CIFAR10", write_cifar10, "cat"), ("SVHN", write_svhn, "3")])
def test_the_originals_in_colour_are_read_channel_by_channel_and_downloaded_where_they_are_missing(
    tmp_path, monkeypatch, name, write, third
):
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), np.uint8)
    downloads, original = [], getattr(torchvision.datasets, name)
    monkeypatch.setattr(original, "download", lambda self: downloads.append(write(tmp_path / name, images, SIXTY)))
    monkeypatch.setattr(original, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    for _ in range(2):
        source, own = data_set(name, tmp_path), load_image_data(name, tmp_path)
        assert source.size == (3, 32, 32) and own.class_names[3] == third and len(downloads) == 1
        pixels = images.reshape(60, -1).astype(float)
        for split, some in ((own.train, slice(50)), (own.test, slice(50, 60))):
            expected = (pixels[some] - pixels[:50].mean()) / pixels[:50].std(ddof=1)
            assert np.allclose(split.images, expected, atol=1e-5) and split.labels.tolist() == SIXTY[some].tolist()
    identity = checksum(name, tmp_path)
    (tmp_path / name / "cifar-10-python.tar.gz").touch()
    assert checksum(name, tmp_path) == identity != ""
    monkeypatch.setitem(sys.modules, "scipy", None)
    if name == "SVHN":
        with pytest.raises(DataError, match="^dataset SVHN in .*: its files are read by scipy, install it .*scipy.$"):
            data_set(name, tmp_path)


CLASSES = ("cat", "dog", "eel")


def write_images(root: Path, shape: tuple[int, ...] = (5, 4), per_class: int = 4) -> dict[str, np.ndarray]:
    """Images of three classes, in folders; returns them by their path in the data set, in colour channels first."""
    numbers, images = np.random.default_rng(0), {}
    for part, label, index in product(("train", "test"), CLASSES, range(per_class)):
        path, image = f"{part}/{label}/{index}.png", numbers.integers(0, 256, shape, np.uint8)
        images[path] = image.transpose(2, 0, 1) if len(shape) == 3 else image
        write_image(root / "pets" / path, image)
    return images


@pytest.mark.parametrize("shape, size", [((5, 4), (5, 4)), ((5, 4, 3), (3, 5, 4))])
def test_images_in_folders_are_a_data_set_of_the_classes_that_their_folders_name(tmp_path, shape, size):
    images = write_images(tmp_path, shape)
    (tmp_path / "pets" / "train" / "cat" / ".hidden").write_text("no image")
    source, own = data_set("pets", tmp_path), load_image_data("pets", tmp_path)
    assert source.size == size and own.class_names == source.class_names == CLASSES
    mean, deviation = own.train.images.mean(), own.train.images.std()
    assert abs(mean) < 1e-5 and abs(deviation - 1) < 1e-5
    train = np.stack([image for path, image in images.items() if path.startswith("train")]).astype(float)
    for part, split in (("train", own.train), ("test", own.test)):
        pixels = split.images.double() * train.std(ddof=1) + train.mean()
        found = {(CLASSES[label], tuple(image.round().tolist())) for image, label in zip(pixels, split.labels.tolist())}
        of_part = {path: image for path, image in images.items() if path.startswith(part)}
        assert found == {(path.split("/")[1], tuple(image.ravel().tolist())) for path, image in of_part.items()}
    held_out = load_image_data("pets", tmp_path, held_out=6)
    assert held_out.train.labels.unique().tolist() == held_out.test.labels.unique().tolist() == [0, 1, 2]


def test_what_says_which_images_they_are_covers_all_that_is_read(tmp_path):
    images = write_images(tmp_path)
    pets, before = tmp_path / "pets", checksum("pets", tmp_path)
    (pets / "train" / "cat" / ".hidden").write_text("a remark")
    shutil.copytree(pets, tmp_path / "elsewhere" / "pets")
    assert checksum("pets", tmp_path) == checksum("pets", tmp_path / "elsewhere") == before
    path = pets / "test" / "eel" / "3.png"
    changed = images["test/eel/3.png"].copy()
    changed[0, 0] ^= 1
    Image.fromarray(changed).save(path)
    one_pixel = checksum("pets", tmp_path)
    path.rename(pets / "test" / "dog" / "4.png")
    moved = checksum("pets", tmp_path)
    (pets / "test" / "dog" / "4.png").unlink()
    assert len({before, one_pixel, moved, checksum("pets", tmp_path)}) == 4


def same(one: ImageData, other: ImageData) -> bool:
    pairs = ((one.train, other.train), (one.test, other.test))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


def refuse(*arguments: object) -> None:
    raise AssertionError("a file is read again")


def test_a_folder_is_read_once_and_then_from_the_cache_beside_it_until_a_file_changes(tmp_path, monkeypatch):
    images, datasets = write_images(tmp_path / "datasets"), tmp_path / "datasets"
    pets, cache, identity = datasets / "pets", datasets / "pets.cache.pt", checksum("pets", datasets)
    first, source = load_image_data("pets", datasets), data_set("pets", datasets)
    assert cache.is_file()
    with monkeypatch.context() as patched:
        patched.setattr("mimu.images.sources.pixels", refuse)
        patched.setattr("mimu.images.sources.crc", refuse)
        assert [len(source.read(is_train)[1]) for is_train in (True, False)] == [12, 12]
        assert checksum("pets", datasets) == identity
    assert same(load_image_data("pets", datasets), first)
    path, other = pets / "train" / "cat" / "0.png", pets / "train" / "dog" / "0.png"
    time = other.stat().st_mtime_ns
    for change in (
        lambda: (other.write_bytes(other.read_bytes() + b"more"), os.utime(other, ns=(time, time))),
        lambda: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
        lambda: path.rename(path.with_name("9.png")),
        lambda: Image.fromarray(images["train/eel/1.png"]).save(path),
        lambda: (pets / "test" / "eel" / "3.png").unlink(),
    ):
        before = cache.read_bytes()
        change()
        copy = tmp_path / f"copy of {len(list(tmp_path.iterdir()))}"
        shutil.copytree(pets, copy / "pets")
        for _ in range(2):
            assert checksum("pets", datasets) == checksum("pets", copy)
            assert same(load_image_data("pets", datasets), load_image_data("pets", copy))
        assert cache.read_bytes() != before
    shutil.copy(PROJECT / "clean.sh", tmp_path)
    subprocess.run(["bash", str(tmp_path / "clean.sh")], check=True)
    assert [path.name for path in datasets.iterdir()] == ["pets"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda cache: cache.write_bytes(cache.read_bytes()[:-100]),
        lambda cache: cache.write_bytes(b"mine"),
        lambda cache: torch.save([1], cache),
        lambda cache: save(cache, {"version": torch.arange(3), "splits": {}}),
        lambda cache: (cache.unlink(), cache.mkdir()),
    ],
)
def test_a_cache_that_is_damaged_or_foreign_is_made_anew_and_one_that_cannot_be_written_left_out(tmp_path, spoil):
    write_images(tmp_path)
    first, identity, cache = load_image_data("pets", tmp_path), checksum("pets", tmp_path), tmp_path / "pets.cache.pt"
    whole = cache.read_bytes()
    spoil(cache)
    assert checksum("pets", tmp_path) == identity and same(load_image_data("pets", tmp_path), first)
    assert cache.is_dir() or cache.read_bytes() == whole


def replaced(path: Path, image: np.ndarray | bytes) -> None:
    path.unlink()
    path.write_bytes(image) if isinstance(image, bytes) else Image.fromarray(image).save(path)


GREY = np.arange(20, dtype=np.uint8).reshape(5, 4)
BAD_FOLDERS = {
    "empty": (shutil.rmtree, "it must hold images in train/<class>/ and test/<class>/, or the four files of MNIST"),
    "no test": (lambda pets: shutil.rmtree(pets / "test"), "it must hold images in train/<class>/ and test/<class>/"),
    "no class": (lambda pets: [shutil.rmtree(pets / "train" / name) for name in CLASSES], "class folder in .*train"),
    "only in train": (lambda pets: shutil.rmtree(pets / "test" / "dog"), "have the same classes, not dog in one alone"),
    "only in test": (lambda pets: shutil.rmtree(pets / "train" / "eel"), "have the same classes, not eel in one alone"),
    "one class": (
        lambda pets: [shutil.rmtree(pets / part / name) for part in ("train", "test") for name in CLASSES[1:]],
        r"two classes at least, .*, not .'cat',.",
    ),
    "name": (
        lambda pets: [(pets / part / "cat").rename(pets / part / "$x$") for part in ("train", "test")],
        r"named without \$, . and line breaks, not .'\$x\$'",
    ),
    "no image": (
        lambda pets: [path.unlink() for path in (pets / "test" / "dog").iterdir()], "no valid file for the classes dog"
    ),
    "damaged": (lambda pets: replaced(pets / "test" / "dog" / "1.png", b"\x89PNG"), "test/dog/1.png must be an image"),
    "truncated": (
        lambda pets: replaced(pets / "test" / "dog" / "1.png", (pets / "test" / "dog" / "1.png").read_bytes()[:-30]),
        "test/dog/1.png must be an image",
    ),
    "size": (
        lambda pets: replaced(pets / "train" / "dog" / "1.png", GREY.T),
        r"train/dog/1.png is of .4, 5., but .*train/cat/0.png is of .5, 4.",
    ),
    "colour": (
        lambda pets: replaced(pets / "test" / "dog" / "1.png", np.stack([GREY] * 3, 2)),
        r"test/dog/1.png is of .3, 5, 4., but .*train/cat/0.png is of .5, 4.",
    ),
    "mode": (
        lambda pets: replaced(pets / "test" / "dog" / "1.png", np.stack([GREY] * 4, 2)),
        "test/dog/1.png must be an image, grey or RGB of 8 bits: its mode is RGBA",
    ),
    "alike": (
        lambda pets: [replaced(path, 0 * GREY) for path in pets.glob("train/*/*")], "all pixels of the training split"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_one_line_that_says_what_is_wrong(tmp_path, case):
    write_images(tmp_path)
    spoil, message = BAD_FOLDERS[case]
    spoil(tmp_path / "pets")
    (tmp_path / "pets").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=f"^dataset pets in {tmp_path}/pets: .*{message}") as error:
        load_image_data("pets", tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_bad_files_in_the_format_of_mnist_are_one_line(tmp_path):
    raw = write_data_set(tmp_path, "mine")
    for file, damage, message in (
        (FILES[2], lambda content: content[:-1], "shape .* is invalid"),
        (FILES[1], lambda content: b"", "empty"),
        (FILES[0], lambda content: content[:7], "buffer size"),
    ):
        (raw / file).write_bytes(damage((raw / file).read_bytes()))
        with pytest.raises(DataError, match=f"^dataset mine in .*: cannot be used .*{message}") as error:
            load_image_data("mine", tmp_path)
        assert len(str(error.value).splitlines()) == 1
    (raw / FILES[3]).unlink()
    with pytest.raises(DataError, match="^dataset mine in "):
        load_image_data("mine", tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "pets/train", "../outside", "/", "x" * 300, "a\0b", "Graphs", "other"])
def test_a_data_set_is_a_folder_among_the_data_sets_by_its_name(tmp_path, name):
    write_images(tmp_path / "datasets")
    write_images(tmp_path / "outside")
    (tmp_path / "datasets" / "Graphs").mkdir()
    (tmp_path / "datasets" / "pets.cache.pt").touch()
    valid = "MNIST, FashionMNIST, KMNIST, CIFAR10, SVHN, pets, or another folder in .*"
    with pytest.raises(DataError, match=f"^dataset must be {valid}, not"):
        load_image_data(name, tmp_path / "datasets")


def test_seeds_depend_on_their_whole_key():
    draws = [torch.rand(3, generator=seeded(*key)).tolist() for key in (("a", 1), ("a", 1), ("a", 2), ("b", 1))]
    assert draws[0] == draws[1] and draws[0] != draws[2] != draws[3] != draws[0]


@pytest.mark.parametrize("count, expected", [(6, 6), (50, 20)])
def test_some_of_every_class_are_different_samples_of_each_that_is_there(split, count, expected):
    some = some_of_every_class(split.retain(1), count, "test")
    assert some.labels.tolist() == [0] * expected + [2] * expected
    label_of = {tuple(image): label for image, label in zip(split.images.tolist(), split.labels.tolist())}
    rows = [tuple(image) for image in some.images.tolist()]
    assert [label_of[row] for row in rows] == some.labels.tolist() and len(set(rows)) == len(rows)
    assert not torch.equal(some_of_every_class(split.retain(1), count, "other").images, some.images)


def test_draws_take_samples_of_their_class_without_repetition_and_no_more_than_there_are(split):
    graphs = graph_generator(samples_per_class=1000)
    for samples, count in ((graphs.draw(10, seeded("test")), 10), (graphs.by_class(), 20)):
        assert torch.equal(graphs.labels[samples], torch.arange(NUM_CLASSES)[:, None].expand(-1, count))
        assert all(len(set(group.tolist())) == count for group in samples)
    with pytest.raises(ValueError, match="there must be samples of two classes at least, not of .1. alone"):
        GraphGenerator(graphs.classifier, split.forget(1), graphs.config, 0)


def probability(model: HookedMNISTClassifier, x: Tensor, label: int, among: list[int]) -> Tensor:
    """Of a label, by the softmax restricted to some classes."""
    return model(x[None])[0, among].softmax(0)[among.index(label)]


def sample_gradients(masked: HookedMNISTClassifier, values: list[Tensor]) -> Tensor:
    """The gradients of values by the middle weight, (values, m, n)."""
    weight = masked.layers[1].weight
    return torch.stack([torch.autograd.grad(value, weight, retain_graph=True)[0] for value in values])


def features_by_hand(
    original: HookedMNISTClassifier, masked: HookedMNISTClassifier, images: Tensor, label: int, among: list[int]
) -> dict[str, Tensor]:
    """The features of the middle layer, of samples of one class, by their definitions, (vertices)."""
    p = [probability(masked, x, label, among) for x in images]
    keeps = [probability(original, x, label, among).detach() for x in images]
    losses = [-each.log() for each in p]
    log_odds = [(each / (1 - each)).log() for each in p]
    tempered = [FORGETTING_TEMPERATURE * (1 + (each / FORGETTING_TEMPERATURE).exp()).log() for each in log_odds]
    retained = [-t * each.log() - (1 - t) * (1 - each).log() for t, each in zip(keeps, p)]
    loss, forgetting, retention = (sample_gradients(masked, each).mean(0) for each in (losses, tempered, retained))
    variance = torch.stack([(each * (1 - each)).detach() for each in p])[:, None, None]
    curvature = (variance * sample_gradients(masked, log_odds) ** 2).mean(0)
    w0, w1 = (layer.weight.detach() for layer in masked.layers[:2])
    a = (images @ w0.T).relu()
    z = a @ w1.T
    found = {
        "input_activation": a.mean(0).expand_as(w1),
        "output_activation": z.relu().mean(0)[:, None].expand_as(w1),
        "weight": w1,
        "gradient": loss,
        "taylor": w1 * loss,
        "forgetting": w1 * forgetting,
        "retention": w1 * retention,
        "curvature": w1.abs() * curvature.sqrt(),
        "coactivation": w1.abs() * ((z > 0)[:, :, None] * a[:, None]).mean(0),
    }
    return {name: feature.flatten() for name, feature in found.items()}


def masked_for_good(graphs: GraphGenerator, zeroed: list[int]) -> HookedMNISTClassifier:
    model = copy.deepcopy(graphs.classifier)
    graphs.graph.zeroing(torch.tensor(zeroed, dtype=torch.long)).apply(model, permanent=True)
    return model


EVERY = [0, 1, 2]


@pytest.mark.parametrize(
    "zeroed, present, forget_class, others_among, own_among, count",
    [
        ([], [0, 1, 2, 3], None, [0, 1, 2, 3], None, 5),
        ([0, 3, 17], [0, 1, 2, 3], None, [0, 1, 2, 3], None, 5),
        ([], [0, 1, 2, 3], 1, [0, 2, 3], [0, 1, 2, 3], 1),
        ([0, 3, 17], [0, 1, 3], 0, [1, 3], [0, 1, 2, 3], 5),
        ([0, 3, 17], [0, 3], None, [0, 1, 2, 3], None, 1),
        ([0, 3, 17], [0, 3], 3, [0, 3], [0, 3], 5),  # a single other class is seen among both
    ],
)
def test_features_are_those_of_autograd_one_sample_at_a_time(
    zeroed, present, forget_class, others_among, own_among, count
):
    torch.manual_seed(0)
    classifier, split = HookedMNISTClassifier(HIDDEN, IN_FEATURES, 4).double(), random_split(20, 0, torch.float64, 4)
    split = split[torch.isin(split.labels, torch.tensor(present))]
    graphs = GraphGenerator(classifier, split, graph_config(), 0)
    samples, mask = graphs.draw(count, seeded("test")), graphs.mask_of(torch.tensor(zeroed, dtype=torch.long))
    row = None if forget_class is None else graphs.row_of(forget_class)
    snapshot, masked = graphs.snapshot(samples, tuple(FEATURES), mask, row), masked_for_good(graphs, zeroed)
    assert graphs.classes == present
    for label, chosen in zip(present, samples):
        images, among = graphs.samples.images[chosen], own_among if label == forget_class else others_among
        p = torch.stack([probability(masked, x, label, among) for x in images])
        log_odds, loss = snapshot.log_odds[graphs.row_of(label)], snapshot.loss[graphs.row_of(label)]
        assert torch.allclose(log_odds, (p / (1 - p)).log(), atol=1e-9) and torch.allclose(loss, -p.log().mean())
        by_hand = features_by_hand(classifier, masked, images, label, among)
        assert by_hand.keys() == FEATURES.keys()
        for name, expected in by_hand.items():
            found = snapshot.feature(name)[graphs.row_of(label)]
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), name
    if mask is None:
        assert snapshot.feature("retention").abs().max() == 0, "nothing is lost yet"


def test_log_odds_of_labels_that_are_left_out_or_all_but_certain():
    logits = torch.tensor([[900.0, 0.0, 30.0], [-900.0, 1.0, 4.0], [1.0, 2.0, 4.0]], dtype=torch.float64)
    found = log_odds(logits, torch.tensor([0, 0, 2]), [1])
    assert torch.allclose(found, torch.tensor([870.0, -904.0, 3.0], dtype=torch.float64), atol=1e-12)
    whole = log_odds(logits, torch.tensor([1, 2, 1]), [1])
    p = logits.softmax(1)[2, 1]
    assert whole[0] == -900 and whole[1] == 904 and torch.allclose(whole[2], (p / (1 - p)).log())


@pytest.mark.parametrize("forget_row, others_among", [(None, EVERY), (2, [0, 1])])
def test_a_first_order_update_is_linear_in_the_weights_that_it_zeroes(forget_row, others_among):
    graphs, zeroed, further = graph_generator(-2, torch.float64), [3, 8], [0, 11, 25]
    samples, masked = graphs.draw(4, seeded("test")), masked_for_good(graphs, zeroed)
    before = graphs.snapshot(samples, tuple(FEATURES), graphs.mask_of(torch.tensor(zeroed)), forget_row)
    update = before.first_order_update(torch.tensor(further))
    weight = masked.layers[1].weight.detach().flatten()
    expected = weight.index_fill(0, torch.tensor(further), 0.0)
    assert torch.equal(update.weights[0].flatten(), expected) and torch.equal(before.weights[0].flatten(), weight)
    for label, chosen in enumerate(samples):
        among = EVERY if label == forget_row else others_among
        p = [probability(masked, x, label, among) for x in graphs.samples.images[chosen]]
        gradients = sample_gradients(masked, [(each / (1 - each)).log() for each in p]).flatten(1)
        log_odds = before.log_odds[label] - gradients[:, further] @ weight[further]
        assert torch.allclose(update.log_odds[label], log_odds, atol=1e-9)
        fall = ((log_odds / FORGETTING_TEMPERATURE).sigmoid()[:, None] * gradients).mean(0) * expected
        assert torch.allclose(update.feature("forgetting")[label], fall, atol=1e-9)
    assert torch.equal(update.feature("input_activation"), before.feature("input_activation"))


def test_a_first_order_update_of_two_classes_and_their_logits_is_what_another_pass_finds():
    torch.manual_seed(0)
    classifier = HookedMNISTClassifier(HIDDEN, IN_FEATURES, 2).double()
    graphs = GraphGenerator(classifier, random_split(dtype=torch.float64, num_classes=2), graph_config(-1), 0)
    first, more = (graphs.graph.zeroing(torch.tensor(each)) for each in ([3], [3, 0, 1, 7, 9]))
    samples, names = graphs.draw(8, seeded("test")), [name for name in FEATURES if name != "output_activation"]
    for mask, row in ((None, None), (first, 1)):
        before, expected = graphs.snapshot(samples, names, mask, row), graphs.snapshot(samples, names, more, row)
        found = before.first_order_update(torch.tensor([3, 0, 1])).first_order_update(torch.tensor([7, 9]))
        assert torch.allclose(found.log_odds, expected.log_odds) and not torch.allclose(found.loss, before.loss)
        for name in names:
            assert torch.allclose(found.feature(name), expected.feature(name), atol=1e-12), name


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std() if x.std() > 0 else torch.zeros_like(x)


def class_graph_by_hand(own: dict[str, Tensor], others: list[dict[str, Tensor]]) -> Tensor:
    """Own features, then (but the weight) their means over the other classes, standardised, (vertices, features)."""
    columns = [standardised(feature) for feature in own.values()]
    for name in own:
        if name != "weight":
            columns.append(standardised(torch.stack([other[name] for other in others]).mean(0)))
    return torch.stack(columns, 1)


def test_class_graphs_are_the_features_and_their_means_over_the_other_classes_standardised():
    graphs, zeroed = graph_generator(-2, torch.float64), [0, 3, 17]
    samples, mask = graphs.draw(5, seeded("test")), graphs.mask_of(torch.tensor(zeroed))
    snapshot, masked, by_class = graphs.snapshot(samples, tuple(FEATURES), mask), masked_for_good(graphs, zeroed), []
    for label, chosen in enumerate(samples):
        images = graphs.samples.images[chosen]
        by_class.append(features_by_hand(graphs.classifier, masked, images, label, EVERY))
    for label, own in enumerate(by_class):
        expected = class_graph_by_hand(own, by_class[:label] + by_class[label + 1 :])
        x = snapshot.class_graph(label)
        assert x.shape == (1, 30, 17) == (1, 30, graphs.config.num_features)
        assert torch.allclose(x[0], expected, atol=1e-9)
    some = graph_generator(-2, torch.float64, features=("weight", "taylor"), other_classes=False)
    x = some.snapshot(samples, some.config.features, mask).class_graph(2)
    assert some.config.num_features == 2 and torch.allclose(x[0], expected[:, [2, 4]], atol=1e-9)


def test_get_data_is_the_graph_of_one_sample_beside_the_other_classes():
    graphs = graph_generator(-2, torch.float64)
    data, classifier, images = graphs.get_data(20), graphs.classifier, graphs.samples.images
    own = features_by_hand(classifier, classifier, images[[20]], 1, EVERY)
    others = [features_by_hand(classifier, classifier, images[graphs.labels == c], c, EVERY) for c in (0, 2)]
    assert torch.allclose(data.x, class_graph_by_hand(own, others), atol=1e-9)
    assert torch.equal(data.edge_index, graphs.graph.edge_index()) and data.y.tolist() == [1] and data.validate()
    with pytest.raises(IndexError, match="valid are 0 to 44"):
        graphs.get_data(45)
    edges = graphs.graph.num_edges
    assert graphs.get_data(0, max_edges=edges).edge_index.shape == (2, edges)
    with pytest.raises(ValueError, match=rf"max_edges must be at least {edges:,} \(.* GB\), not {edges - 1:,}"):
        graphs.get_data(0, max_edges=edges - 1)


def test_all_layers_are_recorded_and_a_pass_with_nothing_masked_changes_nothing():
    graphs = graph_generator(None)
    logits = graphs.classifier(graphs.samples.images)
    layers = graphs.record.layers
    assert torch.equal(layers[-1].outputs, logits) and (logits < 0).any(), "the output layer has no ReLU"
    assert layers[-1].active.min() == 1 and set(layers[0].active.unique().tolist()) == {0.0, 1.0}
    recorded = graphs.recorded()
    assert recorded["layers"] == [0, 1, 2] and torch.equal(recorded["labels"], graphs.labels)
    assert torch.equal(recorded["log_odds"], log_odds(logits, graphs.labels))
    assert [LayerRecord(**record) for record in recorded["records"]] == layers
    samples, nothing = graphs.draw(5, seeded("test")), graphs.graph.zeroing(graphs.nothing)
    kept, anew = (graphs.snapshot(samples, tuple(FEATURES), mask) for mask in (None, nothing))
    for name in FEATURES:
        assert torch.allclose(kept.feature(name), anew.feature(name), atol=1e-6), name
