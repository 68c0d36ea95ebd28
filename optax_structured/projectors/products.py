"""Into a subspace and back: a leaf as matrices, times the factors of a basis."""

import jax
import jax.numpy as jnp

from optax_structured.meshes.placement import product, whole_matrices
from optax_structured.projectors.base import BasisFactors, transpose
from optax_structured.projectors.frames import Frame
from optax_structured.xla.narrow_operands import rows_first


def project(frame: Frame, factors: BasisFactors, matrix: jax.Array) -> jax.Array:
    r"""The low-rank leaf of a leaf seen as matrices, (\*batch, m, n)."""
    if frame.both:
        left, right = factors
        return product(product(transpose(left), frame.turn(matrix)), right)
    if isinstance(factors, tuple):
        return fold(tensor(frame, frame.turn(matrix)), factors)
    return product(_narrow(factors, matrix), matrix, transpose_b=frame.side == "cols")


def lift(frame: Frame, factors: BasisFactors, low: jax.Array) -> jax.Array:
    r"""The matrices, (\*batch, m, n), of a low-rank leaf."""
    if frame.both:
        left, right = factors
        return frame.turn(product(product(left, low), transpose(right)))
    if isinstance(factors, tuple):
        return _matrices(frame, fold(low, tuple(map(transpose, factors))))
    factors = _narrow(factors, low)
    first, second = (low, factors) if frame.side == "cols" else (factors, low)
    if jnp.finfo(low.dtype).bits >= 32:
        return product(first, second, transpose_a=True)
    return product(rows_first(transpose(first)), second)


def tensor(frame: Frame, oriented: jax.Array) -> jax.Array:
    r"""(\*batch, n_1, ..., n_N), whole on every device but for the batch."""
    batch, *_ = frame.axes.split(frame.shape)
    return jnp.transpose(frame.restore(whole_matrices(oriented)), batch + frame.tensor_axes)


def _matrices(frame: Frame, of_axes: jax.Array) -> jax.Array:
    """The matrices of what `tensor` gives."""
    batch, *_ = frame.axes.split(frame.shape)
    order = batch + frame.tensor_axes
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    return frame.axes.to_matrix(jnp.transpose(of_axes, inverse))


def fold(x: jax.Array, factors: tuple[jax.Array, ...], skip: int | None = None) -> jax.Array:
    """Contracts each of the last axes but `skip` with the rows of its factor."""
    for k, factor in enumerate(factors):
        if k != skip:
            axis = k - len(factors)
            last = jnp.moveaxis(x, axis, -1)
            rows = last.reshape(*factor.shape[:-2], -1, last.shape[-1])
            folded = product(rows, factor).reshape(*last.shape[:-1], factor.shape[-1])
            x = jnp.moveaxis(folded, -1, axis)
    return x


def _narrow(factors: jax.Array, leaf: jax.Array) -> jax.Array:
    """Computed factors come in the widest dtype: a leaf below float64 stays there."""
    wider = factors.dtype == jnp.float64 and leaf.dtype != jnp.float64
    return factors.astype(jnp.float32) if wider else factors
