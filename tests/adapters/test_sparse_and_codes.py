"""SNELL, its allocator, and codebooks: the identities of their specifications."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_structured as oxs
from optax_structured.adapters import (
    SNELL,
    SNELLA,
    Codebook,
    Kernel,
    SparsityAllocator,
    codebook_weight,
    constants,
    footprint_bits,
    init,
    merge,
    pack_codes,
    unpack_codes,
)
from optax_structured.adapters.allocation import filled
from optax_structured.adapters.snell import sparsified

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def kernel(**options):
    return Kernel(normal(2, 8, 3), normal(2, 10, 3, seed=1), **options)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["hard", "soft"])
def test_the_share_of_zeros_is_the_sparsity(rule):
    dense = normal(8, 10)
    for share in (0.25, 0.5, 0.9):
        zeros = jnp.mean(sparsified(dense, jnp.asarray(share), rule) == 0)
        assert abs(float(zeros) - share) <= 1 / 80
    np.testing.assert_allclose(sparsified(dense, jnp.asarray(0.0), "soft"), dense * abs(dense))


def test_no_gradient_passes_the_size_and_the_threshold():
    dense = normal(8, 10)
    got = jax.grad(lambda d: jnp.sum(sparsified(d, jnp.asarray(0.5), "hard")))(dense)
    kept = sparsified(dense, jnp.asarray(0.5), "hard") != 0
    np.testing.assert_allclose(got, jnp.where(kept, jnp.abs(dense), 0.0), rtol=1e-6)


@pytest.mark.slow
def test_distances_do_not_see_a_common_shift_or_the_order_of_equal_chunks():
    one, shift = kernel(), normal(2, 1, 3, seed=2)
    moved = Kernel(one.inputs + shift, one.outputs + shift)
    np.testing.assert_allclose(moved.dense(), one.dense(), atol=1e-5)
    four = Kernel(jnp.tile(one.inputs, (2, 1, 1)), jnp.tile(one.outputs, (2, 1, 1)))
    turned = Kernel(four.inputs[jnp.array([2, 1, 0, 3])], four.outputs[jnp.array([2, 1, 0, 3])])
    np.testing.assert_allclose(turned.dense(), four.dense(), atol=1e-6)
    assert np.linalg.matrix_rank(one.dense()) == 8  # of factors with three columns


@pytest.mark.slow
def test_equal_rows_have_a_finite_gradient():
    same = Kernel(jnp.ones((2, 4, 3)), jnp.ones((2, 5, 3)))
    gradient = jax.grad(lambda k: jnp.sum(k.dense()))(same)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_another_sparsity_compiles_nothing_and_stacks_work():
    params, traces = {"w": normal(3, 8, 10)}, []
    adapter = init(KEY, params, SNELL(4))

    @jax.jit
    def zeros(sparsity):
        traces.append(1)
        update = merge(params, adapter, sparsity)["w"] - params["w"]
        return jnp.mean(update == 0, axis=(1, 2))

    assert constants(params, adapter)["w"].shape == (3,)
    big = jax.tree.map(lambda x: 30 * x, adapter)
    adapter = big
    np.testing.assert_allclose(zeros({"w": jnp.array([0.1, 0.5, 0.9])}), [0.1, 0.5, 0.9], atol=0.03)
    np.testing.assert_allclose(zeros({"w": jnp.array([0.8, 0.2, 0.4])}), [0.8, 0.2, 0.4], atol=0.03)
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SNELL(32), SNELLA(32, sparsity=0.9)])
def test_it_starts_very_nearly_as_the_pretrained_model(spec):
    params = {"w": jnp.zeros((256, 256))}
    update = merge(params, init(KEY, params, spec))["w"]
    x = normal(16, 256)
    assert jnp.linalg.norm(x @ update) < 1e-3 * jnp.linalg.norm(x)


@pytest.mark.slow
def test_the_budget_falls_from_first_to_last():
    params = {"a": normal(8, 10), "b": normal(6, 4)}
    adapter = init(KEY, params, SNELLA(4))
    allocator = SparsityAllocator(total=10, target=0.8, initial=0.1, begin=2, end=3)
    state = allocator.init(adapter)
    values, due = zip(*(allocator.budget(state, t) for t in range(11)), strict=True)
    np.testing.assert_allclose((values[0], values[-1]), (0.9 * 104, 0.2 * 104), rtol=1e-5)
    assert all(x >= y - 1 for x, y in zip(values, values[1:], strict=False))  # some are rounded
    assert [bool(x) for x in due] == [False] * 3 + [True] * 8
    # Without scores all weights get the same density.
    even = allocator.allocate(state, 9).sparsity
    np.testing.assert_allclose((even["a"], even["b"]), 0.8, atol=1 / 24)
    assert allocator.allocate(state, 1).sparsity["a"] == jnp.float32(0.1)


def test_water_filling():
    sizes, shares = jnp.array([10.0, 20.0, 5.0, 8.0]), jnp.array([0.6, 0.2, 0.2, 0.0])
    for budget in (3.0, 12.0, 20.0, 30.0):
        volume = filled(sizes, shares, jnp.asarray(budget))
        np.testing.assert_allclose(jnp.sum(volume), budget, rtol=1e-6)
        assert jnp.all(volume <= sizes)
        open_ = volume < sizes - 1e-6
        level = (volume / jnp.where(shares > 0, shares, 1))[open_ & (shares > 0)]
        np.testing.assert_allclose(level, level[0], rtol=1e-5)
        more = filled(sizes, shares.at[1].mul(2.0), jnp.asarray(budget))
        assert more[1] >= volume[1]
    np.testing.assert_allclose(filled(sizes, shares, jnp.asarray(99.0)), [10, 20, 5, 0])


def test_a_floor_keeps_what_has_lost_its_scores():
    adapter = init(KEY, {"a": normal(8, 10), "b": normal(6, 4)}, SNELLA(4))
    only_a = {"a": adapter["a"], "b": jax.tree.map(jnp.zeros_like, adapter["b"])}
    for floor, want in ((0.0, 1.0), (0.25, 0.75)):
        allocator = SparsityAllocator(total=4, target=0.8, min_density=floor)
        state = allocator.observe(allocator.init(adapter), adapter, only_a)
        assert float(allocator.allocate(state, 3).sparsity["b"]) == want


LOGITS = jnp.array([[[0.3, -0.2, 0.1, 0.0]]])
BOOK, ONE, ROW = jnp.array([[-1.0, 0.0, 0.5, 2.0]]), jnp.ones(1), jnp.zeros(1, int)


def gradients(logits, backward, forward="soft", book=BOOK, smoothing=0.0):
    return jax.grad(
        lambda x: jnp.sum(codebook_weight(x, book, ONE, ROW, backward, forward, smoothing))
    )(logits)[0, 0]


@pytest.mark.slow
def test_the_default_backward_is_that_of_the_softmax():
    plain = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * BOOK[0]))(LOGITS)[0, 0]
    np.testing.assert_allclose(gradients(LOGITS, "default"), plain, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(gradients(LOGITS, "default")), 0.0, atol=1e-6)
    assert abs(jnp.sum(gradients(LOGITS, "proximal"))) > 0.1


def test_near_codewords_are_preferred_by_the_proximal_rule_alone():
    even = jnp.zeros((1, 1, 4))
    away = jnp.abs(BOOK[0] - jnp.mean(BOOK))
    far, near = 3, 1
    for backward, ratio in (
        ("default", away[far] / away[near]),
        ("proximal", away[near] / away[far]),
    ):
        got = jnp.abs(gradients(even, backward))
        np.testing.assert_allclose(got[far] / got[near], ratio, rtol=1e-5)


def test_two_even_codewords_cannot_tell_the_rules_apart():
    book, even = jnp.array([[-1.0, 3.0]]), jnp.zeros((1, 1, 2))
    one, other = (gradients(even, b, book=book) for b in ("default", "proximal"))
    np.testing.assert_allclose(one / one[0], other / other[0], rtol=1e-6)


def test_smoothing_bounds_the_gradient():
    on_a_word = jnp.array([[[0.0, 30.0, 0.0, 0.0]]])
    sharp = gradients(on_a_word + jnp.array([0.0, 0.0, 14.0, 0.0]), "proximal")
    soft = gradients(on_a_word + jnp.array([0.0, 0.0, 14.0, 0.0]), "proximal", smoothing=1e-2)
    assert jnp.max(jnp.abs(sharp)) > 1e4
    assert jnp.max(jnp.abs(soft)) <= 0.5 / 1e-2


@pytest.mark.slow
def test_codebooks_replace_a_matrix():
    params = {"w": normal(12, 16), "plain": normal(16)}
    spec = Codebook(entries=4, groups=2, forward="hard")
    adapter = init(KEY, params, spec)
    known = constants(params, adapter)
    merged = jax.jit(lambda ad: merge(params, ad, known))(adapter)["w"]
    words = adapter["w"].codebook[known["w"]]  # of each output
    assert jnp.all(jnp.any(merged.T[..., None] == words[:, None], axis=-1))
    assert jnp.linalg.norm(merged - params["w"]) < 0.5 * jnp.linalg.norm(params["w"])
    assert adapter["w"].bits == 12 * 16 * 2 + 32 * 2 * 4 + 32 * 2
    soft = init(KEY, params, Codebook(entries=4, groups=2))
    cold = jax.tree.map(lambda x: x, soft)["w"]
    cold = {"w": type(cold)(1e6 * cold.logits, cold.codebook, cold.scale, cold.spec, cold.axes)}
    np.testing.assert_allclose(merge(params, cold, known)["w"], merged, atol=1e-6)
    with pytest.raises(ValueError, match="outside jit, call constants"):
        jax.jit(merge)(params, adapter)


@pytest.mark.parametrize("entries", [2, 5, 16])
def test_packed_codes_are_the_hard_weights_in_the_bits_that_are_counted(entries):
    logits, book = normal(6, 8, entries), normal(2, entries, seed=1)
    group, scale = jnp.array([0, 0, 1, 0, 1, 1]), jnp.array([0.5, 2.0])
    packed = pack_codes(logits)
    counted = footprint_bits(6, 8, entries, 2) - 32 * 2 * (entries + 1)
    assert 8 * packed.nbytes == counted
    codes = unpack_codes(packed, (6, 8), entries)
    got = (scale[:, None] * book)[group[:, None], codes]
    want = codebook_weight(logits, book, scale, group, forward="hard")
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_turning_rows_with_their_groups():
    logits, book = normal(6, 5, 4), normal(2, 4, seed=1)
    group, order = jnp.array([0, 0, 1, 0, 1, 1]), jnp.array([3, 5, 0, 1, 4, 2])
    one = codebook_weight(logits, book, jnp.ones(2), group)
    np.testing.assert_array_equal(
        codebook_weight(logits[order], book, jnp.ones(2), group[order]), one[order]
    )


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: SNELL(3), "2 does not divide 3"),
        (lambda: SNELL(4, sparsity=1.0), r"in \[0, 1\)"),
        (lambda: SNELLA(4, rule="firm"), "'hard' or 'soft'"),
        (lambda: Codebook(entries=1), "at least 2 entries"),
        (lambda: Codebook(backward="sharp"), "'proximal' or 'default'"),
        (lambda: SparsityAllocator(total=3, target=0.5, begin=2, end=1), "must exceed begin"),
        (lambda: SparsityAllocator(3, 0.5).init({}), "no weight of SNELL"),
        (
            lambda: init(KEY, {"w": normal(2, 3, 4)}, oxs.rules(("w", Codebook()))),
            "single matrices",
        ),
    ],
)
def test_mistakes(build, message):
    with pytest.raises(ValueError, match=message):
        build()
