"""The published trajectories of the recipes on fixed and adaptive bases, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import load
from tolerances import GOLDEN

from optax_structured.low_rank import DCT, SVD, ErrorFeedback, Keep, LowRank
from optax_structured.recipes.dct import dct_adamw, trion
from optax_structured.recipes.grad_norm_lorp import grad_norm_lorp
from optax_structured.recipes.ldadam import ldadam

pytestmark = pytest.mark.usefixtures("x64")


def trajectory(tx, golden):
    """Parameters and state after each step."""
    current = jax.tree.map(jnp.asarray, golden.start)
    state = tx.init(current)

    @jax.jit
    def step(grads, state, current):
        updates, state = tx.update(grads, state, current)
        return optax.apply_updates(current, updates), state

    for grads in golden.steps("grads"):
        current, state = step(jax.tree.map(jnp.asarray, grads), state, current)
        yield current, state


def assert_near(got, expected):
    scale = np.max(np.abs(expected), initial=np.finfo(float).tiny)
    assert np.max(np.abs(np.asarray(got) - expected), initial=0) <= GOLDEN * scale


def assert_trajectory(tx, golden, look=lambda state, current: {}):
    """`look` gives, from state and parameters, what is stored as `state/<name>/<leaf>`."""
    expected = golden.steps("params")
    for t, (current, state) in enumerate(trajectory(tx, golden)):
        for leaf, value in expected[t].items():
            assert_near(current[leaf], value)
        for name, leaves in look(state, current).items():
            for leaf, value in leaves.items():
                assert_near(value, golden.leaves(f"state/{name}")[leaf][t])


def as_published(frames):
    """Low-rank leaves, here (rank, length), in the layout of the published state."""
    return {n: x.T if n in ("tall", "square") else x for n, x in frames.items() if n != "vector"}


@dataclasses.dataclass(frozen=True)
class SixteenLevels:
    """The released quantiser of the error buffer: each row to 16 levels between its ends."""

    def encode(self, x):
        low, high = (f(x, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
        scale = (high - low) / 15
        scale = jnp.where(scale == 0, 1, scale)
        return jnp.round((x - low) / scale), scale, low

    def decode(self, state):
        levels, scale, low = state
        return levels * scale + low


def dct(h, **residual):
    score = {1: "l1", 2: "l2"}[h["ell_norm"]]
    kind = {"matmul": "dct3", "makhoul": "dct2"}[h["sim_type"]]
    spec = LowRank(
        h["rank"], h["update_proj_gap"], projector=DCT(score=score, kind=kind), **residual
    )
    return dct_adamw(
        h["lr"],
        spec,
        b1=h["betas"][0],
        b2=h["betas"][1],
        eps=h["eps"],
        weight_decay=h["weight_decay"],
        error_feedback=h["use_ef"],
    )


@pytest.mark.parametrize("case", ["gap1-rotate", "gap4-rotate-ef", "ell2-gap3"])
def test_dct_adamw(case):
    golden = load(f"dct-adamw-{case}")

    def look(state, current):
        s = state[0]
        error = s.residual if golden.hyperparameters["use_ef"] else {}
        return {
            "indices_sorted": s.bases,
            "mu_sorted": as_published(s.inner.mu),
            "nu_sorted": as_published(s.inner.nu),
            "error_feedback": error,
        }

    assert_trajectory(dct(golden.hyperparameters), golden, look)


def test_dct_adamw_with_the_released_quantiser():
    golden = load("dct-adamw-makhoul-ef8")
    codec = SixteenLevels()

    def look(state, current):
        buffers = {name: codec.decode(x) for name, x in state[0].residual.items()}
        return {"indices_sorted": state[0].bases, "error_feedback_dequantised": buffers}

    tx = dct(golden.hyperparameters, residual=ErrorFeedback(codec=codec))
    assert_trajectory(tx, golden, look)


@pytest.mark.parametrize("case", ["matmul", "kimi-rank2"])
def test_trion(case):
    golden = load(f"trion-{case}")
    h = golden.hyperparameters
    tx = trion(
        h["lr"],
        LowRank(h["rank"]),
        momentum=h["mu"],
        weight_decay=h["weight_decay"],
        scaling=h["scaling_type"],
    )

    def look(state, current):
        s = state.inner_states["matrix"].inner_state[0]
        return {"indices_sorted": s.bases, "momentum": s.residual}

    assert_trajectory(tx, golden, look)


@pytest.mark.parametrize("case", ["ef", "noef-svd"])
def test_ldadam(case):
    golden = load(f"ldadamw-{case}")
    h = golden.hyperparameters
    tx = ldadam(
        h["lr"],
        LowRank(h["rank"], projector=SVD() if h["proj_method"] == "svd" else None),
        b1=h["betas"][0],
        b2=h["betas"][1],
        eps=h["eps"],
        weight_decay=h["weight_decay"],
        rho=h["rho"],
        error_feedback=h["error_feedback"],
    )

    def look(state, current):
        projections = {name: p.T @ p for name, p in state[0].bases.items()}
        return {"projection_matrix": projections, "error": state[0].error}

    assert_trajectory(tx, golden, look)


@pytest.mark.parametrize("case", ["std", "std-wd"])
def test_grad_norm_lorp_as_released(case):
    golden = load(f"grad_norm_lorp-{case}")
    h = golden.hyperparameters
    tx = grad_norm_lorp(
        h["lr"],
        LowRank(h["rank"], h["update_proj_gap"], projector=SVD(), transport=Keep()),
        scale=h["scale"],
        b1=h["betas"][0],
        b2=h["betas"][1],
        eps=h["eps"],
        weight_decay=h["weight_decay"],
        mode="lookahead",
    )

    def look(state, current):
        norm = lambda w: jnp.linalg.norm(w, axis=-1, keepdims=True)  # noqa: E731
        return {"v": state.v, "g": jax.tree.map(norm, current)}

    assert_trajectory(tx, golden, look)
