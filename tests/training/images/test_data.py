"""The data sets: split, standardisation, and files that are not what they should be."""

import gzip
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from optax_structured.training.images import data


def write_idx(path, array, *, magic=b"\0\0\x08", cut=0):
    header = magic + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.tobytes()
    path.write_bytes(gzip.compress(raw[: len(raw) - cut]))


def test_digits_are_split_by_class_without_overlap():
    images = data.load("digits")
    assert len(images.train) + len(images.test) == 1797
    assert images.train.dtype == np.uint8 and images.train.shape[1:] == (8, 8, 1)
    counts = [np.bincount(labels) for labels in (images.train_labels, images.test_labels)]
    assert np.all(np.abs(counts[0] - 4 * counts[1]) <= 4)
    train = {image.tobytes() for image in images.train}
    assert not any(image.tobytes() in train for image in images.test)


def test_training_pixels_are_standardised():
    images = data.load("digits")
    x = images.standardise(jnp.asarray(images.train))
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-5)


def test_idx_files_are_read_back(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "x.gz", array)
    np.testing.assert_array_equal(data.read_idx(tmp_path / "x.gz"), array)


def test_fashion_mnist_from_files(tmp_path):
    for split, n in (("train", 5), ("t10k", 3)):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", np.full((n, 28, 28), n, np.uint8))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8))
    images = data.load("fashion-mnist", str(tmp_path))
    assert images.train.shape == (5, 28, 28, 1) and images.test.shape == (3, 28, 28, 1)
    np.testing.assert_array_equal(images.test_labels, [0, 1, 2])


@pytest.mark.realdata
def test_published_fashion_mnist():
    try:
        images = data.load("fashion-mnist")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert images.train.shape == (60_000, 28, 28, 1) and images.test.shape == (10_000, 28, 28, 1)
    means = images.train.mean(), images.test.mean()
    np.testing.assert_allclose(means, (72.94, 73.15), atol=0.005)


def test_missing_files_name_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        data.load("fashion-mnist", str(tmp_path))


def test_files_that_are_not_idx(tmp_path):
    path, array = tmp_path / "x.gz", np.zeros((2, 3), np.uint8)
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="not a whole gzip file"):
        data.read_idx(path)
    write_idx(path, array, magic=b"\0\0\x0d")
    with pytest.raises(ValueError, match="not an idx file of bytes"):
        data.read_idx(path)
    write_idx(path, array, cut=1)
    with pytest.raises(ValueError, match=r"announces shape \(2, 3\) but holds 5 bytes"):
        data.read_idx(path)
    path.write_bytes(gzip.compress(b"\0"))
    with pytest.raises(ValueError, match="not an idx file"):
        data.read_idx(path)


def test_unknown_data():
    with pytest.raises(ValueError, match="'mnist': choose one of digits, fashion-mnist"):
        data.load("mnist")
