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
from optax_structured.recipes.registry import RECIPES


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    name: str
    make: Callable[..., optax.GradientTransformation]
    scalars: Mapping[str, float]  # every argument that a schedule may drive
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    encoded: bool = False
    coupled: bool = False  # one number for all leaves: another set of them makes other steps
    searches: bool = False  # a step that is not finite is no step
    short: bool = False  # holds arrays that are no parameter's, and whole on every device

    @property
    def low_rank(self) -> bool:
        return "low_rank" in self.fixed

    @property
    def compressed(self) -> bool:
        """State that is not shaped like params."""
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


def in_codes(make: Callable[..., Any], codec: oxs.quantization.Codec) -> Callable[..., Any]:
    """A recipe with its state in codes, whatever the size of a leaf is."""

    @functools.wraps(make)
    def recipe(*args: Any, **kwargs: Any) -> Any:
        return oxs.quantized(make(*args, **kwargs), codec, min_size=2)

    return recipe


def sgd_then_prox(learning_rate, regularizer, strength):
    return oxs.skip_nonfinite(
        optax.sgd(learning_rate), oxs.prox_step(regularizer, strength, weight=learning_rate)
    )


def restarted_ramda(learning_rate, regularizer, strength, momentum, eps):
    inner = oxs.ramda(learning_rate, regularizer, strength, momentum=momentum, eps=eps)
    return oxs.restart_at(inner, milestones=(2, 5))


def on_a_bowl(make: Callable[..., Any]) -> Callable[..., Any]:
    """A recipe that asks for more than gradients, given a loss that has the one of each step."""

    @functools.wraps(make)
    def recipe(*args: Any, **kwargs: Any) -> Any:
        inner = make(*args, **kwargs)

        def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            def loss(w: Any) -> jax.Array:
                single = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
                away = jax.tree.map(lambda w, p: single(w) - single(p), w, params)
                parts = jax.tree.map(lambda a, g: jnp.sum(a * (single(g) + a / 2)), away, grads)
                return sum(jax.tree.leaves(parts), jnp.full((), 100.0, jnp.float32))

            known = {
                "value": jnp.full((), 100.0, jnp.float32),
                "grad": grads,
                "value_fn": loss,
                "value_and_grad_fn": jax.value_and_grad(loss),
                "residual_fn": lambda w: jnp.stack([loss(w) / 10, jnp.ones((), jnp.float32)]),
                "grads_prev": jax.tree.map(lambda g: g / 2, grads),
                "batch_size": 16,
            }
            return inner.update(grads, state, params, **extra | known)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    return recipe


def ponos(learning_rate, c, c_p, decrease_factor, f_star):
    return oxs.step_sizes.ponos(
        max_learning_rate=learning_rate,
        c=c,
        c_p=c_p,
        decrease_factor=decrease_factor,
        f_star=f_star,
    )


def adagrad_norm(learning_rate, eps):
    element = oxs.step_sizes.scale_by_adagrad_norm(eps=eps)
    return optax.chain(element, optax.scale_by_learning_rate(learning_rate))


def geometric(learning_rate, decay):
    return oxs.step_sizes.decaying_normalized_step(learning_rate, decay)


def mfac_of_two(learning_rate, damping, weight_decay, block="all"):
    return oxs.curvature.mfac(
        learning_rate, 2, damping, momentum=0.5, weight_decay=weight_decay, block=block
    )


def storm(learning_rate, beta):
    return optax.chain(oxs.transforms.storm(beta), optax.scale_by_learning_rate(learning_rate))


def for_any_batch(learning_rate):
    scaling = oxs.step_sizes.scale_by_batch_size(32, "sqrt")
    return optax.chain(scaling, optax.scale_by_learning_rate(learning_rate))


def newton(learning_rate, eps, hessian=None):
    element = oxs.curvature.scale_by_gns(hessian, solver="cg", eps=eps)
    return optax.chain(element, optax.scale_by_learning_rate(learning_rate, flip_sign=False))


def newton_by_cg(learning_rate, eps):
    return newton(learning_rate, eps, hessian=lambda params: lambda v: v)


def dual_gauss_newton(learning_rate, damping):
    element = oxs.curvature.scale_by_dual_gauss_newton(damping)
    return optax.chain(element, optax.scale_by_learning_rate(learning_rate))


def modular(learning_rate, alpha, beta):
    """Each leaf is a module, and the last ones are below the threshold at every other step."""

    def labels(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten([f"{i:02}" for i in range(len(leaves))])

    adam = oxs.transforms.debiased_adam()
    inner = optax.chain(adam, optax.scale_by_learning_rate(learning_rate))
    optimizer = oxs.curvature.modular_adaptive(inner, labels, alpha=alpha, beta=beta)

    def update(grads, state, params=None, **extra):
        swing = jnp.asarray(1 + state.evaluations % 2, jnp.float32)
        names = state.active if jax.tree.leaves(grads) else ()
        found = {name: swing * 0.4**i for i, name in enumerate(names)}
        return optimizer.update(grads, state, params, eigenvalues=found, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def monitored_sgd(learning_rate, decay):
    norms = oxs.step_sizes.record_norms(capacity=2, every=2)
    return optax.chain(oxs.sign_agreement(decay), norms, optax.sgd(learning_rate))


GROUPS = {"regularizer": oxs.GroupLasso(group_axis=-2)}
ENTRIES = {"regularizer": oxs.L1()}
RANK = {"regularizer": oxs.NuclearNorm()}
INEXACT = {"solver": oxs.ProximalGradient(max_iters=6, rtol=0.0)}

# Of the scalars that the registry says a recipe has.
VALUES = {
    "learning_rate": 0.05,
    "adam_learning_rate": 0.05,
    "strength": 0.05,
    "weight_decay": 0.1,
    "l2": 0.1,
    "scale": 0.5,
    "eps": 1e-6,
    "momentum": 0.4,
    "b1": 0.9,
    "b2": 0.99,
    "rho": 0.9,
}


def named(recipe: str, fixed: Mapping[str, Any], *, but: str = "", **values: Any) -> Case:
    """A line for a recipe of the registry, under a name of its own if `but` says what is special.

    Args:
      recipe: its name in the registry.
      fixed: what no schedule drives.
      but: follows its name.
      **values: of scalars, where not those of `VALUES`; None leaves one out.
    """
    entry = RECIPES[recipe]
    scalars = {name: VALUES[name] for name in entry.scalars} | values
    given = {name: value for name, value in scalars.items() if value is not None}
    return Case(f"{recipe}_{but}" if but else recipe, entry.make, given, fixed)


KEEP = {"projector": oxs.SVD(), "transport": oxs.Keep()}
ROTATE = {"projector": oxs.RandomizedRange(), "transport": oxs.Rotate()}
LAZY = {"refresh": oxs.Lazy(threshold=0.1, memory=1)}
STAGGERED = {"refresh": oxs.Staggered()}
GRID = {"weights": oxs.Affine(group=8)}
LION_INSIDE = {"inner": optax.scale_by_lion()}

INNER = {"b1": None, "b2": None, "eps": None}  # those of Adam, when another one is inside
RAMDA = {"learning_rate": 0.05, "strength": 0.05, "momentum": 0.4, "eps": 1e-6}
PLAIN = {"learning_rate": 0.05, "strength": 0.05}
RATE = {"learning_rate": 0.05}
PONOS = {**RATE, "c": 0.5, "c_p": 0.1, "decrease_factor": 0.5, "f_star": 0.1}
NEWTON = {**RATE, "eps": 1e-3}
DUAL = {**RATE, "damping": 0.5}
MODULAR = {**RATE, "alpha": 0.3, "beta": 0.1}
MFAC = {**RATE, "damping": 1.0, "weight_decay": 0.1}
EIGHT_BITS = oxs.Dynamic(block=2)
FOUR_BITS = oxs.Dynamic(bits=4, block=2)


def encoded(case: Case, codec: oxs.quantization.Codec, but: str) -> Case:
    """The same with its state in codes."""
    make = in_codes(case.make, codec)
    name = f"{case.name}_{but}"
    return dataclasses.replace(case, name=name, make=make, encoded=True)


ADAMW = Case("adamw", optax.adamw, RATE)
LION = Case("lion", optax.lion, RATE)
GALORE = named("galore", of_rank(2))
FIRA = named("fira", of_rank(2))
LORP = named("grad_norm_lorp", of_rank(2))

CASES = (
    named("ramda", GROUPS),
    named("ramda", {}, but="without_regularizer", strength=0.0),
    named("ramda", {**GROUPS, **INEXACT}, but="inexact"),
    named("ramda", {**RANK, **INEXACT}, but="nuclear_inexact"),
    named("ramda", {**ENTRIES, "keep_point": True}, but="keep_point"),
    Case("ramda_restarted", restarted_ramda, RAMDA, GROUPS),
    named("ramda", {**GROUPS, "strength": oxs.TargetSparsity(0.5)}, but="target", strength=None),
    named("rmda", GROUPS),
    named("rmda", RANK, but="nuclear"),
    named("prox_sgd", GROUPS, momentum=0.9),
    named("prox_sgd_relaxed", ENTRIES),
    named("prox_adam", GROUPS, eps=1e-8),
    named("prox_adam", {**GROUPS, "amsgrad": True}, but="amsgrad", eps=1e-8),
    named("prox_ssi", {"regularizer": oxs.GroupMCP(-2, gamma=1e3)}, eps=1e-8),
    Case("sgd_then_prox", sgd_then_prox, PLAIN, GROUPS),
    named("madgrad", {}),
    named("madgrad", {"decoupled": True}, but="decoupled"),
    named("mirror_madgrad", {}),
    named("mirror_madgrad", {"decoupled": True}, but="decoupled"),
    GALORE,
    named("galore", of_rank(2, **KEEP), but="as_published"),
    named("galore", of_rank(2, **LAZY, **ROTATE), but="lazy_rotate"),
    named("galore", {**of_rank(2, **STAGGERED), **LION_INSIDE}, but="staggered_lion", **INNER),
    # After a fit on both sides the low-rank leaf is diagonal, and the rest rounding, below eps.
    named("galore", of_rank(3, projector=oxs.projectors.Tucker()), but="tucker", eps=1e-2),
    FIRA,
    named("apollo", of_rank(2)),
    named("apollo_mini", of_rank(1), scale=2.0),
    named("dct_adamw", of_rank(2), eps=1e-8),
    named("trion", of_rank(2), momentum=0.9),
    LORP,
    named("q_galore", {**of_rank(2, **LAZY), "weights": None}, but="lazy"),
    named("q_galore", {**of_rank(2, **LAZY), **GRID}, but="lazy_on_grid"),
    named("ldadam", {"low_rank": oxs.LowRank(2)}, eps=1e-8),  # its basis moves at every step
    encoded(ADAMW, EIGHT_BITS, "8bit"),
    encoded(ADAMW, FOUR_BITS, "4bit"),
    encoded(LION, EIGHT_BITS, "8bit"),
    encoded(GALORE, EIGHT_BITS, "8bit"),
    encoded(GALORE, FOUR_BITS, "4bit"),
    encoded(FIRA, EIGHT_BITS, "8bit"),
    encoded(LORP, EIGHT_BITS, "8bit"),
    named("diffgrad", {}),
    named("diffgrad", {"eps_form": "paper"}, but="paper"),
    Case("monitored_sgd", monitored_sgd, {**RATE, "decay": 0.5}, short=True),
    Case("ponos", on_a_bowl(ponos), PONOS, coupled=True, searches=True),
    Case("adagrad_norm", adagrad_norm, {**RATE, "eps": 1e-3}, coupled=True),
    Case("geometric", geometric, {**RATE, "decay": 0.97}, coupled=True),
    Case("storm", on_a_bowl(storm), {**RATE, "beta": 0.3}),
    Case("scale_by_batch_size", on_a_bowl(for_any_batch), RATE),
    Case("gns", on_a_bowl(newton), NEWTON, coupled=True, searches=True),
    Case("gns_cg", on_a_bowl(newton_by_cg), NEWTON, coupled=True, searches=True),
    Case("dual_gauss_newton", on_a_bowl(dual_gauss_newton), DUAL, coupled=True),
    Case("modular_adaptive", modular, MODULAR, coupled=True, short=True),
    Case("mfac", mfac_of_two, MFAC, coupled=True, short=True),
    Case("mfac_per_leaf", mfac_of_two, MFAC, {"block": "leaf"}, short=True),
)

# A line of each kind. The others take eight times as long again: `pytest -m slow` runs them.
IN_EVERY_RUN = frozenset({"ramda", "prox_adam", "galore", "adamw_8bit"})


def _every(cases: Iterable[Case]) -> pytest.MarkDecorator:
    marks = {c.name: () if c.name in IN_EVERY_RUN else pytest.mark.slow for c in CASES}
    lines = [pytest.param(c, id=c.name, marks=marks[c.name]) for c in cases]
    return pytest.mark.parametrize("case", lines)


every_case = _every(CASES)
a_case_of_each_kind = _every(case for case in CASES if case.name in IN_EVERY_RUN)
every_low_rank_case = _every(case for case in CASES if case.low_rank)
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
