"""What Q-GaLore promises beyond its published trajectories."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from recipes_table import assert_close, assert_equal, normal, normal_tree, run
from tolerances import reordered

import optax_structured as oxs
from optax_structured.quantization import AffineCode, DynamicCode

SHAPES = {"kernel": (256, 64), "small": (12, 7), "bias": (80,)}
SMALL = {"kernel": (12, 8), "bias": (8,)}


@dataclasses.dataclass(frozen=True)
class Exact(oxs.Affine):
    """Codes that are the numbers themselves."""

    def encode(self, x, *, key=None, batch=0):
        nothing = jnp.zeros(x.shape[:batch], x.dtype)
        return AffineCode(x, nothing, nothing)

    def decode(self, encoded, shape=None, *, batch=0):
        return encoded.codes


def spec(**parts):
    return oxs.LowRank(32, period=2, **parts)


def trajectory(tx, start, grads):
    current, state = start, tx.init(start)
    step = jax.jit(tx.update)
    for g in grads:
        updates, state = step(g, state, current)
        current = jax.tree.map(jnp.add, current, updates)
        yield current, state


@pytest.mark.slow
@pytest.mark.parametrize("moments", [None, oxs.Dynamic()], ids=repr)
def test_without_codes_it_is_galore_with_lazy_refits(moments):
    start, grads = normal_tree("w", SHAPES), [normal_tree(t, SHAPES) for t in range(5)]
    adam = oxs.quantized(oxs.transforms.debiased_adam(0.9, 0.95, 1e-8), moments)
    settings = {"scale": 0.5, "weight_decay": 0.1}
    expected = oxs.galore(0.01, spec(refresh=oxs.Lazy()), inner=adam, **settings)
    tx = oxs.q_galore(0.01, spec(codec=Exact()), weights=None, moments=moments, **settings)
    got, state = run(tx, start, grads)
    # A moment between two codes may fall to either side: some 1 % of a step.
    off = {"rtol": reordered(jnp.float32), "atol": 0.0 if moments is None else 0.02 * 0.01}
    assert_close(got, run(expected, start, grads)[0], **off)
    large = state.inner_state[0].inner.inner.mu["kernel"]
    assert isinstance(large, DynamicCode) == (moments is not None)
    assert not isinstance(state.inner_state[0].inner.inner.mu["small"], DynamicCode)


@pytest.mark.slow
def test_what_is_in_codes_by_default():
    start = normal_tree("w", SHAPES)
    state = oxs.q_galore(0.01, spec()).init(start).inner_state[0]
    assert {name: b.codes.dtype for name, b in state.bases.items()} == {
        "kernel": jnp.uint8,
        "small": jnp.uint8,
    }
    assert state.bases["kernel"].codes.nbytes == 64 * 32 // 2
    assert isinstance(state.inner.inner.nu["kernel"], DynamicCode)
    assert isinstance(state.refresh["kernel"].rule, oxs.low_rank.LazyState)


@pytest.mark.slow
@pytest.mark.parametrize("projector", [oxs.SVD(), oxs.SubspaceIteration()], ids=repr)
def test_gaps_double_while_the_gradient_stays(projector):
    """200, then 400 at step 1000, 800 at 1200 and 1600 at 1600, in units of 50 steps."""
    g = normal_tree("g", SMALL)
    tx = oxs.q_galore(0.01, oxs.LowRank(2, period=4, projector=projector))
    gaps = [
        int(s.inner_state[0].refresh["kernel"].rule.gap) for _, s in trajectory(tx, g, [g] * 36)
    ]
    assert {t: gap for t, gap in enumerate(gaps) if gap != gaps[t - 1]} == {
        20: 8,
        24: 16,
        32: 32,
        0: 4,
    }


def test_a_threshold_above_one_never_changes_a_gap():
    g = normal_tree("g", SMALL)
    lazy = oxs.Lazy(threshold=1.1, memory=1)
    tx = oxs.q_galore(0.01, oxs.LowRank(2, period=2, refresh=lazy))
    assert all(
        s.inner_state[0].refresh["kernel"].rule.gap == 2 for _, s in trajectory(tx, g, [g] * 12)
    )


@pytest.mark.slow
def test_projected_weights_alone_are_on_the_grid():
    """At all steps, and the others are those of the same run without a grid."""
    codec = oxs.Affine(group=16)
    start, grads = normal_tree("w", SMALL), [normal_tree(t, SMALL) for t in range(20)]
    tx, plain = (
        oxs.q_galore(0.01, oxs.LowRank(2, period=5), weights=w, weight_decay=0.1)
        for w in (codec, None)
    )
    for (got, _), (expected, _) in zip(
        trajectory(tx, start, grads), trajectory(plain, start, grads), strict=True
    ):
        assert_equal(got["bias"], expected["bias"])
        kernel = got["kernel"].reshape(-1, 16)
        width = jnp.max(kernel, 1) - jnp.min(kernel, 1)
        # Rounded at random, a group spans all 256 levels or all but one or two.
        off = [
            jnp.abs(k - jnp.round(k)).max(1)
            for k in (kernel / (width[:, None] / n) for n in (255, 254, 253))
        ]
        assert jnp.max(jnp.min(jnp.stack(off), 0)) <= 1e-3
    assert jnp.max(jnp.abs(got["kernel"] - expected["kernel"])) > 0


@pytest.mark.slow
def test_a_leaf_that_cannot_take_the_default_is_on_no_grid():
    start = {"kernel": normal("k", (6, 4)), "gain": normal("g", (4,)), "scale": normal("s", ())}
    zero = jax.tree.map(jnp.zeros_like, start)
    got, _ = run(oxs.q_galore(0.01, oxs.LowRank(2), weights=oxs.Affine(4)), start, [zero])
    assert_equal({**got, "kernel": 0}, {**start, "kernel": 0})
    assert not jnp.array_equal(got["kernel"], start["kernel"])


@pytest.mark.slow
def test_weights_in_codes_follow_the_same_trajectory():
    """The grid inside the optimizer, and the container with its own `apply_updates`."""
    codec = oxs.Affine(group=16)
    table = oxs.rules(("kernel", oxs.LowRank(2, period=3)), default=None)
    weights = oxs.weights.quantize_weights(normal_tree("w", SMALL), codec)
    params = oxs.weights.merge(weights)
    tx, plain = (oxs.q_galore(0.01, table, weights=w, seed=7) for w in (codec, None))
    grads = [normal_tree(t, SMALL) for t in range(10)]
    state, step = plain.init(params), jax.jit(plain.update)
    for t, (expected, _) in enumerate(trajectory(tx, params, grads)):
        updates, state = step(grads[t], state, oxs.weights.merge(weights))
        key = jax.random.fold_in(jax.random.key(7), t)
        weights = oxs.apply_updates(weights, updates, key)
        got = oxs.weights.merge(weights)
        level = jnp.max(weights["kernel"].code.scale)
        assert jnp.max(jnp.abs(got["kernel"] - expected["kernel"])) <= 1e-3 * level
        assert_equal(got["bias"], expected["bias"])
