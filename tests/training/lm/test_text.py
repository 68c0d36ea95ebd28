"""The texts: whole documents held out, nothing in both parts, mistakes as sentences."""

import numpy as np
import pytest

from optax_structured.training.lm import text


def paragraphs(part):
    return {" ".join(p.split()) for p in bytes(part).decode().split("\n\n")} - {""}


def test_the_default_text_holds_out_paragraphs_that_training_never_sees():
    found = text.load()
    assert len(found.train) > 300_000
    share = len(found.held_out) / (len(found.train) + len(found.held_out))
    assert 0.08 < share < 0.12
    assert not paragraphs(found.train) & paragraphs(found.held_out)
    assert "PSF License" in found.origin and text.load().digest == found.digest


def test_of_verses_whole_books_are_held_out(tmp_path):
    file = tmp_path / "verses.txt"
    lines = [f"{book}{c}:1 {'word ' * 9}" for book in ("Ge", "1Sm", "Rom") for c in range(1, 5)]
    file.write_text("\n".join(lines) + "\n")
    found = text.load(str(file))
    assert bytes(found.held_out).startswith(b"Rom1:1") and b"Rom" not in bytes(found.train)
    assert found.origin == str(file)


def test_of_any_file_whole_paragraphs_are_held_out(tmp_path):
    file = tmp_path / "prose.txt"
    whole = b"\n \n".join(b"%d " % i * 30 for i in range(10))
    file.write_bytes(whole)
    found = text.load(str(file))
    assert bytes(found.train) + bytes(found.held_out) == whole
    assert bytes(found.held_out) == b"9 " * 30
    np.testing.assert_array_equal(found.train[:2], list(b"0 "))


@pytest.mark.parametrize("end", ["\n", " "])
def test_without_blank_lines_whole_lines_are_held_out_or_else_words(end, tmp_path):
    file = tmp_path / "dense.txt"
    whole = end.join(f"line{i}" for i in range(10)).encode() + b"\n"
    file.write_bytes(whole)
    found = text.load(str(file))
    assert bytes(found.train) + bytes(found.held_out) == whole
    assert bytes(found.held_out) == b"line9\n"


def test_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no text file nowhere.txt; leave --text"):
        text.load("nowhere.txt")
    for content in ("", "word"):
        (tmp_path / "short").write_text(content)
        with pytest.raises(ValueError, match="less than two words"):
            text.load(str(tmp_path / "short"))
