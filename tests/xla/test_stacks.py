"""Small leaves that are alike are computed as a stack, with what each would get alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from recipes_table import normal_tree

import optax_structured as oxs
from optax_structured.low_rank import wrapper
from optax_structured.xla.stacks import Stacks

SHAPES = {**dict.fromkeys("abcd", (16, 12)), "other": (12, 16), "bias": (12,)}
LOW_RANK = oxs.LowRank(3, period=2)
MAKE = {
    "galore": lambda: oxs.galore(0.1, LOW_RANK),
    "apollo": lambda: oxs.apollo(0.1, LOW_RANK),
    "rotated moments": lambda: oxs.galore(
        0.1, oxs.LowRank(3, period=2, transport=oxs.low_rank.Rotate())
    ),
    "adam, 8 bits": lambda: oxs.quantized(optax.adam(0.1), min_size=100),
    "ramda": lambda: oxs.ramda(0.1, oxs.GroupLasso(group_axis=-2), 1e-2),
}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def steps(optimizer, params, count=3):
    """The updates of the last step."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(count):
        grads = {name: jnp.roll(x, step) for name, x in params.items()}
        updates, state = update(grads, state, params)
    return updates


@pytest.mark.parametrize("name", MAKE)
def test_each_leaf_gets_what_it_would_get_alone(name):
    params = normal_tree("params", SHAPES)
    together = steps(MAKE[name](), params)
    for leaf in ("a", "d", "other"):
        alone = steps(MAKE[name](), {leaf: params[leaf]})
        np.testing.assert_allclose(together[leaf], alone[leaf], rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_stays_with_its_leaf():
    params = normal_tree("params", SHAPES)
    bad = {**params, "b": params["b"].at[0, 0].set(jnp.nan)}
    element = oxs.low_rank_projection(optax.scale_by_adam(), LOW_RANK)
    _, state = jax.jit(element.update)(bad, element.init(params), params)
    missing = {name: int(x.missing) for name, x in state.refresh.items()}
    assert missing.pop("b") == 1 + missing["a"] and len({*missing.values()}) == 1


def groups(kinds, shapes, **given):
    """The leaves in each stack, as a trace sees them."""
    found = []

    def trace(leaves):
        found.extend(Stacks(kinds, leaves, **given).groups)
        return leaves

    jax.eval_shape(trace, [jnp.zeros(shape) for shape in shapes])
    return found


@pytest.mark.parametrize(
    "kinds, shapes, apart, expected",
    [
        ("aaba", [(3,)] * 4, (), [[0, 1, 3], [2]]),
        ("aaa", [(3,), (4,), (3,)], (), [[0, 2], [1]]),
        ("aaaa", [(3,)] * 4, (1,), [[0, 2, 3], [1]]),
        ("aaa", [(128, 128)] * 3, (), [[0], [1], [2]]),
        ([[]] * 2, [(3,)] * 2, (), [[0], [1]]),
        ("a" * 130, [(3,)] * 130, (), [[*range(128)], [128, 129]]),
    ],
    ids=["kinds", "shapes", "apart", "large", "no hash", "many"],
)
def test_who_shares_a_stack(kinds, shapes, apart, expected):
    assert groups(kinds, shapes, apart=apart) == expected


def test_on_several_devices_leaves_are_alone(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert groups("aa", [(3,)] * 2) == [[0], [1]]


@pytest.mark.parametrize("name", ["galore", "adam, 8 bits", "ramda"])
def test_on_an_explicit_mesh_of_one_device(name):
    """Leaves are alone there: stacks would have to say how they are sharded."""
    axes = (AxisType.Explicit,) * 2
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "model"), axis_types=axes)
    params = normal_tree("params", dict.fromkeys("ab", (16, 12)))
    on_mesh = jax.device_put(params, NamedSharding(mesh, P("data", "model")))
    optimizer = MAKE[name]()
    expected, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    with jax.set_mesh(mesh):
        found, _ = jax.jit(optimizer.update)(on_mesh, optimizer.init(on_mesh), on_mesh)
    for leaf, x in expected.items():
        np.testing.assert_allclose(found[leaf], x, rtol=1e-4, atol=1e-6)


def test_outside_of_jit_leaves_are_alone():
    assert Stacks("aa", [jnp.zeros(3)] * 2).groups == [[0], [1]]


@pytest.mark.parametrize(
    "refresh, mask, stacks",
    [
        (oxs.low_rank.Periodic(), None, 2),
        (oxs.low_rank.Staggered(), None, 5),
        (oxs.low_rank.Periodic(), True, 5),
    ],
    ids=["periodic", "staggered", "mask"],
)
def test_leaves_that_take_turns_are_refit_alone(refresh, mask, stacks, monkeypatch):
    """In a stack, all would be refit when one of them is due."""
    made = []

    class Spy(Stacks):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self.groups)

    monkeypatch.setattr(wrapper, "Stacks", Spy)
    element = oxs.low_rank_projection(optax.identity(), oxs.LowRank(3, refresh=refresh))
    params = normal_tree("params", SHAPES)
    state = element.init(params)
    jax.eval_shape(lambda g: element.update(g, state, refresh=mask), params)
    assert [len(found) for found in made] == [stacks]


def test_slices_of_a_stack_are_at_places_that_the_compiler_does_not_know():
    """So that they are one kernel: that of `tests/benchmarks/many_leaves.py`."""
    update = MAKE["galore"]().update
    params = normal_tree("params", SHAPES)
    state = MAKE["galore"]().init(params)
    text = jax.jit(update).lower(params, state, params).compile().as_text()
    starts = re.findall(r"dynamic-slice\([^,]*, ([^,)]*)", text)
    assert starts and not any("constant" in start for start in starts)


@pytest.mark.parametrize("name", ["galore", "apollo", "adam, 8 bits"])
def test_what_a_state_keeps_of_a_stack_is_written_apart(name):
    """So that it is not compared with all else: that of `tests/benchmarks/many_leaves.py`."""
    optimizer, params = MAKE[name](), normal_tree("params", SHAPES)
    state = jax.eval_shape(optimizer.init, params)
    text = jax.jit(optimizer.update).lower(params, state, params).compile().as_text()
    bodies = re.findall(r" call\(.*to_apply=%([\w.-]+)", text)
    slices = [_body(text, name).count("dynamic-slice") for name in bodies]
    assert sum(slices) >= 2 * 4


def _body(text, name):
    """A computation of a program and those of its fusions."""
    own = re.search(rf"^%{re.escape(name)} \(.*?^}}", text, re.M | re.S)[0]
    fused = re.findall(r"calls=%([\w.-]+)", own)
    return own + "".join(_body(text, f) for f in fused)
