"""A randomised SVD, redrawn at each fit."""

import dataclasses

import jax

from optax_structured.meshes.placement import like, product, repeated
from optax_structured.projectors.base import (
    Basis,
    OneSided,
    Refit,
    check_count,
    transpose,
    where_usable,
)
from optax_structured.projectors.orthonormal import (
    HIGHEST,
    fix_signs,
    leading,
    magnitude,
    orthonormal,
)
from optax_structured.projectors.range_finder import power_step, sketch


@dataclasses.dataclass(frozen=True)
class RandomizedRange(OneSided):
    r"""Leading singular vectors by a randomised range finder.

    .. math:: Q = \operatorname{qr}\big((G G^\top)^q\, G\,\Omega\big), \qquad
        P = Q\,U_{:,\,:r}, \quad U \text{ the eigenvectors of } Q^\top G G^\top Q

    with :math:`\Omega` Gaussian, (length, rank + oversampling), seeded by the leaf's name and the
    step. Columns come in the order of singular values, signs as in `SVD`. It does not depend on
    the basis before, at two to three times the cost of a warm `SubspaceIteration`.

    Args:
      oversampling: columns more than are kept, at least 0; 8.
      power: :math:`q`, at least 0; 1. Two for flat spectra, none where they decay like 1/i.

    Raises:
      ValueError: an oversampling or power that is not an int of at least 0.

    Equals `SVD` up to rounding where rank + oversampling reach the rank of the gradient.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> spec = oxs.LowRank(rank=2, period=200, projector=oxs.RandomizedRange())
      >>> optimizer = oxs.galore(1e-2, spec)
      >>> state = optimizer.init({"kernel": jnp.zeros((8, 5))})

    Reference: Halko, Martinsson, Tropp, `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2011.
    """

    oversampling: int = 8
    power: int = 1

    def __post_init__(self) -> None:
        check_count("oversampling", self.oversampling, 0)
        check_count("power", self.power, 0)

    def refit(self, step: Refit) -> tuple[Basis, jax.Array]:
        frame = step.frame

        def fit(basis: Basis, gradient: jax.Array, seed: jax.Array) -> Basis:
            rank = basis.shape[-2]
            columns = min(rank + self.oversampling, frame.size, frame.length)
            rows = orthonormal(sketch(gradient, columns, seed))
            rows = jax.lax.fori_loop(
                0, self.power, lambda _, q: like(power_step(gradient, q, orthonormal)[0], q), rows
            )
            small = product(rows / repeated(magnitude(gradient), rows), gradient)
            u = leading(product(small, small, HIGHEST, transpose_b=True), rank)
            p = fix_signs(product(rows, u, HIGHEST, transpose_a=True)).astype(basis.dtype)
            return like(transpose(p), basis)

        return where_usable(fit, step, step.seed)
