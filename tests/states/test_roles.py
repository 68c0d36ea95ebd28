"""What an array of a state is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from recipes_table import CASES, params

import optax_structured as oxs
from optax_structured.states import arrays_of
from optax_structured.states.roles import FIRST_MOMENT, SECOND_MOMENT, FirstMoment


class Mine(NamedTuple):
    mean: FirstMoment[Any]
    other: Any


def test_a_state_says_beside_its_fields_what_they_are():
    state = Mine({"w": jnp.zeros(3)}, jnp.zeros(3))
    found = {(x.holder, x.field): x.role for x in arrays_of(state)}
    assert found == {("Mine", "mean"): FIRST_MOMENT, ("Mine", "other"): None}
    more = {"Mine": {"other": SECOND_MOMENT}}
    assert [x.role for x in arrays_of(state, more)] == [FIRST_MOMENT, SECOND_MOMENT]


class ScaleByAdamState(NamedTuple):
    """Of another library: a name of optax's, and another meaning."""

    mu: Any


def test_another_class_of_a_known_name_is_not_known():
    assert [x.role for x in arrays_of(ScaleByAdamState(jnp.zeros(3)))] == [None]


def test_scalars_integers_and_keys_are_counters():
    state = (jnp.zeros(()), jnp.zeros(3, int), jax.random.split(jax.random.key(0)))
    assert [x.role.name for x in arrays_of(state)] == ["counter"] * 3


def test_codes_inside_a_moment_are_codes():
    tx = oxs.quantized(optax.scale_by_adam(), min_size=0)
    found = {str(x.path[-1]): x.role.name for x in arrays_of(tx.init(jnp.zeros(8)))}
    assert found.items() >= {".codes": "codes", ".absmax": "codes", ".skipped": "counter"}.items()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_array_of_every_recipe_has_a_role(case):
    state = jax.eval_shape(case.build().init, params())
    assert not [x for x in arrays_of(state) if x.role is None]
