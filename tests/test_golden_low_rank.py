"""The published trajectories of GaLore and Fira, in float64, past every refit.

Golden files fix the signs of the SVD and keep the moments across a refit: `SVD()` and `Keep()`.
"""

import dataclasses

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import GOLDEN

import optax_structured as oxs
from optax_structured.low_rank.projectors import OneSided, TwoSided

pytestmark = pytest.mark.usefixtures("x64")

PUBLISHED = {"projector": oxs.SVD(), "transport": oxs.Keep()}
SIDES = {"std": "small", "reverse_std": "large", "left": "rows", "right": "cols"}


def low_rank(h, **overrides):
    kind = h.get("proj_type", "std")
    parts = {**PUBLISHED, "axes": oxs.Axes(side=SIDES.get(kind, "small")), **overrides}
    if kind == "full":
        parts["projector"] = TwoSided()
    return oxs.LowRank(h["rank"], period=h["update_proj_gap"], **parts)


def replay(golden, tx, check_state=lambda step, state: None):
    """Every published step, and the largest relative error of the parameters."""
    current = {k: jnp.asarray(v) for k, v in golden.start.items()}
    state = tx.init(current)

    @jax.jit
    def one(grads, state, current):
        updates, state = tx.update(grads, state, current)
        return optax.apply_updates(current, updates), state

    worst = 0.0
    for t, (grads, expected) in enumerate(
        zip(golden.steps("grads"), golden.steps("params"), strict=True)
    ):
        current, state = one({k: jnp.asarray(v) for k, v in grads.items()}, state, current)
        for name, value in expected.items():
            error = np.max(np.abs(current[name] - value)) / np.max(np.abs(value))
            worst = max(worst, float(error))
        check_state(t, state)
    return worst


def rate(golden):
    per_step = golden.meta.get("lr_per_step")
    if per_step is None:
        return golden.hyperparameters["lr"]
    table = np.asarray(per_step)
    return lambda count: jnp.asarray(table)[count]


ADAMW = ("std", "reverse_std", "left", "right", "full", "std-fullrank", "std-rank1-gap1")


@pytest.mark.parametrize("case", ADAMW)
def test_galore_adamw(case):
    golden = golden_files.load(f"galore-adamw-{case}")
    h = golden.hyperparameters
    b1, b2 = h["betas"]
    settings = {"scale": h["scale"], "b1": b1, "b2": b2, "eps": h["eps"]}
    tx = oxs.galore(rate(golden), low_rank(h), weight_decay=h["weight_decay"], **settings)

    def bases_agree(t, state):
        if case == "full":
            return
        for name, stored in golden.leaves("state/projector").items():
            basis = state[0].bases[name]
            side = low_rank(h).axes.compressed_side(golden.start[name].shape)
            np.testing.assert_allclose(basis.T if side == "rows" else basis, stored[t], atol=1e-8)

    assert replay(golden, tx, bases_agree) <= GOLDEN


def test_galore_without_bias_correction():
    golden = golden_files.load("galore-adamw-std-nobiascorr")
    h = golden.hyperparameters
    adam = oxs.uncorrected_adam(*h["betas"], h["eps"])
    tx = oxs.galore(h["lr"], low_rank(h), inner=adam, scale=h["scale"])
    assert replay(golden, tx) <= GOLDEN


def step_of(golden, frame, gradient):
    """The step of an open-loop trajectory, told by its gradient."""
    seen = jax.vmap(frame.orient)(jnp.asarray(golden.leaves("grads")[frame.name]))
    return jnp.argmax(jnp.all(seen == gradient, (-2, -1)))


@dataclasses.dataclass(frozen=True)
class Stored(OneSided):
    """The bases that a run stored, in place of a fit: raw LAPACK signs."""

    name: str

    def fit(self, frame, matrix, gradient, fitted, key):
        golden = golden_files.load(self.name)
        stored = golden.leaves("state/projector")[frame.name]
        table = jnp.asarray(stored if frame.side == "rows" else np.swapaxes(stored, 1, 2))
        return table[step_of(golden, frame, gradient)]


@dataclasses.dataclass(frozen=True)
class StoredTucker(oxs.Tucker):
    """The factors that a run stored: another routine's signs, and where its sweeps stopped."""

    def refit(self, frame, basis, gradient, fitted, key):
        golden = golden_files.load("galore-tucker-intended")
        t = step_of(golden, frame, gradient)
        return tuple(
            jnp.asarray(golden.leaves(f"state/factor{axis}")[frame.name])[t]
            for axis in range(len(basis))
        )


def test_galore_with_injected_bases():
    golden = golden_files.load("galore-adamw-std-rawsigns")
    h = golden.hyperparameters
    b1, b2 = h["betas"]
    spec = low_rank(h, projector=Stored("galore-adamw-std-rawsigns"))
    settings = {"scale": h["scale"], "b1": b1, "b2": b2, "eps": h["eps"]}
    tx = oxs.galore(h["lr"], spec, weight_decay=h["weight_decay"], **settings)
    assert replay(golden, tx) <= GOLDEN


def decay_in_float64(step, power):
    """Optax's own, from a float32 counter, is 1.6e-9 away from the published trajectory."""
    return 1 - (step + 1.0) ** -power


@pytest.mark.parametrize("case", ["fixedlr", "momentum", "relative"])
def test_galore_adafactor(case):
    """Adafactor inside; what reads parameters, the relative step and the decay, outside."""
    golden = golden_files.load(f"galore-adafactor-{case}")
    h = golden.hyperparameters
    inner = [
        optax.scale_by_factored_rms(
            decay_rate=-h["decay_rate"], min_dim_size_to_factor=1, decay_rate_fn=decay_in_float64
        ),
        optax.clip_by_block_rms(h["clip_threshold"]),
    ]
    if h["beta1"] is not None:
        inner.append(optax.ema(h["beta1"], debias=False))
    step = h["lr"]
    if h["relative_step"]:
        step = lambda count: jnp.minimum(1e-2, 1 / jnp.sqrt(count + 1.0))  # noqa: E731
    tx = optax.chain(
        oxs.low_rank_projection(optax.chain(*inner), low_rank(h), scale=h["scale"]),
        optax.add_decayed_weights(h["weight_decay"]),
        *([optax.scale_by_param_block_rms(h["eps"][1])] if h["scale_parameter"] else []),
        optax.scale_by_learning_rate(step),
    )
    assert replay(golden, tx) <= GOLDEN


def test_galore_tucker():
    golden = golden_files.load("galore-tucker-intended")
    h = golden.hyperparameters
    spec = oxs.LowRank(tuple(h["rank"]), period=h["update_proj_gap"], projector=StoredTucker())
    b1, b2 = h["betas"]
    tx = oxs.galore(h["lr"], spec, scale=h["scale"], b1=b1, b2=b2, eps=h["eps"])
    assert replay(golden, tx) <= GOLDEN


FIRA = ("limiter-active", "limiter-inactive", "alpha1", "alpha0625-nobias")


@pytest.mark.parametrize("case", FIRA)
def test_fira_adamw(case):
    golden = golden_files.load(f"fira-adamw-{case}")
    h = golden.hyperparameters
    b1, b2 = h["betas"]
    settings = {"scale": h["alpha"], "weight_decay": h["weight_decay"]}
    if h["correct_bias"]:
        tx = oxs.fira(h["lr"], low_rank(h), b1=b1, b2=b2, eps=h["eps"], **settings)
    else:
        inner = oxs.uncorrected_adam(b1, b2, h["eps"])
        tx = oxs.fira(h["lr"], low_rank(h), inner=inner, **settings)

    def norms_agree(t, state):
        for name, stored in golden.leaves("state/limiter_norm").items():
            np.testing.assert_allclose(state[0].residual[name], stored[t], rtol=1e-8)

    assert replay(golden, tx, norms_agree) <= GOLDEN


def test_fira_rmsprop():
    golden = golden_files.load("fira-rmsprop-momentum")
    h = golden.hyperparameters
    rms = oxs.uncorrected_rms(h["beta"], h["eps"], h["momentum"])
    tx = oxs.fira(h["lr"], low_rank(h), inner=rms, scale=h["alpha"])
    assert replay(golden, tx) <= GOLDEN
