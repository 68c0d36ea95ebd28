"""The one loop on both tasks: exact continuation, what is written, what is refused."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_small import fresh_images, fresh_lm, images, lm, numbers

from optax_structured.training import folder, loop, run
from optax_structured.training.history import METRICS
from optax_structured.training.images.task import Images

SLOW = pytest.mark.slow


def assert_same_bits(a, b):
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def assert_same_run(parts, whole):
    assert_same_bits(parts.state, whole.state)
    assert numbers(parts.history.rows) == numbers(whole.history.rows)
    np.testing.assert_array_equal(parts.history.losses, whole.history.losses)
    assert parts.history.leaves == whole.history.leaves
    assert_same_bits(parts.history.strips, whole.history.strips)


def leave_at(step):
    """Leaves a run at the end of the compiled call that reaches this step."""
    seen = [0]

    def watch(row):
        seen[0] = row["step"]

    return {"watch": watch, "stopped": lambda: seen[0] >= step}


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, fresh, stops",
    [
        # Across a milestone (images), before, at and after a refit (lm), in the middle of an epoch.
        pytest.param(images, fresh_images, (11, 22, 40), id="images"),
        pytest.param(lambda: lm("galore"), lambda: fresh_lm("galore"), (4, 5, 6), id="lm"),
        *(
            pytest.param(lambda name=name: lm(name), None, (4, 5, 6), id=name, marks=SLOW)
            for name in ("adamw", "fira", "ldadam")
        ),
        pytest.param(lambda: images(model="conv"), None, (20,), id="conv", marks=SLOW),
        pytest.param(lambda: images("adamw"), None, (20,), id="images-adamw", marks=SLOW),
    ],
)
def test_a_run_that_was_left_continues_bit_for_bit(task, fresh, stops, tmp_path, monkeypatch):
    monkeypatch.setattr(type(task()), "steps_a_call", 4)
    task = (fresh or task)()
    whole = loop.train(task, tmp_path / "whole")
    for stop in stops:
        here = tmp_path / str(stop)
        left = loop.train(task, here, **leave_at(stop))
        assert stop <= left.step < stop + 4 and len(left.history.losses) == left.step
        again = fresh() if fresh and stop == stops[0] else task  # as in a new process
        assert_same_run(loop.train(again, here, resume=True), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        lambda: images("prox_sgd", "mlp", state_bits=8, epochs=2, stages=1),
        pytest.param(lambda: images("adamw", "mlp", state_bits=8, epochs=2, stages=1), marks=SLOW),
        pytest.param(
            lambda: images("prox_adam", "mlp", state_bits=4, epochs=2, stages=1), marks=SLOW
        ),
        pytest.param(
            lambda: images("prox_ssi", "mlp", state_bits=8, epochs=2, stages=1), marks=SLOW
        ),
        # 64 wide, so that embedding, head and, of adamw, the matrices have 4096 entries and more.
        pytest.param(lambda: lm("adamw", width=64, state_bits=8), marks=SLOW),
        pytest.param(lambda: lm("galore", width=64, state_bits=4), marks=SLOW),
        pytest.param(lambda: lm("q_galore", width=64, state_bits=8), marks=SLOW),
    ],
)
def test_codes_continue_bit_for_bit(task, tmp_path):
    task = task()
    whole = loop.train(task, tmp_path / "whole")
    loop.train(task, tmp_path / "parts", **leave_at(1))
    assert_same_run(loop.train(task, tmp_path / "parts", resume=True), whole)
    assert any(x.dtype == "uint8" for x in jax.tree.leaves(whole.state.opt_state))


def test_rows_say_perplexity_and_bits(tmp_path):
    result = loop.train(lm(), tmp_path)
    rows = result.history.rows
    assert [row["step"] for row in rows] == [5, 10, 12]
    last = rows[-1]
    assert last["tokens"] == 12 * 2 * 16
    assert last["held_out_loss"] == lm().held_out_loss(result.state.params)
    assert last["perplexity"] == math.exp(last["held_out_loss"])
    assert last["bits_per_byte"] == pytest.approx(math.log2(last["perplexity"]))
    assert last["loss"] == pytest.approx(result.history.losses[-2:].mean())


@pytest.mark.slow
def test_what_is_after_the_checkpoint_is_dropped(tmp_path):
    whole = loop.train(images(), tmp_path, stop_after=2)
    metrics = tmp_path / METRICS
    text = metrics.read_text()
    last = text.splitlines()[-1]
    metrics.write_text(text + last.replace("22,", "33,", 1) + "\n")
    again = loop.train(images(), tmp_path, resume=True, stop_after=3)
    assert numbers(again.history.rows)[:2] == numbers(whole.history.rows)
    assert [row["epoch"] for row in again.history.rows] == [1, 2, 3]


@pytest.mark.slow
def test_a_finished_run_can_be_read_again_and_extended(tmp_path):
    first = loop.train(images(), tmp_path)
    again = loop.train(run.stored(Images, tmp_path, {}), tmp_path, resume=True)
    assert again.began == again.step == first.step == images().total_steps
    assert_same_run(again, first)
    longer = run.stored(Images, tmp_path, {"epochs": 7})
    more = loop.train(longer, tmp_path, resume=True)
    assert numbers(more.history.rows)[:6] == numbers(first.history.rows)
    assert [row["epoch"] for row in more.history.rows][-1] == 7
    config = folder.load_config(tmp_path, Images.config_type)
    assert (config.epochs, config.milestones) == (7, (2, 4))  # the last stage goes on


def test_the_rate_of_an_extended_run_stays_where_the_schedule_ended():
    config = lm().config.extended(100)
    assert (config.steps, config.scheduled_steps) == (100, 12)


class Interrupted(Images):
    """Batches of NaN at some steps: `bad` of them from the third on."""

    def __init__(self, config, images, bad):
        super().__init__(config, images)
        self.bad = bad

    def loss(self, params, train, batch):
        loss = super().loss(params, train, batch["images"])
        return jnp.where((batch["step"] >= 2) & (batch["step"] < 2 + self.bad), jnp.nan, 1) * loss

    def batches(self, first, count):
        steps = first + jnp.arange(self.steps_a_call)
        return {"images": super().batches(first, count), "step": steps}


def interrupted(bad):
    task = fresh_images("prox_sgd", epochs=2, stages=1)
    return Interrupted(task.config, task.images, bad)


@pytest.mark.slow
def test_gradients_that_are_not_finite_are_counted_and_said(tmp_path):
    said = []
    result = loop.train(interrupted(2), tmp_path, warn=said.append)
    (sentence,) = said
    assert "gradients were not finite in 2 steps before step" in sentence
    assert [row["skipped"] for row in result.history.rows] == [2, 2]
    assert all(np.isfinite(row["loss"]) for row in result.history.rows)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.state.params))


@pytest.mark.slow
def test_a_run_stops_after_ten_such_steps_in_a_row(tmp_path):
    with pytest.raises(FloatingPointError, match="steps in a row at step .*training diverged"):
        loop.train(interrupted(1000), tmp_path, warn=lambda sentence: None)


@pytest.mark.slow
def test_a_run_that_diverges_or_cannot_begin_says_so(tmp_path):
    with pytest.raises(ValueError, match="stop_after must be at least 1 step, got 0"):
        loop.train(lm(), tmp_path / "run", stop_after=0)
    with pytest.raises(FloatingPointError, match="training diverged; lower --learning-rate"):
        loop.train(lm().variant(learning_rate=1e30), tmp_path / "run", warn=lambda sentence: None)
    with pytest.raises(FileExistsError, match="not empty: give another --out, or continue"):
        loop.train(lm(), tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    whole = loop.train(lm(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / "checkpoints")
    for name in ("killed", "earlier"):
        (tmp_path / name).mkdir()
    folder.save_config(lm().config, tmp_path / "killed")
    assert_same_run(loop.train(lm(), tmp_path / "killed", resume=True), whole)
    (tmp_path / "earlier" / "config.json.part").touch()
    assert_same_run(loop.train(lm(), tmp_path / "earlier"), whole)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; start the run again"):
        loop.train(lm(), tmp_path / "lost", resume=True)
