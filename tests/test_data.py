"""Splits, the sealed test split, per-sample gradients, and vertex features against autograd one sample at a time."""

import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import NUM_CLASSES, Asking, graph_generator, random_classifier
from PIL import Image

from data import (
    DATASETS,
    FEATURES,
    FILES,
    DataError,
    checksum,
    data_set,
    load_image_data,
    seeded,
    some_of_every_class,
)
from model import LayerRecord, Mask


def test_mnist_is_the_original():
    images = load_image_data("MNIST")
    assert images.train.images.shape == (60000, 784) and images.test.images.shape == (10000, 784)
    assert torch.bincount(images.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.class_names == tuple("0123456789")
    with pytest.raises(DataError, match="must be MNIST, FashionMNIST, KMNIST.*, or another folder .*, not 'CIFAR10'"):
        load_image_data("CIFAR10")


IMAGES, LABELS = torch.arange(30 * 784).view(30, 28, 28) % 251, torch.arange(30) % 10


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


@pytest.mark.parametrize("name", DATASETS)
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
    "changes, message",
    [
        ({"labels": LABELS.clamp(max=8)}, "the training split must be .* every class from 0 to 9, .* 6, 0. labels"),
        ({"test_labels": LABELS[:9]}, "the test split must be .* every class from 0 to 9, .* 1, 0. labels"),
        ({"labels": LABELS + 1}, r"every class from 0 to 9, .* \[0, 3, .* 3, 3\] labels"),
        ({"images": IMAGES[:, :20]}, r"must be images of \(28, 28\) pixels .* not \(30, 20, 28\) and \[3, 3"),
        ({"images": IMAGES[:20]}, r"must be images of \(28, 28\) pixels .* not \(20, 28, 28\) and \[3, 3"),
    ],
)
def test_a_data_set_that_cannot_work_is_refused(tmp_path, changes, message):
    write_data_set(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_image_data("KMNIST", tmp_path)


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


CLASSES = ("cat", "dog", "eel")


def write_images(root: Path, shape: tuple[int, ...] = (5, 4), per_class: int = 4) -> dict[str, np.ndarray]:
    """Images of three classes, in folders; returns them by their path in the data set."""
    numbers, images = np.random.default_rng(0), {}
    for part in ("train", "test"):
        for label in CLASSES:
            for index in range(per_class):
                path = f"{part}/{label}/{index}.png"
                images[path] = numbers.integers(0, 256, shape, np.uint8)
                (root / "pets" / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[path]).save(root / "pets" / path)
    return images


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_images_in_folders_are_a_data_set_of_the_classes_that_their_folders_name(tmp_path, shape):
    images = write_images(tmp_path, shape)
    (tmp_path / "pets" / "train" / "cat" / ".hidden").write_text("no image")
    source, own = data_set("pets", tmp_path), load_image_data("pets", tmp_path)
    assert source.size == shape and own.class_names == source.class_names == CLASSES
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
        r"test/dog/1.png is of .5, 4, 3., but .*train/cat/0.png is of .5, 4.",
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
    for changes, message in (
        ({"labels": LABELS * 0, "test_labels": LABELS[:10] * 0}, r"two classes at least, .*, not .'0',."),
        ({"labels": LABELS.clamp(min=1)}, r"every class from 0 to 9, not \(30, 28, 28\) and \[0, 6"),
        ({"images": IMAGES[:29]}, r"must be images of .28, 28. pixels .*, not \(29, 28, 28\) and \[3"),
        ({"test_labels": LABELS[:10] % 9}, "the test split must be images of .28, 28. pixels and every class from 0"),
        ({"test_labels": torch.arange(11)}, "the test split must .* from 0 to 9, .* 1, 1. labels"),
    ):
        raw = write_data_set(tmp_path, "mine", **changes)
        with pytest.raises(DataError, match=f"^dataset mine in .*mine.*: cannot be used .*{message}"):
            load_image_data("mine", tmp_path)
        shutil.rmtree(raw)
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
    with pytest.raises(
        DataError, match="^dataset must be MNIST, FashionMNIST, KMNIST, pets, or another folder in .*, not"
    ):
        load_image_data(name, tmp_path / "datasets")


def test_seeds_depend_on_their_whole_key():
    draws = [torch.rand(3, generator=seeded(*key)).tolist() for key in (("a", 1), ("a", 1), ("a", 2), ("b", 1))]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3


@pytest.mark.parametrize("count, expected", [(6, 6), (50, 20)])
def test_some_of_every_class_are_different_samples_of_each_that_is_there(split, count, expected):
    some = some_of_every_class(split.retain(1), count, "test")
    assert some.labels.tolist() == [0] * expected + [2] * expected
    label_of = {tuple(image): label for image, label in zip(split.images.tolist(), split.labels.tolist())}
    rows = [tuple(image) for image in some.images.tolist()]
    assert [label_of[row] for row in rows] == some.labels.tolist() and len(set(rows)) == len(rows)
    assert not torch.equal(some_of_every_class(split.retain(1), count, "other").images, some.images)


def one_sample_gradient(classifier, image, label, of):
    classifier.zero_grad()
    logits = classifier(image[None])
    value = F.cross_entropy(logits, label[None]) if of == "loss" else logits[0, label] - logits.mean()
    value.backward()
    return [layer.weight.grad.clone() for layer in classifier.layers]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask_layer", [0, -2, -1, [0, 2], None])
def test_recorded_gradients_are_those_of_autograd_one_sample_at_a_time(mask_layer, bias):
    graphs = graph_generator(mask_layer, torch.float64, bias)
    for index in range(0, len(graphs), 9):
        image, label = graphs.samples.images[index], graphs.samples.labels[index]
        for of in ("loss", "margin"):
            expected = one_sample_gradient(graphs.classifier, image, label, of)
            for layer, record in zip(graphs.graph.layers, graphs.records):
                gradient = torch.outer(getattr(record, f"{of}_gradient")[index], record.inputs[index])
                assert torch.allclose(gradient, expected[layer], rtol=0, atol=1e-12)


def masked_by_hand(masked):
    classifier = random_classifier(dtype=torch.float64)
    classifier.layers[1].weight.data.view(-1)[masked] = 0
    return classifier


def features_by_hand(graphs, samples, masked=()):
    """The features of one group in the second layer by their definitions, not standardised."""
    classifier = masked_by_hand(list(masked))
    images, labels = graphs.samples.images[samples], graphs.samples.labels[samples]
    loss, margin = (
        torch.stack([one_sample_gradient(classifier, image, label, of)[1] for image, label in zip(images, labels)])
        for of in ("loss", "margin")
    )
    w0, w = (layer.weight.detach() for layer in classifier.layers[:2])
    a = (images @ w0.T).relu()
    z = a @ w.T
    return {
        "input_activation": a.mean(0).expand_as(w),
        "output_activation": z.relu().mean(0)[:, None].expand_as(w),
        "weight": w,
        "gradient": loss.mean(0),
        "effect": w * loss.mean(0),
        "fisher": w.abs() * loss.square().mean(0).sqrt(),
        "margin": w * margin.mean(0),
        "coactivation": w.abs() * ((z > 0)[:, :, None] * a[:, None]).mean(0),
    }


def standardised(x):
    return (x - x.mean()) / x.std() if x.std() > 0 else torch.zeros_like(x)


@pytest.mark.parametrize("masked", [[], [0, 3, 17]])
def test_class_graphs_are_the_features_by_their_definitions(masked):
    graphs = graph_generator(-2, torch.float64)
    samples = graphs.draw(5, seeded("test"))
    mask = Mask.zeroing(graphs.graph, torch.tensor(masked)) if masked else None
    x, loss = graphs.class_graphs(samples, mask)
    by_hand = [features_by_hand(graphs, group, masked) for group in samples]
    assert x.shape == (NUM_CLASSES, 30, 15) and graphs.num_features == 15
    for label in range(NUM_CLASSES):
        for column, name in enumerate(FEATURES):
            expected = standardised(by_hand[label][name].flatten())
            assert torch.allclose(x[label, :, column], expected, atol=1e-9), name
        for column, name in enumerate((name for name in FEATURES if name != "weight"), start=8):
            others = sum(by_hand[other][name] for other in range(NUM_CLASSES) if other != label) / (NUM_CLASSES - 1)
            assert torch.allclose(x[label, :, column], standardised(others.flatten()), atol=1e-9), f"others: {name}"
    logits = masked_by_hand(masked)(graphs.samples.images[samples.flatten()])
    losses = F.cross_entropy(logits, graphs.samples.labels[samples.flatten()], reduction="none")
    assert torch.allclose(loss, losses.view(NUM_CLASSES, 5).mean(1), atol=1e-12)
    some = graph_generator(-2, torch.float64, features=("weight", "margin"), other_classes=False)
    assert some.num_features == 2 and torch.equal(some.class_graphs(samples, mask)[0], x[..., [2, 6]])


@pytest.mark.parametrize("other_classes", [True, False])
@pytest.mark.parametrize("masked", [None, [0, 3, 17]])
def test_what_else_is_asked_is_one_more_feature_that_is_told_its_weight(masked, other_classes):
    plain, graphs = (
        graph_generator(None, auxiliary=auxiliary, other_classes=other_classes) for auxiliary in (None, Asking)
    )
    samples = graphs.draw(5, seeded("test"))
    mask = None if masked is None else Mask.zeroing(graphs.graph, torch.tensor(masked))
    expected, loss = plain.class_graphs(samples, mask)
    for weight in (0.0, 2.5):
        x, damage = graphs.class_graphs(samples, mask, weight)
        assert x.shape[-1] == graphs.num_features == plain.num_features + 1
        assert torch.equal(x[..., :8], expected[..., :8]) and torch.equal(x[..., 9:], expected[..., 8:])
        assert torch.equal(damage, loss)
        for found, of_class in zip(x[..., 8], graphs.auxiliary.feature(samples, range(NUM_CLASSES), mask)):
            assert torch.allclose(found, weight * standardised(of_class), atol=1e-4)
    assert torch.equal(graphs.get_data(3).x, plain.get_data(3).x), "a class has the feature, a sample has not"


def test_all_layers_are_recorded_and_a_pass_with_nothing_masked_changes_nothing():
    graphs = graph_generator(None)
    logits = graphs.classifier(graphs.samples.images)
    assert torch.equal(graphs.records[-1].outputs, logits) and (logits < 0).any(), "the output layer has no ReLU"
    assert graphs.records[-1].active.min() == 1 and set(graphs.records[0].active.unique().tolist()) == {0.0, 1.0}
    recorded = graphs.recorded()
    assert recorded["layers"] == [0, 1, 2] and torch.equal(recorded["labels"], graphs.labels)
    assert [LayerRecord(**record) for record in recorded["records"]] == graphs.records
    samples, nothing = graphs.draw(5, seeded("test")), Mask.zeroing(graphs.graph, graphs.nothing)
    for unmasked, whole in zip(graphs.class_graphs(samples), graphs.class_graphs(samples, nothing), strict=True):
        assert torch.allclose(unmasked, whole, atol=1e-4)


def test_get_data_is_the_graph_of_one_sample():
    graphs = graph_generator(-2, torch.float64)
    sample = graphs.get_data(20)
    by_hand = features_by_hand(graphs, torch.tensor([20]))
    for column, name in enumerate(FEATURES):
        assert torch.allclose(sample.x[:, column], standardised(by_hand[name].flatten()), atol=1e-9), name
    classes, _ = graphs.class_graphs(graphs.by_class())
    assert torch.allclose(sample.x[:, 8:], classes[1, :, 8:], atol=1e-9), "the other classes are those of its class"
    assert torch.equal(sample.edge_index, graphs.graph.edge_index())
    assert sample.y.tolist() == [1] and sample.validate()
    with pytest.raises(IndexError, match="valid are 0 to 44"):
        graphs.get_data(45)
    edges = graphs.graph.num_edges
    assert graphs.get_data(0, max_edges=edges).edge_index.shape == (2, edges)
    with pytest.raises(ValueError, match=rf"max_edges must be at least {edges:,} \(.* GB\), not {edges - 1:,}"):
        graphs.get_data(0, max_edges=edges - 1)


def test_draws_take_samples_of_their_class_without_repetition_and_no_more_than_there_are():
    graphs = graph_generator(samples_per_class=1000)
    for samples, count in ((graphs.draw(10, seeded("test")), 10), (graphs.by_class(), 20)):
        assert torch.equal(graphs.labels[samples], torch.arange(NUM_CLASSES)[:, None].expand(-1, count))
        assert all(len(set(group.tolist())) == count for group in samples)
