"""The table that every contract test runs over: a new recipe or element joins by adding a line."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structured as oxs


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    name: str
    make: Callable[..., optax.GradientTransformation]
    scalars: Mapping[str, float]  # every argument that a schedule may drive
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    encoded: bool = False

    @property
    def low_rank(self) -> bool:
        return "low_rank" in self.fixed

    @property
    def compressed(self) -> bool:
        """State that is not shaped like params, and gradients that are not finite count as zero."""
        return self.low_rank or self.encoded

    def build(self, **overrides: Any) -> optax.GradientTransformationExtraArgs:
        if not overrides:
            return _built(self)
        return self.make(**{**self.fixed, **self.scalars, **overrides})


@functools.cache
def _built(case: Case) -> optax.GradientTransformationExtraArgs:
    """One transformation a line, so that `jitted` compiles each of them once a session."""
    return case.make(**case.fixed, **case.scalars)


def of_rank(rank: Any, **parts: Any) -> Mapping[str, Any]:
    """A period of 2, so that subspaces move within the few steps of a test."""
    return {"low_rank": oxs.LowRank(rank, period=2, **parts)}


def in_codes(make: Callable[..., Any], codec: oxs.Codec) -> Callable[..., Any]:
    """A recipe with its state in codes, whatever the size of a leaf is."""

    @functools.wraps(make)
    def recipe(*args: Any, **kwargs: Any) -> Any:
        return oxs.quantized(make(*args, **kwargs), codec, min_size=2)

    return recipe


def sgd_then_prox(learning_rate, regularizer, strength):
    return optax.chain(
        optax.sgd(learning_rate), oxs.prox_step(regularizer, strength, weight=learning_rate)
    )


def restarted_ramda(learning_rate, regularizer, strength, momentum, eps):
    inner = oxs.ramda(learning_rate, regularizer, strength, momentum=momentum, eps=eps)
    return oxs.restart_at(inner, milestones=(2, 5))


GROUPS = {"regularizer": oxs.GroupLasso(group_axis=-2)}
ENTRIES = {"regularizer": oxs.L1()}
RANK = {"regularizer": oxs.NuclearNorm()}
INEXACT = {"solver": oxs.ProximalGradient(max_iters=6, rtol=0.0)}

DUAL = {"learning_rate": 0.05, "strength": 0.05, "momentum": 0.4}
RAMDA = {**DUAL, "eps": 1e-6}
ADAM = {"learning_rate": 0.05, "strength": 0.05, "b1": 0.9, "b2": 0.99, "eps": 1e-8}
ADAMW = {**ADAM, "weight_decay": 0.1}
MADGRAD = {"learning_rate": 0.05, "momentum": 0.4, "eps": 1e-6, "weight_decay": 0.1}
PLAIN = {"learning_rate": 0.05, "strength": 0.05}

GALORE = {"learning_rate": 0.05, "scale": 0.5, "b1": 0.9, "b2": 0.99, "eps": 1e-6}
GALOREW = {**GALORE, "weight_decay": 0.1}
# At a fit on both sides the low-rank leaf is diagonal: the rest is rounding, and stays below eps.
DIAGONAL = {**GALORE, "eps": 1e-2}
LION = {"learning_rate": 0.05, "scale": 0.5, "weight_decay": 0.1}
DCT_ADAMW = {"learning_rate": 0.05, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
TRION = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.1, "adam_learning_rate": 0.05}
LDADAM = {**DCT_ADAMW, "rho": 0.9}

KEEP = {"projector": oxs.SVD(), "transport": oxs.Keep()}
ROTATE = {"projector": oxs.RandomizedRange(), "transport": oxs.Rotate()}
LAZY = {"refresh": oxs.Lazy(threshold=0.1, memory=1)}
STAGGERED = {"refresh": oxs.Staggered()}
GRID = {"weights": oxs.Affine(group=8)}
LION_INSIDE = {"inner": optax.scale_by_lion()}

RATE = {"learning_rate": 0.05}
EIGHT_BITS = oxs.Dynamic(block=2)
FOUR_BITS = oxs.Dynamic(bits=4, block=2)

CASES = (
    Case("ramda", oxs.ramda, RAMDA, GROUPS),
    Case("ramda_without_regularizer", oxs.ramda, {**RAMDA, "strength": 0.0}),
    Case("ramda_inexact", oxs.ramda, RAMDA, {**GROUPS, **INEXACT}),
    Case("ramda_nuclear_inexact", oxs.ramda, RAMDA, {**RANK, **INEXACT}),
    Case("ramda_keep_point", oxs.ramda, RAMDA, {**ENTRIES, "keep_point": True}),
    Case("ramda_restarted", restarted_ramda, RAMDA, GROUPS),
    Case("rmda", oxs.rmda, DUAL, GROUPS),
    Case("rmda_nuclear", oxs.rmda, DUAL, RANK),
    Case("prox_sgd", oxs.prox_sgd, {**PLAIN, "momentum": 0.9}, GROUPS),
    Case("prox_sgd_relaxed", oxs.prox_sgd_relaxed, {**RAMDA, "b2": 0.99}, ENTRIES),
    Case("prox_adam", oxs.prox_adam, ADAMW, GROUPS),
    Case("prox_adam_amsgrad", oxs.prox_adam, ADAMW, {**GROUPS, "amsgrad": True}),
    Case("prox_ssi", oxs.prox_ssi, ADAMW, {"regularizer": oxs.GroupMCP(-2, gamma=1e3)}),
    Case("sgd_then_prox", sgd_then_prox, PLAIN, GROUPS),
    Case("madgrad", oxs.madgrad, MADGRAD),
    Case("madgrad_decoupled", oxs.madgrad, MADGRAD, {"decoupled": True}),
    Case("mirror_madgrad", oxs.mirror_madgrad, MADGRAD),
    Case("mirror_madgrad_decoupled", oxs.mirror_madgrad, MADGRAD, {"decoupled": True}),
    Case("galore", oxs.galore, GALORE, of_rank(2)),
    Case("galore_as_published", oxs.galore, GALOREW, of_rank(2, **KEEP)),
    Case("galore_lazy_rotate", oxs.galore, GALOREW, of_rank(2, **LAZY, **ROTATE)),
    Case("galore_staggered_lion", oxs.galore, LION, {**of_rank(2, **STAGGERED), **LION_INSIDE}),
    Case("galore_tucker", oxs.galore, DIAGONAL, of_rank(3, projector=oxs.Tucker())),
    Case("fira", oxs.fira, GALOREW, of_rank(2)),
    Case("apollo", oxs.apollo, GALOREW, of_rank(2)),
    Case("apollo_mini", oxs.apollo_mini, {**GALOREW, "scale": 2.0}, of_rank(1)),
    Case("dct_adamw", oxs.dct_adamw, DCT_ADAMW, of_rank(2)),
    Case("trion", oxs.trion, TRION, of_rank(2)),
    Case("grad_norm_lorp", oxs.grad_norm_lorp, GALOREW, of_rank(2)),
    Case("q_galore_lazy", oxs.q_galore, GALOREW, {**of_rank(2, **LAZY), "weights": None}),
    Case("q_galore_lazy_on_grid", oxs.q_galore, GALOREW, {**of_rank(2, **LAZY), **GRID}),
    Case("ldadam", oxs.ldadam, LDADAM, {"low_rank": oxs.LowRank(2)}),  # moves at every step
    Case("adamw_8bit", in_codes(optax.adamw, EIGHT_BITS), RATE, encoded=True),
    Case("adamw_4bit", in_codes(optax.adamw, FOUR_BITS), RATE, encoded=True),
    Case("lion_8bit", in_codes(optax.lion, EIGHT_BITS), RATE, encoded=True),
    Case("galore_8bit", in_codes(oxs.galore, EIGHT_BITS), GALOREW, of_rank(2), encoded=True),
    Case("galore_4bit", in_codes(oxs.galore, FOUR_BITS), GALOREW, of_rank(2), encoded=True),
    Case("fira_8bit", in_codes(oxs.fira, EIGHT_BITS), GALOREW, of_rank(2), encoded=True),
    Case(
        "grad_norm_lorp_8bit",
        in_codes(oxs.grad_norm_lorp, EIGHT_BITS),
        GALOREW,
        of_rank(2),
        encoded=True,
    ),
)

# A line of each kind. The others take eight times as long again: `pytest -m slow` runs them.
IN_EVERY_RUN = frozenset({"ramda", "prox_adam", "galore", "adamw_8bit"})


def _every(cases: Iterable[Case]) -> pytest.MarkDecorator:
    marks = {c.name: () if c.name in IN_EVERY_RUN else pytest.mark.slow for c in CASES}
    lines = [pytest.param(c, id=c.name, marks=marks[c.name]) for c in cases]
    return pytest.mark.parametrize("case", lines)


every_case = _every(CASES)
every_low_rank_case = _every(case for case in CASES if case.low_rank)
every_compressed_case = _every(case for case in CASES if case.compressed)
every_other_case = _every(case for case in CASES if not case.compressed)


# Small, and one structured leaf only: most of the time of these tests is XLA's, compiling it.
SHAPES = {"dense": {"kernel": (6, 4), "bias": (4,)}, "gain": ()}


def normal(name: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers that depend on nothing but `name`."""
    generator = np.random.default_rng(zlib.crc32(repr(name).encode()))
    return jnp.asarray(generator.standard_normal(shape), dtype)


def normal_tree(name: Any, shapes: Any = SHAPES, dtype: Any = jnp.float32) -> Any:
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    flat, structure = jax.tree.flatten(shapes, is_leaf=is_shape)
    return structure.unflatten([normal((name, i), s, dtype) for i, s in enumerate(flat)])


def params(dtype: Any = jnp.float32, shapes: Any = SHAPES) -> Any:
    return normal_tree("params", shapes, dtype)


def gradients(step: int, dtype: Any = jnp.float32, shapes: Any = SHAPES) -> Any:
    """Open-loop gradients, with entries that never receive any."""
    return jax.tree.map(lambda g: g * (jnp.abs(g) > 0.2), normal_tree(step, shapes, dtype))


def step_of(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def jitted(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    return jax.jit(step_of(tx))


def run(
    tx: optax.GradientTransformation, start: Any, grads: list[Any], *, jit: bool = True
) -> tuple[Any, Any]:
    """Parameters and state after one step for each gradient."""
    step = jitted(tx) if jit else step_of(tx)
    current, state = start, tx.init(start)
    for g in grads:
        current, state = step(g, state, current)
    return current, state


def types(tree: Any) -> Any:
    """Structure, shapes, dtypes and weak types: what `scan` and the compilation cache look at."""
    return jax.tree.map(lambda x: jax.typeof(x), tree)


def assert_close(got: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    """Leaf by leaf, relative to the largest entry of the expected leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True)
    for (path, e), g in pairs:
        e, g = (np.asarray(x, np.float64) for x in (e, g))
        bound = atol + rtol * np.max(np.abs(e), initial=0.0)
        error = np.max(np.abs(g - e), initial=0.0)
        assert error <= bound, f"{jax.tree_util.keystr(path)}: off by {error:.2e}, not {bound:.2e}"


def assert_equal(got: Any, expected: Any) -> None:
    """Bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
