"""Every mistake in low-rank recipes gets a sentence as well. A new one joins by adding a line."""

import jax
import jax.numpy as jnp
import optax
import pytest
from test_misuse import GROUPS, NO_PARAMS, PARAMS, step

import optax_structured as oxs
from optax_structured.recipes import registry

RECIPES = {n: r.make for n, r in registry.RECIPES.items() if r.family == "low_rank"}


def project(*, inner=None, params=PARAMS, **spec):
    """One traced step of a low-rank projection."""
    low_rank = spec.get("low_rank") or oxs.LowRank(**{"rank": 2, **spec})
    return step(oxs.low_rank_projection(inner or optax.identity(), low_rank), params=params)


def traced_rank():
    return jax.jit(lambda rank: oxs.galore(0.1, oxs.LowRank(rank)).init(PARAMS))(2)


WHOLE = "rank must be a Python int, got"
INT4 = oxs.Affine(bits=4)
OVERLAP = oxs.Axes(rows=(0, 1), cols=1)
TRUST = optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio())
UNKNOWN = optax.GradientTransformation(
    lambda params: {"sketch": params}, lambda updates, state, params=None: (updates, state)
)

MISUSE = [
    ("rank-zero", lambda: oxs.LowRank(0), "rank must be at least 1, got 0; None instead of"),
    ("rank-negative", lambda: oxs.LowRank(-4), "rank must be at least 1, got -4"),
    ("rank-bool", lambda: oxs.LowRank(True), f"{WHOLE} True"),
    ("rank-words", lambda: oxs.LowRank("all"), f"{WHOLE} 'all'"),
    ("rank-float", lambda: project(rank=2.0), f"{WHOLE} 2.0"),
    ("rank-fraction-of-a-matrix", lambda: project(rank=0.5), f"{WHOLE} 0.5"),
    ("rank-traced", traced_rank, "rank must be a Python int: it decides shapes"),
    ("rank-tuple", lambda: project(rank=(2, 2)), rf"{WHOLE} \(2, 2\)"),
    (
        "tucker-one-rank-too-many",
        lambda: project(rank=(2, 2, 2), projector=oxs.projectors.Tucker()),
        "needs one int for each of the 2 compressed axes",
    ),
    (
        "tucker-fraction-of-more-than-all",
        lambda: project(rank=1.5, projector=oxs.projectors.Tucker()),
        "a fractional rank must be above 0 and below 1, got 1.5",
    ),
    ("period-zero", lambda: oxs.LowRank(2, 0), "period must be at least 1 step, got 0"),
    ("period-negative", lambda: oxs.LowRank(2, -200), "period must be at least 1 step"),
    ("period-float", lambda: oxs.LowRank(2, 2e2), "period must be a Python int"),
    (
        "dtype",
        lambda: oxs.LowRank(2, dtype="bf16"),
        "dtype must name a floating-point type such as 'bfloat16', got 'bf16'",
    ),
    (
        "projector-of-another-kind",
        lambda: oxs.LowRank(2, projector="svd"),
        r"LowRank\(..., projector=...\) takes Projector objects, got 'svd'",
    ),
    (
        "projector-class",
        lambda: oxs.LowRank(2, projector=oxs.SVD),
        r"LowRank\(..., projector=...\) takes Projector objects, got <class",
    ),
    (
        "residual-of-another-kind",
        lambda: oxs.LowRank(2, residual=1.01),
        r"LowRank\(..., residual=...\) takes Residual objects, got 1.01",
    ),
    (
        "transport-of-another-kind",
        lambda: oxs.LowRank(2, transport=oxs.low_rank.Drop()),
        r"LowRank\(..., transport=...\) takes Transport objects, got Drop\(\)",
    ),
    ("axes-none", lambda: oxs.LowRank(2, axes=None), r"axes=...\) takes Axes objects, got None"),
    ("bare-rank", lambda: oxs.galore(0.1, 128), r"a bare rank is written LowRank\(128\)"),
    (
        "bare-rank-in-rules",
        lambda: oxs.galore(0.1, oxs.rules(("kernel", 128), default=None)),
        r"expected LowRank\(rank=...\), rules of them, or None, got 128",
    ),
    ("no-low-rank", lambda: oxs.galore(0.1, None), r"expected LowRank\(rank=...\) or rules"),
    (
        "nothing-to-project",
        lambda: oxs.galore(0.1, oxs.rules(default=None)),
        "the rules hold no LowRank, so nothing would be projected: give one",
    ),
    (
        "nothing-to-project-in-rules-without-default",
        lambda: oxs.trion(0.1, oxs.rules(("kernel", None), ("bias", None))),
        "the rules hold no LowRank, so nothing would be projected: give one",
    ),
    (
        "every-matrix-left-plain",
        lambda: project(low_rank=oxs.rules(("kernel", None), default=oxs.LowRank(2))),
        "no leaf can be projected: the rules leave 'dense/kernel' and all other leaves plain",
    ),
    (
        "flattened",
        lambda: optax.flatten(oxs.galore(0.1, oxs.LowRank(2))).init(PARAMS),
        "no leaf can be projected; '': .*; optax.flatten makes one vector of all leaves, and cann",
    ),
    (
        "low-rank-in-place-of-a-regularizer",
        lambda: oxs.ramda(0.1, oxs.LowRank(2), 0.1).init(PARAMS),
        "takes a Regularizer such as L1",
    ),
    (
        "regularizer-in-place-of-low-rank",
        lambda: oxs.galore(0.1, GROUPS),
        r"expected LowRank\(rank=...\), rules of them, or None, got GroupLasso",
    ),
    (
        "bias-by-pattern",
        lambda: project(low_rank=oxs.rules(("bias", oxs.LowRank(2)), default=None)),
        "'dense/bias' of shape .*",
    ),
    (
        "low-rank-dead-pattern",
        lambda: project(low_rank=oxs.rules(("kernle", oxs.LowRank(2)), default=None)),
        "pattern 'kernle' matches no parameter path; the nearest paths are 'dense/kernel'",
    ),
    (
        "axes-of-longer-leaves",
        lambda: project(axes=oxs.Axes(rows=(0, 1, 2), cols=3)),
        "no leaf can be projected; 'dense/kernel': .*out of range",
    ),
    (
        "axes-overlap",
        lambda: project(axes=OVERLAP),
        "no leaf can be projected; .* both name axis 1",
    ),
    (
        "shadowed-pattern",
        lambda: project(low_rank=oxs.rules(("", oxs.LowRank(2)), ("dense/k", oxs.LowRank(1)))),
        "pattern 'dense/k' gets no leaf, because earlier patterns match everything that it",
    ),
    (
        "axes-overlap-by-pattern",
        lambda: project(low_rank=oxs.rules(("kernel", oxs.LowRank(2, axes=OVERLAP)), default=None)),
        "'dense/kernel' of shape .*, which cannot take it: .* both name axis 1",
    ),
    ("axes-side", lambda: oxs.Axes(side="left"), "side must be one of"),
    (
        "adamw-inside",
        lambda: project(inner=optax.adamw(0.1)),
        "needs the parameters, which have no low-rank form.*add_decayed_weights outside",
    ),
    (
        "trust-ratio-inside",
        lambda: project(inner=TRUST),
        "put weight decay, trust ratios and parameter scaling after low_rank_projection",
    ),
    (
        "align-with-random-projection",
        lambda: oxs.LowRank(2, projector=oxs.RandomProjection(), transport=oxs.Align()),
        "Align turns the columns of a stored basis, and RandomProjection.* stores none; use",
    ),
    (
        "align-with-dct",
        lambda: oxs.LowRank(2, projector=oxs.DCT(), transport=oxs.Align()),
        r"DCT.* stores none; use Rotate\(\)",
    ),
    (
        "align-with-random-projection-of-the-recipe",
        lambda: oxs.apollo(0.1, oxs.LowRank(2, transport=oxs.Align())).init(PARAMS),
        "Align turns the columns of a stored basis, and RandomProjection.* stores none; use",
    ),
    (
        "rotate-with-tucker",
        lambda: oxs.LowRank(2, projector=oxs.projectors.Tucker(), transport=oxs.Rotate()),
        r"Rotate\(\) needs a projector with one matrix, which Tucker.* is not; use Keep",
    ),
    (
        "rotate-what-nobody-knows",
        lambda: project(inner=UNKNOWN, transport=oxs.Rotate()),
        "does not know how an array of the inner state depends on the gradient",
    ),
    (
        "norm-scaled-with-gaussian-projection",
        lambda: oxs.LowRank(2, projector=oxs.RandomProjection(), residual=oxs.NormScaled()),
        r"needs orthonormal columns; use Scaling\(\), or an orthonormal projector",
    ),
    (
        "fira-with-gaussian-projection",
        lambda: oxs.fira(0.1, oxs.LowRank(2, projector=oxs.RandomProjection())).init(PARAMS),
        r"needs orthonormal columns; use Scaling\(\), or an orthonormal projector",
    ),
    (
        "fira-with-two-sides",
        lambda: oxs.fira(0.1, oxs.LowRank(2, projector=oxs.projectors.TwoSided())).init(PARAMS),
        r"needs a projector with one matrix, which TwoSided.* is not; use Drop\(\)",
    ),
    (
        "lazy-with-tucker",
        lambda: oxs.LowRank(2, projector=oxs.projectors.Tucker(), refresh=oxs.Lazy()),
        "Lazy compares one subspace per matrix, which Tucker.* does not have; use Periodic",
    ),
    ("lazy-growth", lambda: oxs.Lazy(growth=1.0), "Lazy needs growth above 1"),
    ("lazy-threshold", lambda: oxs.Lazy(threshold=-0.1), r"threshold must be in \[0, 1\)"),
    ("lazy-similarity", lambda: oxs.Lazy(similarity="cosine"), "similarity must be 'direction' or"),
    ("norm-growth", lambda: oxs.NormScaled(growth=0.99), "growth must be at least 1"),
    (
        "norm-per",
        lambda: oxs.low_rank.Scaling(per="row"),
        "per must be 'column' or 'matrix', got 'row'",
    ),
    ("feedback-momentum", lambda: oxs.ErrorFeedback(1.0), r"momentum must be in \[0, 1\)"),
    (
        "external-without-mask",
        lambda: project(refresh=oxs.low_rank.External()),
        r"call update\(grads, state, params, refresh=mask\), a bool or a tree of bools",
    ),
    (
        "galore-with-inner-and-its-settings",
        lambda: oxs.galore(0.1, oxs.LowRank(2), inner=optax.scale_by_lion(), b1=0.95),
        "inner=... was given and also b1, which belong to the Adam that it replaces",
    ),
    (
        "fira-with-inner-and-its-settings",
        lambda: oxs.fira(0.1, oxs.LowRank(2), inner=optax.scale_by_lion(), b2=0.95, eps=1e-8),
        "inner=... was given and also b2, eps",
    ),
    (
        "ldadam-with-a-residual",
        lambda: oxs.ldadam(0.1, oxs.LowRank(2, residual=oxs.low_rank.Drop())),
        "LDAdam prescribes its residual",
    ),
    (
        "codec-of-moments-for-a-basis",
        lambda: oxs.LowRank(2, codec=oxs.Dynamic()),
        r"LowRank\(..., codec=...\) takes Affine objects, got Dynamic",
    ),
    (
        "codec-with-dct",
        lambda: oxs.LowRank(2, projector=oxs.DCT(), codec=INT4),
        "codec=Affine.* is for a basis that is one matrix, and DCT.* stores none; use SVD",
    ),
    (
        "q-galore-with-random-projection",
        lambda: oxs.q_galore(0.1, oxs.LowRank(2, projector=oxs.RandomProjection())),
        r"RandomProjection.* stores none; .* or no codec \(galore instead of q_galore\)",
    ),
    (
        "fira-with-codec",
        lambda: oxs.fira(0.1, oxs.LowRank(2, codec=INT4)),
        "NormScaled.* needs orthonormal columns, which a basis in Affine.* does not have; use",
    ),
    (
        "q-galore-with-error-feedback",
        lambda: oxs.q_galore(0.1, oxs.LowRank(2, residual=oxs.ErrorFeedback())),
        "ErrorFeedback.* needs orthonormal columns, which a basis in Affine.* does not have",
    ),
    (
        "ldadam-with-codec",
        lambda: oxs.ldadam(0.1, oxs.LowRank(2, codec=INT4)),
        "LDAdam prescribes its codec",
    ),
    (
        "rotate-moments-in-codes",
        lambda: project(
            inner=oxs.quantized(optax.scale_by_adam(), min_size=1), transport=oxs.Rotate()
        ),
        r"'dense/kernel' are in codes, which .*: put quantized around the whole, .* or use Keep",
    ),
    (
        "q-galore-with-affine-moments",
        lambda: oxs.q_galore(0.1, oxs.LowRank(2), moments=oxs.Affine()),
        "small second moments become 0 and training explodes",
    ),
    (
        "q-galore-with-dynamic-weights",
        lambda: oxs.q_galore(0.1, oxs.LowRank(2), weights=oxs.Dynamic()),
        "weights are stored by Affine.*, or rules of it and None; got Dynamic",
    ),
    (
        "q-galore-in-bfloat16",
        lambda: oxs.q_galore(0.1, oxs.LowRank(2)).init({"w": jnp.ones((4, 3), jnp.bfloat16)}),
        "'w' is bfloat16, which cannot hold the levels of Affine.*; keep parameters in float32, or",
    ),
    (
        "grid-for-a-bias",
        lambda: step(oxs.weights.keep_on_grid(oxs.rules(("bias", oxs.Affine()), default=None))),
        "to 'dense/bias' of shape .*, which cannot take it: weights in Affine.* are matrices",
    ),
    (
        "grid-without-params",
        lambda: oxs.weights.keep_on_grid().update(PARAMS, oxs.weights.keep_on_grid().init(PARAMS)),
        NO_PARAMS,
    ),
    ("subspace-iterations", lambda: oxs.SubspaceIteration(0), "iterations must be a Python int of"),
    ("projection-seed", lambda: oxs.RandomProjection(seed=-1), "seed must be a Python int of at"),
    (
        "two-paths-alike",
        lambda: project(params={"a": {"b": jnp.ones((4, 3))}, "a/b": jnp.ones((4, 3))}),
        "two leaves have the path 'a/b': rename a key with",
    ),
    (
        "accumulate-zero",
        lambda: oxs.accumulate(optax.identity(), 0),
        "every must be a whole number",
    ),
    (
        "weight-normalized-without-params",
        lambda: oxs.grad_norm_lorp(0.1, oxs.LowRank(2)).update(
            PARAMS, oxs.grad_norm_lorp(0.1, oxs.LowRank(2)).init(PARAMS)
        ),
        NO_PARAMS,
    ),
]


@pytest.mark.parametrize(
    ("thunk", "message"), [line[1:] for line in MISUSE], ids=[line[0] for line in MISUSE]
)
def test_misuse(thunk, message):
    with pytest.raises((ValueError, TypeError), match="(?s)" + message):
        thunk()


def test_ids_are_unique():
    assert len({line[0] for line in MISUSE}) == len(MISUSE)
