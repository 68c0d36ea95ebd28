"""Limiting cases and invariances of low-rank projection, exact in exact arithmetic."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes_table import assert_close, normal, run, types
from tolerances import LIMIT, reordered, rounding

import optax_structured as oxs
from optax_structured import SVD, Axes, LowRank, SubspaceIteration, low_rank_projection
from optax_structured.low_rank import Scaling

pytestmark = pytest.mark.usefixtures("x64")

EXACT = reordered(jnp.float64)
SHAPE = (6, 4)
STEPS = 6

VIEWS = {
    "wide": ((4, 6), Axes()),
    "square": ((5, 5), Axes()),
    **{side: (SHAPE, Axes(side=side)) for side in ("small", "large", "rows", "cols")},
    "stack": ((3, *SHAPE), Axes()),
    "two batch axes": ((2, 3, *SHAPE), Axes(side="rows")),
    "convolution": ((2, 2, 3, 5), Axes(rows=(0, 1, 2), cols=3)),
    "torch convolution": ((5, 3, 2, 2), Axes(rows=0, cols=(1, 2, 3))),
    "heads together": ((6, 2, 3), Axes(rows=0, cols=(1, 2))),
    "heads apart": ((6, 2, 3), Axes(rows=0, cols=2)),
}
every_view = pytest.mark.parametrize(("shape", "axes"), VIEWS.values(), ids=VIEWS)


def gradients(shape=SHAPE, steps=STEPS, dtype=jnp.float64):
    return [normal(("g", t), shape, dtype) for t in range(steps)]


def updates_of(tx, grads, *, look=lambda state: None):
    """The updates of a run, and what is seen in the states after them."""
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, g)
        yield updates, look(state)


def after(tx, grads):
    return run(tx, normal("w", grads[0].shape, grads[0].dtype), grads)[0]


# The projection alone


@pytest.mark.slow
@pytest.mark.parametrize("projector", [SVD(), SubspaceIteration()], ids=["svd", "iteration"])
@every_view
def test_the_identity_at_full_rank_returns_the_gradient(shape, axes, projector):
    """On the larger side only the fit itself: a basis has at most as many columns as rank G."""
    tx = low_rank_projection(optax.identity(), LowRank(99, 1, axes=axes, projector=projector))
    grads = gradients(shape)
    for (got, _), expected in zip(updates_of(tx, grads), grads, strict=True):
        assert_close(got, expected, 100 * EXACT)


@pytest.mark.slow
@every_view
def test_sgd_is_a_projected_gradient(shape, axes):
    spec = LowRank(2, 2, axes=axes, projector=SVD())
    frame, grads = spec.frame(shape), gradients(shape)
    tx = low_rank_projection(optax.scale(-0.1), spec, scale=0.5)
    seen = updates_of(tx, grads, look=lambda s: s.bases[""])
    for (got, basis), g in zip(seen, grads, strict=True):
        projection = jnp.swapaxes(basis, -1, -2) @ basis
        assert_close(got, frame.restore(-0.05 * projection @ frame.orient(g)), EXACT)


def test_adam_at_full_rank_is_adam_in_rotated_coordinates():
    """With the basis that the first gradient gives; the second side of a tall leaf is the small."""
    grads = gradients()
    tx = low_rank_projection(optax.scale_by_adam(), LowRank(4, 99, projector=SVD()))
    (_, basis), *_ = updates_of(tx, grads, look=lambda s: s.bases[""])
    adam = optax.scale_by_adam()
    rotated = updates_of(adam, [g @ basis.T for g in grads])
    for (got, _), (expected, _) in zip(updates_of(tx, grads), rotated, strict=True):
        assert_close(got, expected @ basis, 10 * EXACT)


def test_leaves_that_are_not_projected_get_the_inner_transformation():
    table = oxs.rules(("plain", None), default=LowRank(2))
    tx = low_rank_projection(optax.scale_by_adam(), table, scale=0.1)
    grads = [{"plain": g, "kernel": -g} for g in gradients()]
    expected = updates_of(optax.scale_by_adam(), [g["plain"] for g in grads])
    for (got, _), (alone, _) in zip(updates_of(tx, grads), expected, strict=True):
        assert_close(got["plain"], alone, EXACT)


# Signs of the basis


@dataclasses.dataclass(frozen=True)
class Flipping(SVD):
    """An SVD whose columns have signs of its seed's choice, other ones at each fit."""

    seed: int = 0

    def refit(self, step):
        new, usable = super().refit(step)
        key = jax.random.fold_in(jax.random.key(self.seed), step.seed)
        signs = jax.random.rademacher(key, new.shape[-2:-1], new.dtype)
        return new * signs[:, None], usable


def flipped(transport, dtype, seed):
    spec = LowRank(2, 2, projector=Flipping(seed), transport=transport)
    return after(oxs.galore(0.1, spec, b2=0.99), gradients(steps=9, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("transport", [oxs.Rotate(), oxs.Align(), oxs.Reset()], ids=repr)
def test_moving_with_the_basis_makes_its_signs_irrelevant(transport, dtype):
    first, *others = (flipped(transport, dtype, seed) for seed in range(3))
    for other in others:
        assert_close(other, first, 10 * rounding(dtype))


def test_keeping_moments_makes_signs_matter():
    first, second = (flipped(oxs.Keep(), jnp.float64, seed) for seed in range(2))
    assert jnp.max(jnp.abs(first - second)) > 1e-2


# What the subspace leaves out


def test_fira_does_not_depend_on_the_scale_of_the_gradients():
    tx = oxs.fira(0.1, LowRank(2, 2, projector=SVD()), eps=1e-30)
    expected = after(tx, [1e9 * g for g in gradients()])
    assert_close(after(tx, [2e12 * g for g in gradients()]), expected, 100 * EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "axes", "per"),
    [*((*view, "column") for view in VIEWS.values()), (SHAPE, Axes(), "matrix")],
    ids=[*VIEWS, "one factor a matrix"],
)
def test_the_residual_grows_by_at_most_the_factor(shape, axes, per):
    """It is what Fira adds to GaLore, as both have the same bases and moments."""
    growth, eps = 1.01, 1e-8
    common = LowRank(1, 2, axes=axes, projector=SVD())
    residual = oxs.NormScaled(growth=growth, per=per)
    specs = dataclasses.replace(common, residual=residual), common
    tx, plain = (
        low_rank_projection(oxs.transforms.uncorrected_adam(), s, scale=0.25) for s in specs
    )
    zero = jnp.zeros(shape)
    grads = [zero, zero, *gradients(shape, 4), zero, *gradients(shape, 8)]
    norms = functools.partial(jnp.linalg.norm, axis=(-2, -1))
    last, limited = jnp.zeros(axes.matrix_shape(shape)[:-2]), False
    seen = updates_of(tx, grads, look=lambda s: s.residual[""])
    for (got, kept), (without, _) in zip(seen, updates_of(plain, grads), strict=True):
        norm = norms(axes.to_matrix(got - without))
        assert jnp.all((norm <= growth * (last + eps) * (1 + LIMIT)) | (last == 0))
        limited |= bool(jnp.any((last > 0) & (norm > 1.005 * last)))
        last = jnp.where(norm > 1e-12, norm, last)
        np.testing.assert_allclose(kept, last, rtol=1e-6)
    assert limited


def test_fira_without_limit_adds_the_rest_in_the_step_size_of_its_column():
    spec = LowRank(2, 2, projector=SVD(), residual=oxs.NormScaled(growth=jnp.inf, exact=True))
    tx = low_rank_projection(optax.scale(3.0), spec, scale=0.5)
    grads = [1e6 * g for g in gradients()]  # far above the 1e-8 that is added to norms
    seen = updates_of(tx, grads, look=lambda s: s.bases[""])
    for (got, basis), g in zip(seen, grads, strict=True):
        inside = g @ basis.T @ basis
        assert_close(got, 1.5 * inside + 3.0 * (g - inside), 10 * EXACT)


def test_fira_at_full_rank_is_galore():
    spec = LowRank(4, 2, projector=SVD())
    expected = after(oxs.galore(0.1, spec, scale=1.0), gradients())
    assert_close(after(oxs.fira(0.1, spec, scale=1.0), gradients()), expected, 10 * EXACT)


def test_fira_without_its_inside_is_apollo():
    spec = LowRank(2, 2, projector=SVD())
    expected = after(oxs.apollo(0.1, spec), gradients())
    assert_close(after(oxs.fira(0.1, spec, scale=0.0), gradients()), expected, 10 * EXACT)


def test_apollo_mini_is_apollo_with_one_factor():
    spec = LowRank(1, 2, residual=Scaling(per="matrix"))
    expected = after(oxs.apollo(0.1, spec, scale=128**0.5), gradients())
    assert_close(after(oxs.apollo_mini(0.1, LowRank(1, 2)), gradients()), expected, EXACT)


@pytest.mark.slow
@every_view
def test_scaling_around_the_identity_is_the_gradient(shape, axes):
    """Whatever the projection: what comes out is as long as what went in."""
    spec = LowRank(2, 2, axes=axes, residual=Scaling(growth=jnp.inf))
    spec = dataclasses.replace(spec, projector=oxs.RandomProjection())
    tx = low_rank_projection(optax.identity(), spec, scale=0.5)
    for (got, _), g in zip(updates_of(tx, gradients(shape)), gradients(shape), strict=True):
        assert_close(got, 0.5 * g, 1e-6)


# Precision


def test_narrow_parameters_take_wide_gradients():
    grads = gradients(dtype=jnp.float32)
    tx = oxs.galore(0.1, LowRank(2, 2))
    narrow, wide = (tx.init(normal("w", SHAPE, dtype)) for dtype in ("bfloat16", "float32"))
    assert types(narrow) == types(wide)
    for g in grads:
        got, narrow = tx.update(g, narrow)
        expected, wide = tx.update(g, wide)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
@every_view
def test_products_in_bfloat16_are_near(shape, axes):
    grads = gradients(shape, dtype=jnp.float32)
    wide = LowRank(2, 2, axes=axes, projector=SVD())
    narrow = dataclasses.replace(wide, dtype="bfloat16")
    got, expected = (
        updates_of(low_rank_projection(optax.trace(0.9), spec), grads) for spec in (narrow, wide)
    )
    for (g, _), (e, _) in zip(got, expected, strict=True):
        assert g.dtype == jnp.float32
        assert_close(g, e, reordered("bfloat16"))


@pytest.mark.parametrize("shape", [(32, 96), (96, 32)])
def test_both_products_read_bfloat16(monkeypatch, shape):
    """Neither is widened on the way to the compiler's kernels, whatever the side."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    spec = LowRank(16, 10, projector=oxs.RandomProjection(), dtype="bfloat16")
    tx = low_rank_projection(optax.scale_by_adam(), spec)
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, params)
    program = jax.jit(tx.update).lower(params, state).compile().as_text()
    kinds = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", program))
    products = re.findall(r" dot\((.*?)\)", program)
    assert len(products) == 2
    for operands in products:
        assert [kinds[x.strip(" %")] for x in operands.split(",")] == ["bf16", "bf16"]


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (4, 96, 32)])
def test_a_refit_copies_no_gradient(shape):
    tx = low_rank_projection(optax.identity(), LowRank(16, 10, projector=SubspaceIteration()))
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, params)
    program = jax.jit(tx.update).lower(params, state).compile().as_text()
    assert " dot(" in program
    *batch, m, n = shape
    either_way = "|".join(",".join(map(str, (*batch, *sides))) for sides in ((m, n), (n, m)))
    assert not re.search(rf" = \w+\[({either_way})\]\S* copy\(", program)
