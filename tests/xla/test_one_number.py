"""Additions of a flag that all leaves read are compiled once."""

import jax
import jax.numpy as jnp

from optax_structured.xla.one_number import one_number


def additions(settle, leaves):
    """How many a compiled program has that zeroes all leaves where one of them is not finite."""

    def guarded(tree):
        bad = sum(jnp.sum(x - x) for x in tree)
        return [jnp.where(settle(bad) == 0, x, 0) for x in tree]

    tree = [jnp.ones(8 + i) for i in range(leaves)]
    return jax.jit(guarded).lower(tree).compile().as_text().count(" add(")


def test_they_grow_with_the_leaves_and_not_with_their_square():
    assert additions(one_number, 16) < 3 * additions(one_number, 8)


def test_it_is_still_needed():
    assert additions(lambda x: x, 16) > 2 * additions(one_number, 16)
