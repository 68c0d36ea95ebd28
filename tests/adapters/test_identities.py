"""Identities of the published methods that no other file here checks, one test a fact."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import optax_structured as oxs
from optax_structured.adapters import (
    SNELL,
    Codebook,
    Damped,
    Full,
    LoRA,
    MinimumNorm,
    Pair,
    SVFit,
    Triplets,
    attach,
    constants,
    factored,
    init,
    lora_pro,
    merge,
)
from optax_structured.adapters.snell import sparsified

KEY = jax.random.key(0)
X64 = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def moved(adapter):
    return jax.tree.map(lambda x: x + 0.1 * normal(*x.shape, seed=x.size), adapter)


def lora(spec, weight):
    return moved(init(KEY, {"w": weight}, spec))["w"]


# LoRA


@X64
def test_the_update_has_at_most_the_rank():
    w = normal(6, 5)
    update = merge({"w": w}, {"w": lora(LoRA(2), w)})["w"] - w
    assert np.linalg.matrix_rank(update, tol=1e-10) == 2


@X64
def test_only_the_product_of_the_factors_matters():
    w = normal(6, 5)
    pair = lora(LoRA(2), w)
    other = Pair(pair.a / 4, 4 * pair.b, pair.scale, pair.axes)
    got, want = (merge({"w": w}, {"w": x})["w"] for x in (other, pair))
    np.testing.assert_allclose(got, want, atol=1e-14)


@X64
def test_what_was_merged_can_be_taken_off():
    w = normal(6, 5)
    pair = lora(LoRA(2), w)
    off = Pair(pair.a, pair.b, -pair.scale, pair.axes)
    again = merge(merge({"w": w}, {"w": pair}), {"w": off})["w"]
    np.testing.assert_allclose(again, w, atol=1e-14)


def test_the_root_scale():
    assert LoRA(4, alpha=6.0, scaling="root").scale == 3.0
    assert LoRA(4, alpha=6.0).scale == 1.5


@X64
def test_b_alone_at_full_rank_is_full_descent():
    """With a fixed orthonormal a, and s = 1."""
    w, g = normal(4, 6), normal(4, 6, seed=1)
    q, _ = np.linalg.qr(normal(4, 4, seed=2))
    pair = {"w": Pair(jnp.asarray(q), jnp.zeros((6, 4)))}
    gradient = jax.grad(lambda p: jnp.vdot(merge({"w": w}, p)["w"], g))(pair)["w"]
    stepped = {"w": Pair(pair["w"].a, -0.1 * gradient.b)}
    np.testing.assert_allclose(merge({"w": w}, stepped)["w"], w - 0.1 * g, atol=1e-14)


def test_half_precision_is_rounded_once():
    """Numbers for which the sum in float32 is exact."""
    pair = Pair(jnp.array([[1.0, 2.0**-9]]), jnp.array([[1.0], [2.0**-6]]), 1.0)
    w = jnp.ones((2, 2), jnp.bfloat16)
    with pytest.warns(UserWarning, match="rounds the sum"):
        got = merge({"w": w}, {"w": pair})["w"]
    exact = w.astype(jnp.float32) + pair.a.T @ pair.b.T
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_the_branch_of_a_new_adapter_changes_no_bit():
    model, x = nn.Dense(4), normal(3, 6)
    params = model.init(KEY, x)
    with factored(init(KEY, params, LoRA(2))):
        got = model.apply(params, x)
    np.testing.assert_array_equal(got, model.apply(params, x))


EVERY = [LoRA(2), LoRA(2, start="svd"), SVFit(2), SNELL(2), Codebook(2), Full()]


def test_donated_adapters_leave_the_weights():
    """No array of a new adapter is a buffer of the weights."""
    params = {str(i): normal(6, 4, seed=i) for i in range(len(EVERY))}
    adapter = init(KEY, params, oxs.rules(*((str(i), spec) for i, spec in enumerate(EVERY))))
    jax.jit(lambda x: jax.tree.map(lambda x: x + 1, x), donate_argnums=0)(adapter)
    assert adapter["0"].a.is_deleted()
    assert not any(w.is_deleted() for w in params.values())


# Where a layer uses what is attached


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 4)(ids)
        stack = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack()(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4)(x)), None


def same_attached(apply, params, table):
    adapter = moved(init(KEY, params, table))
    got, want = (jax.grad(lambda ad, w=w: apply(w(params, ad)))(adapter) for w in (attach, merge))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(y).max() > 0
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1.0, np.abs(y).max()))


def test_attached_under_scan_and_remat_and_in_an_embedding():
    ids = jnp.array([1, 3])
    params = Scanned().init(KEY, ids)
    table = oxs.rules(("bias", None), default=LoRA(2))
    same_attached(lambda p: jnp.sum(jnp.sin(Scanned().apply(p, ids))), params, table)


def test_attached_in_equinox():
    embedding, attention = eqx.nn.Embedding(5, 4, key=KEY), eqx.nn.MultiheadAttention(2, 4, key=KEY)

    def apply(params):
        embedding, attention = params
        x = jax.vmap(embedding)(jnp.array([0, 2, 3]))
        return jnp.sum(jnp.sin(attention(x, x, x)))

    same_attached(apply, (embedding, attention), LoRA(2))


def test_a_primitive_refuses_what_is_attached():
    conv = eqx.nn.Conv1d(2, 3, 3, key=KEY)
    table = oxs.rules(("weight", LoRA(2, axes=oxs.Axes((1, 2), 0))), default=None)
    attached = attach(conv, init(KEY, conv, table))
    with pytest.raises((TypeError, ValueError)):
        attached(jnp.ones((2, 5)))


# SVFit


@X64
def test_the_signs_of_singular_vectors_do_not_matter():
    params = {"w": normal(6, 4)}
    adapter = moved(init(KEY, params, SVFit(2)))
    left, values, right = constants(params, adapter)["w"]
    signs = jnp.array([1.0, -1.0])
    turned = {"w": Triplets(left * signs, values, right * signs[:, None])}
    got, want = merge(params, adapter, turned)["w"], merge(params, adapter)["w"]
    np.testing.assert_allclose(got, want, atol=1e-14)


@X64
def test_singular_values_move_in_a_space_of_their_number():
    params = {"w": normal(6, 5)}
    update = merge(params, moved(init(KEY, params, SVFit(2))))["w"] - params["w"]
    assert np.linalg.matrix_rank(update, tol=1e-10) == 2


@X64
@pytest.mark.parametrize("spec", [SVFit(2), LoRA(2, start="svd")])
def test_nothing_is_differentiated_through_the_svd(spec):
    params, g = {"w": normal(5, 4)}, normal(5, 4, seed=1)
    adapter = moved(init(KEY, params, spec))
    got = jax.grad(lambda p: jnp.vdot(merge(p, adapter)["w"], g))(params)["w"]
    np.testing.assert_array_equal(got, g)


# SNELL


@X64
def test_without_sparsity_the_hard_rule_squares_all_but_the_smallest():
    dense = normal(5, 6)
    got = sparsified(dense, jnp.asarray(0.0), "hard")
    smallest = np.abs(dense) == np.abs(dense).min()
    np.testing.assert_allclose(got, np.where(smallest, 0, dense * np.abs(dense)), atol=1e-15)


def test_the_forward_pass_keeps_no_dense_update():
    params = {"w": normal(12, 10)}
    adapter = init(KEY, params, SNELL(2))
    known = constants(params, adapter)
    pull = jax.eval_shape(lambda ad: jax.vjp(lambda x: merge(params, x, known), ad)[1], adapter)
    assert all(x.size < 12 * 10 for x in jax.tree.leaves(pull))


# LoRA-Pro


@X64
@pytest.mark.parametrize("solver", [MinimumNorm(), Damped()], ids=["published", "damped"])
@pytest.mark.parametrize("zero", ["a", "b"])
def test_one_factor_of_zeros_gives_numbers(solver, zero):
    pair = Pair(normal(2, 5), normal(6, 2, seed=1), 1.5)
    pair = Pair(*(0 * getattr(pair, x) if x == zero else getattr(pair, x) for x in "ab"), 1.5)
    g = normal(6, 5, seed=2)
    gradient = Pair(1.5 * pair.b.T @ g, 1.5 * g @ pair.a.T, 1.5)
    got, _ = lora_pro(solver).update(gradient, optax.EmptyState(), pair)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(got))
    assert not np.any(getattr(got, "b" if zero == "a" else "a"))


@X64
def test_a_small_step_moves_the_weight_by_the_projection():
    w, target = normal(6, 5), normal(6, 5, seed=3)
    pair = lora(LoRA(2), w)

    def loss(pair):
        return 0.5 * jnp.sum(jnp.square(merge({"w": w}, {"w": pair})["w"] - target))

    direction, _ = lora_pro(MinimumNorm(0.0)).update(jax.grad(loss)(pair), None, pair)
    stepped = jax.tree.map(lambda x, d: x - 1e-8 * d, pair, direction)
    before, after = (merge({"w": w}, {"w": x})["w"] for x in (pair, stepped))
    inputs, outputs = (x @ np.linalg.pinv(x) for x in (pair.a.T, pair.b))
    g = before - target
    want = inputs @ g + g @ outputs - inputs @ g @ outputs
    np.testing.assert_allclose((before - after) / 1e-8, want, atol=1e-5)


@X64
def test_the_imbalance_of_the_factors_is_kept():
    """To first order."""
    pair = Pair(normal(2, 5), normal(6, 2, seed=1), 1.5)
    g = normal(6, 5, seed=2)
    d, _ = lora_pro(MinimumNorm(0.0)).update(
        Pair(1.5 * pair.b.T @ g, 1.5 * g @ pair.a.T, 1.5), None, pair
    )
    of_b, of_a = pair.b.T @ d.b, d.a @ pair.a.T
    np.testing.assert_allclose(of_b + of_b.T, of_a + of_a.T, atol=1e-12)


# Matrix sensing


@X64
def test_one_factor_is_slower_than_two():
    """Width 3 for rank 2: squared errors of order 1/T^2, against a geometric rate."""
    q, _ = np.linalg.qr(normal(6, 6))
    target = jnp.asarray(q[:, :2] @ np.diag([1.0, 0.7]) @ q[:, :2].T)

    def run(step, start):
        def scanned(carry, _):
            carry = step(carry)
            return carry, jnp.linalg.norm(carry[0] @ carry[-1].T - target)

        return jax.lax.scan(scanned, start, length=4000)[1]

    def one(factors):
        (x,) = factors
        return (x - 0.25 * (x @ x.T - target) @ x,)

    def two(factors):
        f, g = factors
        e = f @ g.T - target
        return f - 0.25 * e @ g, g - 0.25 * e.T @ f

    x = 0.3 * normal(6, 3, seed=1)
    symmetric = run(one, (x,))
    asymmetric = run(two, (x, 0.1 * normal(6, 3, seed=2)))
    steps = np.array([999, 1999, 3999])
    assert np.min(np.square(symmetric[steps]) * np.square(steps)) > 1.0
    drop = np.log(asymmetric[steps[0]]) - np.log(asymmetric[steps[1]])
    assert drop > 5.0
