"""The loop: exact continuation, also right before and after a refresh; what is written."""

import math

import jax
import numpy as np
import pytest
from training_lm_small import experiment, fresh

from optax_structured.training.lm import loop, session


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def numbers(rows):
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "step_ms")} for row in rows
    ]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "recipe",
    ["galore", *(pytest.param(name, marks=SLOW) for name in ("adamw", "fira", "ldadam"))],
)
def test_resuming_continues_bit_for_bit_around_a_refresh(recipe, tmp_path):
    """Bases are fitted anew at steps 5 and 10; runs stop right before, at and after the first."""
    whole = loop.train(experiment(recipe), tmp_path / "whole")
    for stop in (4, 5, 6):
        folder = tmp_path / str(stop)
        stopped = loop.train(experiment(recipe), folder, stop_after=stop)
        assert len(stopped.losses) == stop
        parts = loop.train(experiment(recipe), folder, resume=True)
        assert_same_bits(parts.state, whole.state)
        np.testing.assert_array_equal(parts.losses, whole.losses)
        assert numbers(parts.rows) == numbers(whole.rows)
        assert parts.leaves == whole.leaves


@SLOW
@pytest.mark.parametrize("recipe, bits", [("adamw", 8), ("galore", 4), ("q_galore", 8)])
def test_resuming_continues_codes_bit_for_bit(recipe, bits, tmp_path):
    """64 wide, so that embedding, head and, of adamw, the matrices have 4096 entries and more."""
    wide = {"width": 64, "state_bits": bits}
    whole = loop.train(experiment(recipe, **wide), tmp_path / "whole")
    loop.train(experiment(recipe, **wide), tmp_path / "parts", stop_after=6)
    parts = loop.train(experiment(recipe, **wide), tmp_path / "parts", resume=True)
    assert_same_bits(parts.state, whole.state)
    np.testing.assert_array_equal(parts.losses, whole.losses)
    report = session.memory_of(whole.experiment)
    held = jax.tree.leaves(whole.state.opt_state)
    assert loop.state_bytes(whole.state) == report.state_bytes
    assert sum(x.nbytes for x in held if x.dtype == "uint8") == report.code_bytes
    # Two moments of what is not projected: embedding and head, and of adamw all matrices.
    large = (
        2 * 256 * 64
        if recipe != "adamw"
        else sum(x.size for x in jax.tree.leaves(whole.state.params) if x.size >= 4096)
    )
    in_moments = 2 * large * bits // 8
    assert in_moments <= report.code_bytes <= 1.1 * in_moments


def test_a_new_process_continues_bit_for_bit(tmp_path):
    whole = loop.train(experiment("galore"), tmp_path / "whole")
    loop.train(experiment("galore"), tmp_path / "parts", stop_after=7)
    parts = loop.train(fresh("galore"), tmp_path / "parts", resume=True)
    assert_same_bits(parts.state, whole.state)


def test_rows_say_perplexity_and_bits(tmp_path):
    result = loop.train(experiment(), tmp_path)
    assert [row["step"] for row in result.rows] == [5, 10, 12]
    last = result.rows[-1]
    assert last["tokens"] == 12 * 2 * 16
    assert last["held_out_loss"] == result.experiment.held_out_loss(result.state.params)
    assert last["perplexity"] == math.exp(last["held_out_loss"])
    assert last["bits_per_byte"] == pytest.approx(math.log2(last["perplexity"]))
    assert last["loss"] == pytest.approx(result.losses[-2:].mean())
    again = loop.train(experiment(), tmp_path, resume=True)
    assert again.rows == result.rows


def test_what_is_after_the_checkpoint_is_dropped(tmp_path):
    whole = loop.train(experiment(), tmp_path / "whole")
    loop.train(experiment(), tmp_path / "run", stop_after=10)
    metrics = tmp_path / "run" / loop.METRICS
    text = metrics.read_text()
    metrics.write_text(text + text.splitlines()[-1].replace("10,", "12,", 1) + "\n")
    again = loop.train(experiment(), tmp_path / "run", resume=True)
    assert numbers(again.rows) == numbers(whole.rows)


def test_the_bytes_are_those_of_the_arrays():
    state = experiment().init()
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
    assert loop.state_bytes(state) == 2 * 4 * sum(sizes) + 8  # two moments, two counters


def test_refusals_and_divergence(tmp_path):
    with pytest.raises(ValueError, match="stop_after must be at least 1 step, got 0"):
        loop.train(experiment(), tmp_path / "run", stop_after=0)
    with pytest.raises(FloatingPointError, match="training diverged; lower --learning-rate"):
        loop.train(experiment().variant(learning_rate=1e30), tmp_path / "run")
    with pytest.raises(FileExistsError, match="not empty"):
        loop.train(experiment(), tmp_path / "run")
