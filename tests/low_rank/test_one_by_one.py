"""The matrices of a stack in a loop: the same numbers, one whole basis at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import all_collectives, shapes_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from recipes_table import assert_close, normal_tree, run, step_of
from tolerances import reordered

import optax_structured as oxs

SHAPES = {"stack": (3, 8, 16), "experts": (2, 2, 8, 8)}
RECIPES = {
    "galore": lambda spec: oxs.galore(1e-2, spec),
    "fira": lambda spec: oxs.fira(1e-2, spec),
    "q_galore": lambda spec: oxs.q_galore(1e-2, spec, weights=None),
}


@pytest.mark.parametrize(
    "name", ["galore", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fira", "q_galore"))]
)
def test_the_same_numbers(name):
    spec = oxs.LowRank(2, period=2)
    start, grads = normal_tree("p", SHAPES), [normal_tree(i, SHAPES) for i in range(4)]
    together, in_turn = (
        run(RECIPES[name](s), start, grads)
        for s in (spec, dataclasses.replace(spec, one_by_one=True))
    )
    assert_close(in_turn[0], together[0], reordered(jnp.float32))
    assert jax.tree.structure(in_turn[1]) == jax.tree.structure(together[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_no_more_than_one_basis_is_gathered_at_a_time(kind):
    """Types tell an explicit mesh, `choose_sides` an automatic one."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    place = NamedSharding(mesh, P(None, None, "d"))
    params = {"stack": jax.ShapeDtypeStruct((6, 16, 32), jnp.float32, sharding=place)}
    spec = oxs.LowRank(8, period=2)
    tx = oxs.galore(1e-2, oxs.choose_sides(spec, params) if kind == AxisType.Auto else spec)
    with jax.set_mesh(mesh):
        where = oxs.state_shardings(tx, params)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            where,
        )
        step = jax.jit(step_of(tx), out_shardings=({"stack": place}, where))
        text = step.lower(params, state, params).compile().as_text()
    sizes = [np.prod(shape) for x in all_collectives(text) for shape in shapes_of(x)]
    assert 0 < max(sizes) <= 8 * 16


def test_sides_are_chosen_with_it():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def leaf(*spec):
        return jax.ShapeDtypeStruct((8, 8, 16), jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    params = {"within": leaf(None, "d"), "layers": leaf("d"), "whole": leaf()}
    chosen = {x.path: x.value for x in oxs.choose_sides(oxs.LowRank(2), params).assign(params)}
    assert {path: spec.one_by_one for path, spec in chosen.items()} == {
        "within": True,
        "layers": False,
        "whole": False,
    }
