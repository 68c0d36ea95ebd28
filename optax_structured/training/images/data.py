"""Real images: scikit-learn's digits (no download) and Fashion-MNIST (idx files)."""

import gzip
import pathlib
import struct
from typing import NamedTuple

import jax
import numpy as np

from optax_structured.training.names import check_known

NAMES = ("digits", "fashion-mnist")
FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"


class Images(NamedTuple):
    """A data set in its stored precision; `standardise` turns a batch into the network's input."""

    train: np.ndarray  # (n, height, width, 1) uint8
    train_labels: np.ndarray  # (n,) int32
    test: np.ndarray  # as train
    test_labels: np.ndarray
    classes: tuple[str, ...]
    mean: float  # of the pixels of the training split, in stored units
    std: float

    def standardise(self, x: jax.Array) -> jax.Array:
        """Mean 0 and standard deviation 1 over all pixels of the training split, float32."""
        return (x.astype("float32") - self.mean) / self.std


def load(name: str, data_dir: str = FASHION_MNIST_DIR) -> Images:
    """A data set by name, always with the same split.

    Args:
      name: "digits" (1797 images of 8x8; every fifth of each class is for testing) or
        "fashion-mnist" (70 000 of 28x28; the published split, mean and standard deviation).
      data_dir: where the idx files of Fashion-MNIST are.

    Raises:
      ValueError: an unknown name, or a file that is not what it should be.
      FileNotFoundError: no idx files in `data_dir`.
    """
    check_known("data", name, NAMES)
    return _digits() if name == "digits" else _fashion_mnist(pathlib.Path(data_dir))


def _digits() -> Images:
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = data.images.astype(np.uint8)[..., None], data.target.astype(np.int32)
    # Stratified without a random generator: the split can never change with a library version.
    rank = np.array([np.count_nonzero(labels[:i] == label) for i, label in enumerate(labels)])
    test = rank % 5 == 4
    train = images[~test]
    classes = tuple(str(digit) for digit in range(10))
    mean, std = float(train.mean()), float(train.std())
    return Images(train, labels[~test], images[test], labels[test], classes, mean, std)


def _fashion_mnist(folder: pathlib.Path) -> Images:
    def split(prefix: str) -> tuple[np.ndarray, np.ndarray]:
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{folder}: {prefix} images have shape {images.shape} and labels {labels.shape}; "
                "expected (n, height, width) and (n,)"
            )
        return images[..., None], labels.astype(np.int32)

    classes = "t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
    # The published runs standardise by these numbers, which are those of MNIST.
    mean, std = 0.1307 * 255, 0.3081 * 255
    return Images(*split("train"), *split("t10k"), tuple(classes), mean, std)


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The uint8 array in a gzipped idx file, checked against its own header.

    Raises:
      FileNotFoundError: no such file; says which package brings Fashion-MNIST.
      ValueError: another magic number or type, or a size that is not what the header says.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; install the Debian package dataset-fashion-mnist "
            "(apt-get install dataset-fashion-mnist) or give the folder of its four .gz files "
            "with --data-dir"
        )
    try:
        raw = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    zeros, kind, ndim = struct.unpack(">HBB", raw[:4]) if len(raw) >= 4 else (1, 0, 0)
    header = 4 + 4 * ndim
    if (zeros, kind) != (0, 8) or len(raw) < header:
        raise ValueError(f"{path} is not an idx file of bytes: it starts with {raw[:4]!r}")
    shape = struct.unpack(f">{ndim}I", raw[4:header])
    if len(raw) - header != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path} announces shape {shape} but holds {len(raw) - header} bytes; fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
