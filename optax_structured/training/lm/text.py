"""Real text as bytes: a default that every Python has, or a file; whole documents are held out."""

import hashlib
import pathlib
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# CPython's own language reference, in every CPython: no download, no root.
DEFAULT = "pydoc_data.topics"
BYTES = 256  # a token is a byte
_HELD_OUT = 0.1
# Of a paragraph, a line, a word.
_ENDS = (rb"\n\s*\n", rb"\n", rb"\s+")
_VERSE = re.compile(rb"(\d?[A-Za-z]+)\d+:\d+ ")


class Text(NamedTuple):
    """A text in two contiguous parts, each of whole documents."""

    train: np.ndarray  # (n,) uint8
    held_out: np.ndarray  # (m,) uint8; what follows `train` in the text
    origin: str  # where it is from, and its licence where known
    digest: str  # sha256 of the whole


def load(name: str = DEFAULT) -> Text:
    """A text by name, always with the same split.

    Args:
      name: "pydoc_data.topics", the language reference that CPython carries for `help()` (Copyright
        Python Software Foundation, PSF License Version 2; topics in alphabetical order, each
        paragraph where it first occurs, as topics quote one another), or a path. In a file of
        verses, each line "Gen1:1 ...", a document is a book; in any other file a paragraph, or a
        line where there are no blank lines, or a word where there is one line.

    Returns:
      The text; the documents of about its last tenth are held out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a text of less than two words.
    """
    if name == DEFAULT:
        version = ".".join(map(str, sys.version_info[:3]))
        origin = (
            f"the language reference of CPython {version} (pydoc_data.topics), "
            "(c) Python Software Foundation, PSF License Version 2"
        )
        return _split(_topics(), origin, name)
    path = pathlib.Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no text file {name}; leave --text out to train on {DEFAULT}, which every "
            "Python has"
        )
    return _split(_documents(path.read_bytes()), name, name)


def _topics() -> list[bytes]:
    from pydoc_data.topics import topics

    seen: set[str] = set()

    def first_time(paragraph: str) -> bool:
        words = " ".join(paragraph.split())
        new = bool(words) and words not in seen
        seen.add(words)
        return new

    kept = ([p for p in topics[name].split("\n\n") if first_time(p)] for name in sorted(topics))
    return ["\n\n".join(p.rstrip() for p in topic).encode() + b"\n\n" for topic in kept]


def _documents(text: bytes) -> list[bytes]:
    lines = text.splitlines(keepends=True)
    books = [_VERSE.match(line) for line in lines]
    if lines and all(books):
        found: dict[bytes, list[bytes]] = {}
        for book, line in zip(books, lines, strict=True):
            found.setdefault(book[1] if book else b"", []).append(line)
        return [b"".join(book_lines) for book_lines in found.values()]
    parts = (re.findall(rb".+?(?:%b|\Z)" % end, text, re.DOTALL) for end in _ENDS)
    return next((found for found in parts if len(found) > 1), [])


def _split(documents: Iterable[bytes], origin: str, name: str) -> Text:
    """Cuts between the two documents nearest to nine tenths of the bytes."""
    documents = list(documents)
    ends = np.cumsum([len(document) for document in documents])
    if len(documents) < 2:
        raise ValueError(f"{name} has less than two words, of which none can be held out")
    cut = int(ends[np.argmin(np.abs(ends[:-1] - (1 - _HELD_OUT) * ends[-1]))])
    whole = b"".join(documents)
    array = np.frombuffer(whole, np.uint8)
    return Text(array[:cut], array[cut:], origin, hashlib.sha256(whole).hexdigest())
