"""`optax-structured inspect`: one page about a finished run."""

import re

import pytest
from cli_runs import IMAGES, LM, invoke, write_text


def check(run):
    code, said = invoke("inspect", run, "--order", 4)
    assert code == 0, said
    assert (run / "inspection.png").read_bytes().startswith(b"\x89PNG")
    rate, limit = map(float, re.search(r"rate (\S+) is .* limit (\S+) ", said).groups())
    agreement, chance = map(float, re.search(r"agree by (\S+) .*signs: (\S+)\)", said).groups())
    assert 0 < rate and 0 < limit and 0 < chance < agreement <= 1
    return said


@pytest.mark.slow
def test_a_run_on_images(tmp_path):
    run = tmp_path / "run"
    options = [*IMAGES[:2], "--epochs", 1, "--batch-size", 128, "--recipe", "adamw"]
    code, said = invoke("train", *options, "--out", run)
    assert code == 0, said
    assert "preconditioned by its second moments" in check(run)


@pytest.mark.slow
def test_a_run_in_low_rank(tmp_path):
    run = tmp_path / "run"
    text = write_text(tmp_path / "short.txt")
    code, said = invoke(
        "train", *LM, "--recipe", "galore", "--rank", 4, "--text", text, "--out", run
    )
    assert code == 0, said
    assert "of gradient descent" in check(run)


def test_another_folder_is_a_sentence(tmp_path):
    code, said = invoke("inspect", tmp_path)
    assert code == 2 and "is not a run folder" in said
