"""Projectors: orthonormal always, near the SVD where they promise it, one matrix like many."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tolerances import CAPTURED, ORTHONORMAL, SAMPLED, reordered, rounding

from optax_structured.projectors import (
    DCT,
    SVD,
    RandomizedRange,
    RandomProjection,
    Refit,
    SubspaceIteration,
    Tucker,
    TwoSided,
    cosines,
)
from optax_structured.projectors.products import lift, project
from optax_structured.projectors.tucker import fractional_rank
from optax_structured.trees import Axes

FITTED = [
    SVD(),
    SubspaceIteration(),
    SubspaceIteration(iterations=2),
    SubspaceIteration(orthonormalize="cholesky"),
    RandomizedRange(),
    RandomizedRange(oversampling=0, power=0),
]
KINDS = [
    SVD(),
    SubspaceIteration(),
    SubspaceIteration(orthonormalize="cholesky"),
    RandomizedRange(),
]
CHOSEN = [DCT(score=score, kind=kind) for score in ("l1", "l2") for kind in ("dct3", "dct2")]
ORTHONORMAL_ONES = [*FITTED, *CHOSEN, RandomProjection(distribution="orthonormal")]
SHAPE, RANK, PLAIN = (24, 40), 7, Axes()


def frame_of(shape, rank, side="rows", projector=SVD()):  # noqa: B008  (frozen)
    return projector.frame(shape, Axes(side=side), rank)


@functools.partial(jax.jit, static_argnums=(0, 1))
def refit(projector, frame, basis, gradient, fitted, key):
    due = jnp.ones(frame.batch, bool)
    return projector.refit(Refit(frame, basis, frame.turn(gradient), due, fitted, key))[0]


def fit(projector, frame, gradient, basis=None, seed=0, name="w"):
    """A basis, cold without one before."""
    warm = basis is not None
    basis = basis if warm else projector.init(frame, gradient.dtype, name)
    for again in range(1 if warm else projector.first_fits):
        fitted = jnp.full(frame.batch, warm or again > 0)
        basis = refit(projector, frame, basis, gradient, fitted, jnp.uint32(seed))
    return basis


def fit_matrix(projector, frame, gradient, basis=None, seed=0):
    return matrix_of(projector, frame, fit(projector, frame, gradient, basis, seed))


def matrix_of(projector, frame, basis):
    """P, (*batch, size, rank)."""
    return jnp.swapaxes(projector.factors(frame, basis), -1, -2)


def round_trip(projector, frame, basis, leaf):
    """The low-rank leaf, and what it stands for."""
    factors = projector.factors(frame, basis)
    low = project(frame, factors, frame.axes.to_matrix(leaf))
    return low, frame.axes.from_matrix(lift(frame, factors, low), leaf.shape)


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def with_spectrum(shape, sigma, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, len(sigma))))[0] for n in shape)
    return jnp.asarray((u * sigma) @ v.T, jnp.float32)


def defect(p):
    p = np.asarray(p, np.float64)
    return np.abs(np.swapaxes(p, -1, -2) @ p - np.eye(p.shape[-1])).max()


def energy(p, gradient):
    p, gradient = np.asarray(p, np.float64), np.asarray(gradient, np.float64)
    return np.linalg.norm(p.T @ gradient)


def best_energy(gradient, rank):
    return np.linalg.norm(np.linalg.svd(np.asarray(gradient, np.float64))[1][:rank])


def cosine_matrix(n):
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    c = np.sqrt(2 / n) * np.cos(np.pi * i * (2 * j + 1) / (2 * n))
    c[0] /= np.sqrt(2)
    return c


def hard_gradients(dtype):
    plain = normal(SHAPE, 1, dtype)
    return {
        "plain": plain,
        "zero": jnp.zeros(SHAPE, dtype),
        "one entry": jnp.zeros(SHAPE, dtype).at[3, 5].set(1.0),
        "rank 2": normal((24, 2), 2, dtype) @ normal((2, 40), 3, dtype),
        "equal rows": jnp.broadcast_to(plain[:1], SHAPE),
        "steep": with_spectrum(SHAPE, 10.0 ** -np.arange(24)).astype(dtype),
        "tiny": 1e-30 * plain,
        "huge": 1e30 * plain,
    }


class TestOrthonormality:
    @pytest.mark.slow
    @pytest.mark.parametrize("projector", ORTHONORMAL_ONES, ids=repr)
    def test_float32(self, projector):
        self.check(projector, jnp.float32)

    @pytest.mark.slow
    @pytest.mark.parametrize("projector", ORTHONORMAL_ONES, ids=repr)
    def test_float64(self, projector, x64):
        self.check(projector, jnp.float64)

    def check(self, projector, dtype):
        assert projector.orthonormal
        frame = frame_of(SHAPE, RANK)
        warm = None
        for name, gradient in hard_gradients(dtype).items():
            cold = fit(projector, frame, gradient)
            warm = fit(projector, frame, gradient, cold if warm is None else warm)
            bases = [cold, warm]
            if name == "zero":  # which is no basis
                np.testing.assert_array_equal(bases.pop(0), projector.init(frame, dtype, "w"))
            for basis in bases:
                p = matrix_of(projector, frame, basis)
                assert p.shape == (24, RANK), name
                assert p.dtype == dtype, name
                assert defect(p) < ORTHONORMAL[jnp.dtype(dtype).name], name

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("projector", "shape"),
        [(p, (6, 9)) for p in ORTHONORMAL_ONES] + [(p, (9, 6)) for p in FITTED],
        ids=repr,
    )
    def test_full_rank_is_the_identity(self, projector, shape):
        rank = min(shape)
        frame = frame_of(shape, rank)
        gradient = normal(shape)
        _, back = round_trip(projector, frame, fit(projector, frame, gradient), gradient)
        np.testing.assert_allclose(back, gradient, atol=1e-5)

    @pytest.mark.slow
    def test_float32_leaves_stay_float32_where_float64_is_enabled(self, x64):
        frame = frame_of(SHAPE, RANK)
        gradient = normal(SHAPE)
        for projector in (SubspaceIteration(), DCT(), RandomProjection()):
            basis = fit(projector, frame, gradient)
            for result in round_trip(projector, frame, basis, gradient):
                assert result.dtype == jnp.float32


class TestQuality:
    SIZE, LENGTH, RANK = 128, 320, 32
    GRADIENTS = {
        "i^-0.5": with_spectrum((SIZE, LENGTH), np.arange(1.0, SIZE + 1) ** -0.5),
        "i^-1": with_spectrum((SIZE, LENGTH), np.arange(1.0, SIZE + 1) ** -1.0),
        "i^-1.5": with_spectrum((SIZE, LENGTH), np.arange(1.0, SIZE + 1) ** -1.5),
        "low rank + noise": with_spectrum((SIZE, LENGTH), np.ones(8), 1)
        + 0.01 * normal((SIZE, LENGTH), 2),
    }

    @pytest.mark.parametrize("spectrum", GRADIENTS)
    @pytest.mark.parametrize(
        "projector",
        [
            SubspaceIteration(),
            SubspaceIteration(orthonormalize="cholesky"),
            RandomizedRange(power=2),
        ],
        ids=repr,
    )
    def test_cold(self, projector, spectrum):
        gradient = self.GRADIENTS[spectrum]
        frame = frame_of(gradient.shape, self.RANK)
        p = fit_matrix(projector, frame, gradient)
        assert energy(p, gradient) >= CAPTURED * best_energy(gradient, self.RANK)

    @pytest.mark.parametrize("spectrum", GRADIENTS)
    @pytest.mark.parametrize("orthonormalize", ["qr", "cholesky"])
    def test_one_warm_step(self, orthonormalize, spectrum):
        """From the basis of a gradient that was half noise."""
        gradient = self.GRADIENTS[spectrum]
        noise = normal(gradient.shape, 5)
        before = gradient + 0.5 * noise * jnp.linalg.norm(gradient) / jnp.linalg.norm(noise)
        frame = frame_of(gradient.shape, self.RANK)
        projector = SubspaceIteration(orthonormalize=orthonormalize)
        p = fit_matrix(projector, frame, gradient, fit(SVD(), frame, before))
        assert energy(p, gradient) >= CAPTURED * best_energy(gradient, self.RANK)

    def test_randomized_range_is_the_svd_where_it_sees_everything(self):
        gradient = with_spectrum((24, 40), 2.0 ** -np.arange(5))
        frame = frame_of(gradient.shape, 3)
        np.testing.assert_allclose(
            fit(RandomizedRange(), frame, gradient), fit(SVD(), frame, gradient), atol=1e-5
        )

    def test_svd(self):
        gradient = normal(SHAPE)
        p = np.asarray(fit_matrix(SVD(), frame_of(SHAPE, RANK), gradient))
        u = np.linalg.svd(np.asarray(gradient))[0][:, :RANK]
        largest = u[np.abs(u).argmax(0), np.arange(RANK)]
        np.testing.assert_allclose(p, u * np.sign(largest), atol=1e-5)


class TestBatches:
    @pytest.mark.slow
    @pytest.mark.parametrize("projector", [*KINDS, DCT(), TwoSided()], ids=repr)
    def test_a_batch_is_a_loop(self, projector):
        gradient = normal((3, *SHAPE))
        frame, one = (frame_of(s, RANK, projector=projector) for s in (gradient.shape, SHAPE))
        low, back = round_trip(projector, frame, fit(projector, frame, gradient), gradient)
        assert low.shape == frame.low_shape
        for k in range(3):
            basis = fit(projector, one, gradient[k])
            low_k, back_k = round_trip(projector, one, basis, gradient[k])
            np.testing.assert_allclose(low[k], low_k, atol=1e-4)
            np.testing.assert_allclose(back[k], back_k, atol=1e-4)

    @pytest.mark.slow
    def test_two_batch_axes(self):
        gradient = normal((2, 3, *SHAPE))
        frame = frame_of(gradient.shape, RANK)
        for projector in (SubspaceIteration(), RandomProjection(distribution="orthonormal"), DCT()):
            p = fit_matrix(projector, frame, gradient)
            assert p.shape == (2, 3, 24, RANK)
            assert defect(p) < ORTHONORMAL["float32"]

    @pytest.mark.slow
    @pytest.mark.parametrize("projector", [*KINDS, DCT()], ids=repr)
    def test_vmap_over_seeds(self, projector):
        gradient = normal((2, *SHAPE))
        frame = frame_of(SHAPE, RANK)
        before = jnp.stack([projector.init(frame, jnp.float32, "w")] * 2)
        fitted = jnp.array([True, False])
        if jnp.issubdtype(before.dtype, jnp.floating):
            before = before.at[0].set(fit(SVD(), frame, gradient[1]))
        keys = jnp.arange(2, dtype=jnp.uint32)
        many = jax.vmap(functools.partial(refit, projector, frame))(before, gradient, fitted, keys)
        for k in range(2):
            one = refit(projector, frame, before[k], gradient[k], fitted[k], keys[k])
            np.testing.assert_allclose(many[k], one, atol=1e-4)

    def test_sides(self):
        gradient = normal(SHAPE)
        for projector in (SVD(), DCT()):
            rows = frame_of(SHAPE, RANK)
            cols = frame_of(SHAPE[::-1], RANK, "cols")
            assert (cols.size, cols.length) == SHAPE
            np.testing.assert_array_equal(
                fit(projector, rows, gradient),
                fit(projector, cols, cols.orient(gradient.T)),
            )


@pytest.mark.slow
@pytest.mark.parametrize("spec", [("d", None), (None, "d"), ("d", "t")], ids=str)
@pytest.mark.parametrize("projector", [*KINDS, DCT(), DCT(kind="dct2"), TwoSided()], ids=repr)
def test_explicit_meshes(projector, spec):
    """Any axis may be sharded; the basis stays where it was."""
    gradient, frame = normal(SHAPE), frame_of(SHAPE, 4, projector=projector)
    expected = projector.factors(frame, fit(projector, frame, gradient))
    mesh = jax.make_mesh((4, 2), ("d", "t"))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(gradient, NamedSharding(mesh, PartitionSpec(*spec)))
        basis = fit(projector, frame, sharded)
        before = jax.tree.map(jax.typeof, projector.init(frame, jnp.float32, "w"))
        assert jax.tree.map(jax.typeof, basis) == before
        p = projector.factors(frame, basis)
    for one, other in zip(jax.tree.leaves(p), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


class TestSubspaceIteration:
    @pytest.mark.parametrize("orthonormalize", ["qr", "cholesky"])
    def test_signs_of_the_old_basis_pass_through(self, orthonormalize):
        projector = SubspaceIteration(iterations=2, orthonormalize=orthonormalize)
        frame = frame_of(SHAPE, RANK)
        gradient = normal(SHAPE)
        before = fit(SVD(), frame, normal(SHAPE, 4))
        signs = jnp.array([1.0, -1, -1, 1, -1, 1, -1])
        p = fit_matrix(projector, frame, gradient, before)
        flipped = fit_matrix(projector, frame, gradient, before * signs[:, None])
        np.testing.assert_allclose(flipped, p * signs, atol=rounding("float32"))

    def test_both_factorisations_agree(self):
        frame = frame_of(SHAPE, RANK)
        gradient = normal(SHAPE)
        before = fit(SVD(), frame, normal(SHAPE, 4))
        qr, cholesky = (
            fit(SubspaceIteration(orthonormalize=name), frame, gradient, before)
            for name in ("qr", "cholesky")
        )
        np.testing.assert_allclose(qr, cholesky, atol=reordered("float32"))

    def test_converges_to_the_svd(self):
        gradient = with_spectrum(SHAPE, 2.0 ** -np.arange(24))
        frame = frame_of(SHAPE, 3)
        p = fit_matrix(SubspaceIteration(first_fits=20), frame, gradient)
        u = fit_matrix(SVD(), frame, gradient)
        np.testing.assert_allclose(p @ p.T, u @ u.T, atol=1e-5)

    def test_the_start_depends_on_the_name_only(self):
        frame = frame_of(SHAPE, RANK)
        one, same, other = (
            fit(SubspaceIteration(), frame, normal(SHAPE), name=name) for name in ("a", "a", "b")
        )
        np.testing.assert_array_equal(one, same)
        assert not np.allclose(one, other)


class TestRandomProjection:
    def matrix(self, name="w", draws=1, shape=SHAPE, **options):
        projector, frame = RandomProjection(**options), frame_of(shape, RANK)
        basis = projector.init(frame, jnp.float32, name)
        assert basis.dtype == jnp.uint32
        assert basis.shape == frame.batch
        for _ in range(draws):
            basis = fit(projector, frame, jnp.ones(shape), basis)
        return np.asarray(matrix_of(projector, frame, basis))

    @pytest.mark.slow
    @pytest.mark.parametrize("distribution", ["gaussian", "orthonormal"])
    def test_the_same_twice_and_different_in_all_that_counts(self, distribution):
        matrix = functools.partial(self.matrix, distribution=distribution)
        np.testing.assert_array_equal(matrix(), matrix())
        all_different = [matrix(), matrix(name="v"), matrix(draws=2), matrix(seed=1)]
        all_different += list(matrix(shape=(2, *SHAPE))[1:])
        for a, b in itertools.combinations(all_different, 2):
            assert not np.allclose(a, b)

    def test_norms_are_kept_on_average(self):
        p = self.matrix(shape=(60, 300, 40))
        assert not RandomProjection().orthonormal
        assert abs(p.mean()) < SAMPLED
        assert abs(p.var() * RANK - 1) < SAMPLED

    def test_no_global_setting_changes_the_draws(self):
        before = self.matrix()
        with jax.default_prng_impl("rbg"):
            np.testing.assert_array_equal(self.matrix(), before)


class TestDCT:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["dct3", "dct2"])
    @pytest.mark.parametrize("n", [1, 2, 7, 36])
    def test_columns_and_coordinates(self, kind, n, x64):
        q = cosine_matrix(n) if kind == "dct3" else cosine_matrix(n).T
        columns = cosines.columns(n, jnp.arange(n), kind, jnp.float64)
        np.testing.assert_allclose(columns, q, atol=ORTHONORMAL["float64"])
        assert defect(columns) < ORTHONORMAL["float64"]
        x = normal((2, n, 5), dtype=jnp.float64)
        norms = cosines.coordinate_norms(x, kind, lambda s: jnp.sum(jnp.abs(s), -1))
        expected = np.abs(q.T @ np.asarray(x)).sum(-1)
        np.testing.assert_allclose(norms, expected, rtol=1e-12)

    @pytest.mark.parametrize("kind", ["dct3", "dct2"])
    def test_angles_of_long_axes_are_exact(self, kind):
        chosen = np.array([0, 1, 20000, 46338, 46339])
        n = cosines.MAX_SIZE
        columns = cosines.columns(n, jnp.asarray(chosen), kind, jnp.float32)
        assert defect(columns) < ORTHONORMAL["float32"]

    @pytest.mark.slow
    @pytest.mark.parametrize("score", ["l1", "l2"])
    @pytest.mark.parametrize("kind", ["dct3", "dct2", "matrix"])
    @pytest.mark.parametrize("side", ["rows", "cols"])
    def test_selection(self, score, kind, side, x64):
        leaf = normal((11, 10), 3, jnp.float64)
        frame = frame_of(leaf.shape, 4, side)
        gradient = frame.orient(leaf)
        projector = DCT(score=score, kind=kind)
        chosen = fit(projector, frame, gradient)
        assert chosen.dtype == jnp.int32
        by_columns = kind == "dct3" or (kind == "matrix" and side == "cols")
        c = cosine_matrix(frame.size)
        q = c if by_columns else c.T
        scores = np.linalg.norm(q.T @ np.asarray(gradient), 1 if score == "l1" else 2, axis=-1)
        np.testing.assert_array_equal(chosen, np.sort(np.argsort(-scores)[:4]))
        np.testing.assert_allclose(matrix_of(projector, frame, chosen), q[:, chosen], atol=1e-12)

    @pytest.mark.parametrize("score", ["l1", "l2"])
    def test_ties_go_to_the_lower_index(self, score):
        frame = frame_of((2, 3), 1)
        basis = fit(DCT(score=score), frame, jnp.zeros((2, 3)).at[0].set(1.0))
        np.testing.assert_array_equal(basis, [0])

    def test_l2_is_the_best_subset(self, x64):
        gradient = np.asarray(normal((8, 6), 2, jnp.float64))
        frame, projector, c = frame_of((8, 6), 3), DCT(score="l2"), cosine_matrix(8)
        p = fit_matrix(projector, frame, jnp.asarray(gradient))
        best = max(energy(c[:, list(s)], gradient) for s in itertools.combinations(range(8), 3))
        np.testing.assert_allclose(energy(p, gradient), best, rtol=1e-12)

    @pytest.mark.parametrize("seed", range(5))
    def test_contraction(self, seed, x64):
        gradient = normal(SHAPE, seed, jnp.float64)
        frame, projector = frame_of(SHAPE, RANK), DCT(score="l2")
        p = fit_matrix(projector, frame, gradient)
        left = gradient - p @ (p.T @ gradient)
        assert jnp.sum(left**2) <= (1 - RANK / 24) * jnp.sum(gradient**2) * (1 + 1e-12)

    def test_tiny_gradients_are_chosen_by_size_too(self):
        gradient, frame = normal(SHAPE), frame_of(SHAPE, RANK)
        for projector in CHOSEN:
            expected = fit(projector, frame, gradient)
            for scale in (2.0**-100, 2.0**90):
                np.testing.assert_array_equal(fit(projector, frame, scale * gradient), expected)

    def test_overlap_is_the_product(self, x64):
        frame, projector = frame_of((2, *SHAPE), RANK), DCT()
        old, new = (fit(projector, frame, normal((2, *SHAPE), s, jnp.float64)) for s in (0, 1))
        overlap = projector.overlap(frame, old, new)
        assert set(np.unique(overlap)) == {0.0, 1.0}
        p_old, p_new = (np.asarray(matrix_of(projector, frame, basis)) for basis in (old, new))
        np.testing.assert_allclose(overlap, np.swapaxes(p_new, -1, -2) @ p_old, atol=1e-12)


class TestTwoSided:
    @pytest.mark.parametrize("side", ["rows", "cols"])
    def test_both_sides_of_the_svd(self, side):
        gradient, projector = normal(SHAPE), TwoSided()
        frame = frame_of(SHAPE, RANK, side, projector)
        basis = fit(projector, frame, frame.orient(gradient))
        for one in basis:
            assert defect(one) < ORTHONORMAL["float32"]
        low, back = round_trip(projector, frame, basis, gradient)
        u, sigma, vt = np.linalg.svd(np.asarray(gradient))
        np.testing.assert_allclose(np.abs(low), np.diag(sigma[:RANK]), atol=1e-4)
        best = (u[:, :RANK] * sigma[:RANK]) @ vt[:RANK]
        np.testing.assert_allclose(back, best, atol=1e-4)

    def test_zero_is_no_basis(self):
        for side in fit(TwoSided(), frame_of(SHAPE, RANK, projector=TwoSided()), jnp.zeros(SHAPE)):
            assert not side.any()


class TestTucker:
    SHAPE = (3, 4, 6, 10)

    def frame(self, projector, shape, rank, axes=PLAIN):
        return projector.frame(shape, axes, rank)

    def fit(self, frame, leaf, projector=Tucker()):  # noqa: B008  (frozen)
        return fit(projector, frame, frame.orient(leaf))

    def test_ranks(self):
        def kept(shape, axes, rank):
            return Tucker().frame(shape, axes, rank).rank

        assert kept(self.SHAPE, Axes(), 5) == (3, 4, 5, 5)
        assert kept(self.SHAPE, Axes(), (2, 9, 1, 3)) == (2, 4, 1, 3)
        assert kept((7, *self.SHAPE), Axes((1, 2, 3), 4), 2) == (2, 2, 2, 2)
        assert kept((64, 32), Axes(), 8) == (8, 8)

    @pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
    def test_a_fraction_of_the_entries(self, fraction):
        sizes = (64, 48, 30)
        ranks = fractional_rank(sizes, fraction)
        entries, squares = np.prod(sizes), np.sum(np.square(sizes))
        c = np.roots([entries, 0, squares, -fraction * entries])
        c = float(c[np.abs(c.imag) < 1e-9].real.max())
        assert ranks == tuple(max(1, round(c * n)) for n in sizes)

    @pytest.mark.slow
    @pytest.mark.parametrize("axes", [Axes(), Axes((0, 1), (2, 3)), Axes((3, 0), (2, 1))])
    def test_full_rank_is_the_identity(self, axes):
        projector, gradient = Tucker(), normal(self.SHAPE)
        frame = self.frame(projector, self.SHAPE, 10, axes)
        core, back = round_trip(projector, frame, self.fit(frame, gradient), gradient)
        assert core.shape == frame.low_shape == self.SHAPE
        np.testing.assert_allclose(back, gradient, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("gradient", ["plain", "one entry", "tiny", "huge"])
    def test_factors_are_orthonormal(self, gradient):
        x = {
            "plain": normal(self.SHAPE),
            "one entry": jnp.zeros(self.SHAPE).at[0, 1, 2, 3].set(1.0),
            "tiny": 1e-30 * normal(self.SHAPE),
            "huge": 1e30 * normal(self.SHAPE),
        }[gradient]
        frame = self.frame(Tucker(), self.SHAPE, (2, 2, 3, 4))
        for factor in self.fit(frame, x):
            assert defect(factor) < ORTHONORMAL["float32"]
            top = jnp.take_along_axis(factor, jnp.abs(factor).argmax(0, keepdims=True), 0)
            assert (top > 0).all()

    @pytest.mark.slow
    def test_sweeps_improve_on_the_first_guess(self):
        gradient = normal(self.SHAPE)
        frame = self.frame(Tucker(), self.SHAPE, (2, 2, 3, 4))
        norms = []
        for sweeps in (0, 2, 20):
            projector = Tucker(sweeps=sweeps)
            core, _ = round_trip(projector, frame, self.fit(frame, gradient, projector), gradient)
            norms.append(jnp.linalg.norm(core.ravel()))
        assert norms[0] < norms[1] <= norms[2] * (1 + rounding("float32"))

    @pytest.mark.slow
    def test_recovers_an_exact_decomposition(self):
        ranks = (2, 2, 3, 4)
        factors = [normal((n, r), n) for n, r in zip(self.SHAPE, ranks, strict=True)]
        gradient = jnp.einsum("abcd,ia,jb,kc,ld->ijkl", normal(ranks), *factors)
        frame = self.frame(Tucker(), self.SHAPE, ranks)
        _, back = round_trip(Tucker(), frame, self.fit(frame, gradient), gradient)
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(back, gradient, atol=1e-5 * scale)

    @pytest.mark.slow
    def test_a_batch_is_a_loop(self):
        projector, ranks = Tucker(), (2, 3, 4)
        gradient = normal(self.SHAPE)
        frame = self.frame(projector, self.SHAPE, ranks, Axes((0, 2), 3))  # axis 1 is the batch
        core, back = round_trip(projector, frame, self.fit(frame, gradient), gradient)
        assert core.shape == frame.low_shape == (4, *ranks)
        one = self.frame(projector, (3, 6, 10), ranks)
        for k in range(4):
            single = gradient[:, k]
            _, expected = round_trip(projector, one, self.fit(one, single), single)
            np.testing.assert_allclose(back[:, k], expected, atol=1e-4)

    def test_a_matrix_is_two_sided(self):
        gradient = normal(SHAPE)
        frame = self.frame(Tucker(), SHAPE, RANK)
        _, back = round_trip(Tucker(), frame, self.fit(frame, gradient), gradient)
        one = frame_of(SHAPE, RANK, projector=TwoSided())
        _, expected = round_trip(TwoSided(), one, fit(TwoSided(), one, gradient), gradient)
        np.testing.assert_allclose(back, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SubspaceIteration(iterations=0), "iterations must be a Python int of at least 1"),
        (
            lambda: SubspaceIteration(first_fits=300),
            "first_fits must be a Python int from 1 to 127",
        ),
        (lambda: SubspaceIteration(orthonormalize="svd"), "must be 'qr' or 'cholesky', got 'svd'"),
        (lambda: RandomizedRange(oversampling=-1), "oversampling must be .* at least 0, got -1"),
        (lambda: RandomizedRange(power=True), "power must be a Python int"),
        (lambda: RandomProjection(seed=-1), "seed must be a Python int of at least 0"),
        (lambda: RandomProjection(distribution="uniform"), "'gaussian' or 'orthonormal'"),
        (lambda: DCT(score="linf"), "score must be 'l1' or 'l2', got 'linf'"),
        (lambda: DCT(kind="dct1"), "kind must be 'dct3', 'dct2' or 'matrix', got 'dct1'"),
        (lambda: DCT().frame((50257, 8), Axes(side="large"), 4), "up to 46340 entries, got 50257"),
        (lambda: Tucker(sweeps=-1), "sweeps must be a Python int of at least 0"),
        (lambda: Tucker().frame((3, 4, 5), Axes(), 1.5), "above 0 and below 1, got 1.5"),
        (lambda: Tucker().frame((3, 4, 5), Axes(), (2, 2)), "each of the 3 compressed axes"),
        (lambda: Tucker().frame((3, 4, 5), Axes(), (2, 2, 0)), "rank must be at least 1"),
        (lambda: SVD().frame((3, 4), Axes(), 0), "rank must be at least 1"),
        (lambda: SVD().frame((3,), Axes(), 1), "out of range"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
