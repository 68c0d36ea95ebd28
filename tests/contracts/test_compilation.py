"""jit = no jit, state types that scan accepts, one compilation, donated buffers."""

import jax
import jax.numpy as jnp
from recipes_table import (
    assert_close,
    every_case,
    gradients,
    jitted,
    params,
    run,
    step_of,
    types,
)
from tolerances import reordered


@every_case
def test_jit_changes_nothing(case):
    grads = [gradients(i) for i in range(2)]
    got, state = run(case.build(), params(), grads)
    expected, eager_state = run(case.build(), params(), grads, jit=False)
    assert_close(got, expected, reordered(jnp.float32))
    assert types(state) == types(eager_state)


@every_case
def test_scan_equals_a_loop(case):
    grads = [gradients(i) for i in range(6)]
    tx = case.build()
    step = step_of(tx)

    @jax.jit
    def scanned(start, stacked):
        body = lambda carry, g: (step(g, carry[1], carry[0]), None)  # noqa: E731
        return jax.lax.scan(body, (start, tx.init(start)), stacked)[0]

    got, _ = scanned(params(), jax.tree.map(lambda *x: jnp.stack(x), *grads))
    expected, _ = run(case.build(), params(), grads)
    assert_close(got, expected, reordered(jnp.float32))


@every_case
def test_donated_steps_compile_once(case):
    grads = [gradients(i) for i in range(3)]
    expected, _ = run(case.build(), params(), grads)
    tx = case.build()
    step = jax.jit(step_of(tx), donate_argnums=(1, 2))
    current = params()
    state = tx.init(current)
    for g in grads:
        before = jax.tree.leaves(current)
        current, state = step(g, state, current)
        assert all(leaf.is_deleted() for leaf in before)
    assert step._cache_size() == 1
    assert_close(current, expected, reordered(jnp.float32))


@every_case
def test_state_does_not_alias_the_parameters(case):
    start = params()
    state = case.build().init(start)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(start)}
    assert not pointers & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}


@every_case
def test_step_makes_no_host_transfer(case):
    tx = case.build()
    step = jitted(tx)
    current, state, grads = params(), tx.init(params()), gradients(0)
    current, state = step(grads, state, current)
    with jax.transfer_guard("disallow"):
        step(grads, state, current)
