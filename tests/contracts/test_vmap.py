"""An ensemble under vmap equals its members."""

import jax
import jax.numpy as jnp
from hlo import unavoidable
from recipes_table import (
    assert_close,
    every_case,
    every_low_rank_case,
    normal_tree,
    params,
    run,
    step_of,
)
from tolerances import reordered

SEEDS = 3


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@every_case
def test_vmap_over_seeds(case):
    tx = case.build()
    starts = [normal_tree(("params", seed)) for seed in range(SEEDS)]
    grads = [[normal_tree((seed, i)) for i in range(3)] for seed in range(SEEDS)]
    states = jax.vmap(tx.init)(stack(starts))
    step = jax.jit(jax.vmap(step_of(tx)))
    current = stack(starts)
    for i in range(3):
        current, states = step(stack([g[i] for g in grads]), states, current)
    for seed in range(SEEDS):
        expected, _ = run(tx, starts[seed], grads[seed])
        got = jax.tree.map(lambda x, seed=seed: x[seed], current)
        assert_close(got, expected, 10 * reordered(jnp.float32))


@every_low_rank_case
def test_an_ensemble_does_not_refit_at_every_step(case):
    """The factorisations stay on one side of a conditional, and vmap does not run both."""
    tx = case.build()
    start = stack([params()] * SEEDS)
    states = jax.vmap(tx.init)(start)
    compiled = jax.jit(jax.vmap(step_of(tx))).lower(start, states, start).compile().as_text()
    moves_at_every_step = case.fixed["low_rank"].period is None
    assert unavoidable(compiled, "lapack") == moves_at_every_step
