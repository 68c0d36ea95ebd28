"""Adam with its counters in the precision of the parameters, for published float64 runs.

That of optax takes powers of its counters in float32, an error of some 1e-5 in the first steps.
"""

import jax
import jax.numpy as jnp
import optax


def scale_by_exact_adam(b1=0.9, b2=0.999, eps=1e-8, rounded=lambda g, t: g):
    """`optax.scale_by_adam`; the second moment takes the square of `rounded(gradient, step)`."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, zeros)

    def update(grads, state, params=None):
        t = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(
            lambda v, g: b2 * v + (1 - b2) * jnp.square(rounded(g, t)), state.nu, grads
        )

        def direction(m, v):
            steps = t.astype(m.dtype)
            return m / (1 - b1**steps) / (jnp.sqrt(v / (1 - b2**steps)) + eps)

        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(t, mu, nu)

    return optax.GradientTransformation(init, update)
