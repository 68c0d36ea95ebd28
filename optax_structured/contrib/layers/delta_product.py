"""DeltaProduct: a linear recurrence whose transitions are products of Householder-like matrices."""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from optax_structured.trees.precision import at_least_float32


def delta_product(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    beta: ArrayLike,
    g: ArrayLike | None = None,
    *,
    initial_state: ArrayLike | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Runs the gated delta rule several times a token, and reads its memory after the last time.

    .. math:: S \leftarrow e^{g_i} S, \qquad
        S \leftarrow (I - \beta_{ij} k_{ij} k_{ij}^\top) S + \beta_{ij} k_{ij} v_{ij}^\top
        \quad (j = 1, \dots, n_h), \qquad o_i = \text{scale} \cdot S^\top q_i

    S is (K, V). Each of the :math:`n_h` steps of a token is one of gradient descent, of rate
    :math:`\beta`, on :math:`\tfrac12 \|S^\top k - v\|^2`.

    Args:
      q: (..., tokens, K), queries.
      k: (..., tokens, n_h, K), keys, of norm 1; they are used as they are.
      v: (..., tokens, n_h, V), values.
      beta: (..., tokens, n_h), rates; in (0, 1), or in (0, 2) for transitions that reflect, which
        tracking of states needs: twice a sigmoid.
      g: (..., tokens), finite logarithms of decay, at most 0; None for none. Once a token, before
        its steps.
      initial_state: (..., K, V); None for zeros.
      scale: of the outputs; None for :math:`K^{-1/2}`.
      chunk_size: tokens computed together by matrix products, 64 / n_h or so; None for one token
        at a time. The results differ by rounding only.

    Returns:
      Outputs (..., tokens, V) and the last state (..., K, V), for the next call. Float32 or wider.

    Raises:
      ValueError: shapes that do not fit.

    Equals DeltaNet for n_h = 1, and Gated DeltaNet with g.

    Example:
      >>> import jax.numpy as jnp
      >>> e1, one = jnp.array([1.0, 0.0]), jnp.ones((1, 1))
      >>> o, state = delta_product(e1[None], e1[None, None], 5 * one[None], one, scale=1.0)
      >>> print(o[0], state[:, 0])
      [5.] [5. 0.]

    References:
      Siems et al., `DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products
      <https://arxiv.org/abs/2502.10297>`_, 2025. The reference function in the maintained code
      ignores its scale; its kernels normalise keys inside if asked to.
    """
    q, k, v, beta = (at_least_float32(jnp.asarray(a)) for a in (q, k, v, beta))
    g = jnp.zeros(q.shape[:-1], q.dtype) if g is None else at_least_float32(jnp.asarray(g))
    steps = k.shape[-2] if k.ndim > 2 else -1
    lead, keys, values = q.shape[:-1], q.shape[-1], v.shape[-1]
    want = {"k": (*lead, steps, keys), "v": (*lead, steps, values), "beta": (*lead, steps)}
    want["g"] = lead
    for name, array in (("k", k), ("v", v), ("beta", beta), ("g", g)):
        if array.shape != want[name]:
            raise ValueError(
                f"delta_product: {name} has shape {array.shape}; with q (..., tokens, K) = "
                f"{q.shape} it must be k (..., tokens, n_h, K), v (..., tokens, n_h, V), "
                "beta (..., tokens, n_h), g (..., tokens)"
            )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, or None, got {chunk_size}")
    if initial_state is None:
        state = jnp.zeros((*lead[:-1], keys, values), jnp.result_type(q, k, v, beta, g))
    else:
        state = at_least_float32(jnp.asarray(initial_state))
    run = _recurrence if chunk_size is None else functools.partial(_chunked, chunk_size=chunk_size)
    over_batch = jnp.vectorize(run, signature="(t,k),(t,h,k),(t,h,v),(t,h),(t),(k,v)->(t,v),(k,v)")
    outputs, state = over_batch(q, k, v, beta, g, state)
    return outputs * (keys**-0.5 if scale is None else scale), state


def _recurrence(q, k, v, beta, g, state):  # type: ignore[no-untyped-def]
    def token(state, inputs):  # type: ignore[no-untyped-def]
        q, k, v, beta, g = inputs
        state = jnp.exp(g) * state
        for j in range(len(beta)):
            state = state + jnp.outer(beta[j] * k[j], v[j] - k[j] @ state)
        return state, q @ state

    state, outputs = jax.lax.scan(token, state, (q, k, v, beta, g))
    return outputs, state


def _chunked(q, k, v, beta, g, state, *, chunk_size):  # type: ignore[no-untyped-def]
    tokens = len(q)
    size = min(chunk_size, max(tokens, 1))
    chunks = -(-tokens // size)

    def split(x: jax.Array) -> jax.Array:
        """(chunks, size, ...); rates, decays and keys of 0 at the end leave the state unchanged."""
        x = jnp.pad(x, [(0, chunks * size - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, size, *x.shape[1:])

    state, outputs = jax.lax.scan(_chunk, state, tuple(map(split, (q, k, v, beta, g))))
    return outputs.reshape(chunks * size, -1)[:tokens], state


def _chunk(state, inputs):  # type: ignore[no-untyped-def]
    """All steps of a chunk as a triangular system, with one row for each step of each token."""
    q, k, v, beta, g = inputs
    steps = beta.shape[1]
    k, v, beta = (x.reshape(-1, *x.shape[2:]) for x in (k, v, beta))
    gone = jnp.cumsum(g)  # log of the decay since the start of the chunk, by token
    gone_by_step = jnp.repeat(gone, steps)
    row = jnp.arange(len(beta))
    # Of differences, not a ratio of exponentials: these are at most 0, and nothing overflows.
    since = jnp.where(row[:, None] >= row, gone_by_step[:, None] - gone_by_step, -jnp.inf)
    decay = jnp.exp(since)
    products = beta[:, None] * (k @ k.T) * decay
    missing = v - jnp.exp(gone_by_step)[:, None] * (k @ state)
    written = solve_triangular(products, beta[:, None] * missing, lower=True, unit_diagonal=True)
    last = decay[steps - 1 :: steps]  # the rows after the last step of each token
    outputs = jnp.exp(gone)[:, None] * (q @ state) + ((q @ k.T) * last) @ written
    left = jnp.exp(gone[-1] - gone_by_step)[:, None] * k
    return jnp.exp(gone[-1]) * state + left.T @ written, outputs
