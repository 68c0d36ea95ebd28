"""Verses of the King James Bible and the part of it that each is from, for a pretrained encoder."""

import functools
import hashlib
import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_structured import adapters
from optax_structured.adapters import Pair
from optax_structured.training.finetune import encoder
from optax_structured.trees import Axes

_COMMAND = ("bible", "-l10000", "-f", "gen1:1-rev22:21")
# The first book of each part, in the order of the text.
_PARTS = {
    "law": "Ge",
    "history": "Josh",
    "wisdom": "Job",
    "prophets": "Isa",
    "gospels": "Mat",
    "letters": "Rom",
}
_SEED = 0  # of the choice of verses: the same in all runs
_ROWS = 64  # verses that pass through the frozen layers at a time


class Inputs(NamedTuple):
    """Verses as the first adapted layer sees them."""

    x: Any  # (n, length, width)
    mask: Any  # (n, length) bool: not padding


class Verses:
    """A pretrained sentence encoder, and verses to be told apart by it.

    Args:
      text: see `read`.
      verses: of each part; a quarter of them is for testing.
      length: tokens of a verse, cut or padded.

    Raises:
      FileNotFoundError: text or encoder are not installed.
      ValueError: another text than the Bible, or fewer verses than wanted.
    """

    subject = ("minilm", "verses")
    head, kernels = "^head", {r"layer_\d+/.*kernel": Axes()}

    def __init__(self, text: str | None, verses: int, length: int) -> None:
        whole = read(text)
        self.digest = hashlib.sha256(whole.encode()).hexdigest()
        chosen, labels = chosen_verses(whole, verses)
        test = np.arange(len(labels)) % 4 == 3  # a quarter of each part
        self._ids, self._mask = encoder.tokens(chosen, length)
        self._split = (~test, test)
        self._labels = (labels[~test], labels[test])
        self.train_size = len(self._labels[0])
        self.encoder = encoder.Encoder()
        self._prefix = functools.cache(self._states_before)

    def frozen(self, config: Any) -> Any:
        """The last layers, and a head that knows nothing."""
        head = {
            "kernel": jnp.zeros((self.encoder.width, len(_PARTS))),
            "bias": jnp.zeros(len(_PARTS)),
        }
        names = [f"layer_{i}" for i in _layers(config)]
        return {**{name: self.encoder.params[name] for name in names}, "head": head}

    def train(self, config: Any) -> tuple[Inputs, Any]:
        """What is trained on, and labels."""
        return self._prefix(config.layers)[0], self._labels[0]

    def test(self, config: Any) -> tuple[Inputs, Any]:
        """Likewise, for testing."""
        return self._prefix(config.layers)[1], self._labels[1]

    def adapted(
        self, config: Any, frozen: Any, adapter: Any, constants: Any, inputs: Inputs
    ) -> Any:
        """Logits of the adapted encoder.

        Pairs are branches of their layers, which costs less than to merge them.
        """
        pairs = {path: node for path, node in adapter.items() if isinstance(node, Pair)}
        others = {path: node for path, node in adapter.items() if path not in pairs}
        merged = adapters.merge(frozen, others, constants)
        with adapters.factored(pairs, constants):
            return self.apply(config, merged, inputs)

    def apply(self, config: Any, params: Any, inputs: Inputs) -> Any:
        """Logits of merged parameters."""
        model = encoder.Classifier(
            _layers(config), self.encoder.heads, self.encoder.hidden, len(_PARTS)
        )
        return model.apply({"params": params}, *inputs)

    def describe(self, config: Any) -> str:
        """What runs have in common."""
        return (
            f"the last {config.layers} of {encoder.LAYERS} layers of MiniLM-L6 on "
            f"{self.train_size:,} verses of {self._ids.shape[-1]} tokens, "
            f"{len(self._labels[1]):,} more for testing"
        )

    def _states_before(self, layers: int) -> tuple[Inputs, Inputs]:
        """Frozen layers see each verse once: nothing below the adapted ones ever changes."""
        ids = np.pad(self._ids, ((0, -len(self._ids) % _ROWS), (0, 0)))
        mask = np.pad(self._mask, ((0, len(ids) - len(self._mask)), (0, 0)), constant_values=True)
        before = encoder.LAYERS - layers
        states = np.concatenate(
            [
                np.asarray(self.encoder.after(before, *(x[i : i + _ROWS] for x in (ids, mask))))
                for i in range(0, len(ids), _ROWS)
            ]
        )[: len(self._ids)]
        train, test = (Inputs(states[part], self._mask[part]) for part in self._split)
        return train, test


@functools.cache
def load(text: str | None, verses: int, length: int) -> Verses:
    """`Verses`, once a process."""
    return Verses(text, verses, length)


def read(text: str | None) -> str:
    """The Bible, each line "Ge1:1 In the beginning ...".

    Args:
      text: a file of it; None for what the command `bible` prints.

    Raises:
      FileNotFoundError: there is none.
    """
    how = (
        "the text is in the Debian packages bible-kjv and bible-kjv-text: apt-get install both, or "
        f"give --text a file of what `{' '.join(_COMMAND)}` prints elsewhere"
    )
    if text is not None:
        if not pathlib.Path(text).is_file():
            raise FileNotFoundError(f"there is no file of verses {text}; {how}")
        return pathlib.Path(text).read_text()
    if shutil.which(_COMMAND[0]) is None:
        raise FileNotFoundError(f"the verses are not installed: {how}")
    return subprocess.run(_COMMAND, check=True, capture_output=True, text=True).stdout


def chosen_verses(text: str, count: int) -> tuple[list[str], np.ndarray]:
    """As many verses of each part, in an order that is always the same, and their parts."""
    found: list[list[str]] = []
    starts = iter((*_PARTS.values(), None))
    following = next(starts)
    for line in text.splitlines():
        place, _, verse = line.partition(" ")
        if following is not None and place.rstrip("0123456789:") == following:
            found.append([])
            following = next(starts)
        if found:
            found[-1].append(verse)
    if len(found) < len(_PARTS):
        raise ValueError(
            f"the text has no line that begins with {following}1:1: expected the whole Bible, as "
            f"`{' '.join(_COMMAND)}` prints it"
        )
    shortest = min(len(part) for part in found)
    if not 4 <= count <= shortest:
        raise ValueError(f"--verses is between 4 and {shortest}, those of a part; got {count}")
    generator = np.random.default_rng(_SEED)
    chosen = [generator.permutation(len(part))[:count] for part in found]
    verses = [part[i] for part, places in zip(found, chosen, strict=True) for i in places]
    return verses, np.repeat(np.arange(len(found), dtype=np.int32), count)


def _layers(config: Any) -> Sequence[int]:
    return tuple(range(encoder.LAYERS - config.layers, encoder.LAYERS))
