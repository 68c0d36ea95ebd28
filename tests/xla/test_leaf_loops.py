"""Leaves that are alike share one loop: the result is that of each leaf alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from recipes_table import normal_tree
from tolerances import assert_close, reordered

import optax_structured as oxs
from optax_structured.xla import leaf_loops

GROUPS = oxs.GroupLasso(group_axis=-2)
SHAPES = {"a": (8, 16), "b": (16, 8), "c": (8, 16), "d": (8, 16), "bias": (16,)}
OPTIMIZERS = {
    "ramda": lambda: oxs.ramda(0.1, GROUPS, 0.1),
    "rmda": lambda: oxs.rmda(0.1, GROUPS, 0.1),
    "prox_adam": lambda: oxs.prox_adam(0.1, GROUPS, 0.1, weight_decay=0.1),
    "after_sgd": lambda: optax.chain(optax.sgd(0.1), oxs.prox_step(GROUPS, 0.5, weight=0.1)),
    "nuclear": lambda: oxs.prox_sgd(0.1, oxs.NuclearNorm(), 0.1),
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The eight devices of the tests are there for others; sharding unseen keeps leaves apart."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def steps(optimizer, params, grads):
    """What two steps make of the parameters."""
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for scale in (1.0, 0.5):
        scaled = jax.tree.map(lambda g, scale=scale: g * scale, grads)
        updates, state = update(scaled, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_trees_close(actual, expected, dtype=jnp.float32):
    for name, leaf in expected.items():
        assert_close(actual[name], leaf, reordered(dtype))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_loop_solves_each_leaf_as_if_alone(name, dtype, monkeypatch):
    params, grads = (normal_tree(key, SHAPES, dtype) for key in ("params", 0))
    together = steps(OPTIMIZERS[name](), params, grads)
    monkeypatch.setattr(leaf_loops, "_LOOP_SIZE", 0)
    assert_trees_close(together, steps(OPTIMIZERS[name](), params, grads), dtype)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["after_sgd", pytest.param("ramda", marks=pytest.mark.slow)])
def test_alike_in_shape_but_not_in_sharding(name, kind, monkeypatch):
    monkeypatch.undo()
    mesh = Mesh(np.asarray(jax.devices("cpu")[:4]), ("data",), axis_types=(kind,))
    specs = {k: P() for k in SHAPES} | {"a": P("data", None), "c": P(None, "data"), "b": P("data")}
    specs["d"] = specs["a"]
    params, grads = normal_tree("params", SHAPES), normal_tree(0, SHAPES)
    expected = steps(OPTIMIZERS[name](), params, grads)
    with jax.set_mesh(mesh):
        place = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
        got = steps(OPTIMIZERS[name](), jax.device_put(params, place), jax.device_put(grads, place))
    assert_trees_close(got, expected)
    for leaf, where in place.items():
        assert got[leaf].sharding.is_equivalent_to(where, got[leaf].ndim)


@pytest.mark.parametrize("name", ["after_sgd", pytest.param("ramda", marks=pytest.mark.slow)])
def test_shards_of_groups_inside_shard_map(name):
    """Whole groups on each device, some leaves on all of them: the shards are problems alone."""
    optimizer = OPTIMIZERS[name]()
    params, grads = normal_tree("params", SHAPES), normal_tree(0, SHAPES)
    state = optimizer.init(params)
    mesh = Mesh(np.asarray(jax.devices("cpu")[:4]), ("data",))

    def sharded(path, x):
        split = jnp.ndim(x) == 2 and not any(getattr(k, "key", None) == "d" for k in path)
        return P("data") if split else P()

    specs = [jax.tree.map_with_path(sharded, tree) for tree in (grads, state, params)]
    step = jax.shard_map(
        lambda *xs: optimizer.update(*xs)[0], mesh=mesh, in_specs=tuple(specs), out_specs=specs[2]
    )
    expected, _ = jax.jit(optimizer.update)(grads, state, params)
    assert_trees_close(jax.jit(step)(grads, state, params), expected)


@pytest.mark.slow
def test_an_ensemble_and_its_members():
    params, grads = normal_tree("params", SHAPES), normal_tree(0, SHAPES)
    members = jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), (params, grads))
    got = jax.vmap(lambda *xs: steps(OPTIMIZERS["ramda"](), *xs))(*members)
    expected = steps(OPTIMIZERS["ramda"](), params, grads)
    assert_trees_close(jax.tree.map(lambda x: x[0], got), expected)
    assert not any(jnp.any(leaf[1]) for leaf in got.values())


@pytest.mark.slow
def test_leaves_of_other_regularizers_stay_apart():
    rules = oxs.rules(("^a", oxs.GroupLasso(-1)), ("^c", oxs.L1()), ("bias", None), default=GROUPS)
    params, grads = normal_tree("params", SHAPES), normal_tree(0, SHAPES)
    together = steps(oxs.ramda(0.1, rules, 0.1), params, grads)
    for leaf, one in {"a": oxs.GroupLasso(-1), "c": oxs.L1(), "d": GROUPS}.items():
        expected = steps(oxs.ramda(0.1, one, 0.1), {leaf: params[leaf]}, {leaf: grads[leaf]})
        assert_trees_close({leaf: together[leaf]}, expected)


@dataclasses.dataclass(frozen=True)
class Weighted(oxs.regularizers.Regularizer):
    """One of a user's own, with an array in it, so that it has no hash."""

    weights: np.ndarray

    def value(self, w):
        return jnp.sum(jnp.linalg.norm(w, axis=1) * self.weights)

    def prox(self, u, metric, strength):
        return GROUPS.prox(u, metric, strength * self.weights[0])

    def coupled_axes(self, ndim):
        return (1,)


def test_a_regularizer_need_not_be_hashable():
    shapes = {"a": (8, 16), "b": (8, 16)}
    params, grads = normal_tree("params", shapes), normal_tree(0, shapes)
    got = steps(oxs.ramda(0.1, Weighted(np.full(8, 2.0)), 0.05), params, grads)
    assert_trees_close(got, steps(oxs.ramda(0.1, GROUPS, 0.1), params, grads))


@dataclasses.dataclass(frozen=True)
class Counting(oxs.Exact):
    """Counts the leaves that are traced."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def solve(self, regularizer, sub, warm):
        self.seen.append(sub.shape)
        return super().solve(regularizer, sub, warm)


def traced(shapes, make=lambda solver: oxs.ramda(0.1, GROUPS, 0.1, solver=solver)):
    optimizer = make(solver := Counting())
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )
    step = jax.jit(optimizer.update, donate_argnums=(0, 1))
    return solver.seen, step.lower(params, jax.eval_shape(optimizer.init, params), params)


@pytest.mark.parametrize(
    "make",
    [
        lambda solver: oxs.ramda(0.1, GROUPS, 0.1, solver=solver),
        lambda solver: oxs.prox_adam(0.1, GROUPS, 0.1, solver=solver),
        lambda solver: oxs.prox_step(GROUPS, 0.1, weight=0.1, solver=solver),
    ],
    ids=["ramda", "prox_adam", "after_sgd"],
)
def test_depth_does_not_add_solvers(make):
    few, _ = traced([(8, 16)] * 3, make)
    many, _ = traced([(8, 16)] * 50, make)
    assert few == many == [(8, 16)]


def test_outside_jit_no_loop_is_compiled_at_every_step():
    optimizer = oxs.ramda(0.1, GROUPS, 0.1, solver=(solver := Counting()))
    params = normal_tree("params", {"a": (8, 16), "b": (8, 16)})
    optimizer.update(params, optimizer.init(params), params)
    assert solver.seen == [(8, 16)] * 2


def test_large_leaves_are_solved_where_they_are():
    large = (2, leaf_loops._LOOP_SIZE // 3)
    seen, _ = traced([large] * 3)
    assert seen == [large] * 3


@pytest.mark.slow
def test_a_loop_holds_copies_of_so_many_entries_and_no_more():
    """The sum of gradients, the metric, its copy, the anchor, and the points."""
    leaves = 4 * leaf_loops._LOOP_SIZE // 256**2
    seen, lowered = traced([(256, 256)] * leaves)
    assert len(seen) == 4
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary <= 5 * 1.1 * leaf_loops._LOOP_SIZE * 4
