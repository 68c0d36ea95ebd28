r"""Numbers and bytes of optimizer state by the published formulas, one method per line.

A matrix has a compressed axis of `size` entries, of which `rank` are kept, and another of `length`
entries. The papers compress the smaller axis (:math:`q` of :math:`p \ge q`); with
`Axes(side="large")` the same lines give `reverse_std` and the other side of `optax.contrib.galore`.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from optax_structured.recipes.registry import RECIPES
from optax_structured.recipes.state_numbers import Formula, Matrix, Numbers
from optax_structured.trees import named_leaves, resolve


class Widths(NamedTuple):
    """Bytes that a number of each kind takes; by default those of bfloat16.

    Scales count with the numbers that share them: moments of 8 bits in blocks of 256 take
    `1 + 4 / 256`, a basis of 4 bits in groups of 256, with scale and zero in bfloat16,
    `0.5 + 4 / 256`; with the float32 scale and the zero of one byte of `Affine`, `0.5 + 5 / 256`.
    """

    moments: float = 2  # a moment
    basis: float = 2  # an entry of a basis
    other: float = 2  # norms, indices, factored moments, error buffers


METHODS: Mapping[str, Formula] = MappingProxyType(
    {
        **{name: recipe.numbers for name, recipe in RECIPES.items() if recipe.numbers},
        "galore_two_sided": lambda x: Numbers(2 * x.rank**2, (x.size + x.length) * x.rank),
        "galore_adafactor": lambda x: Numbers(0, x.basis, x.length + x.rank),
        "galore_adafactor_momentum": lambda x: Numbers(
            x.length * x.rank, x.basis, x.length + x.rank
        ),
        "grad_norm_lorp_lookahead": lambda x: Numbers(x.moments, x.basis, x.entries + 3 * x.rows),
    }
)


def published_numbers(method: str, structure: Any, params: Any) -> dict[str, int]:
    r"""Numbers of optimizer state of each leaf by the published formula of a method.

    For a batch of :math:`B` matrices whose compressed axis has :math:`q` entries and the other
    :math:`p`, and rank :math:`\rho`, for example

    .. math:: \text{galore: } B(q\rho + 2p\rho), \qquad \text{apollo: } B(2p\rho + 2), \qquad
        \text{adamw: } 2Bpq

    and Adam's :math:`2 \cdot \text{entries}` for leaves that are not projected. What they take is
    `published_bytes`.

    Args:
      method: one of `METHODS`.
      structure: a `LowRank`, or `rules` of them; None for `"adamw"`.
      params: concrete or abstract parameters.

    Returns:
      Numbers by the path of the leaf, in the order of `jax.tree.leaves(params)`.

    Raises:
      ValueError: an unknown method, or a rank that is not one number, as Tucker factors have.

    >>> import jax.numpy as jnp
    >>> published_numbers("adamw", None, {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)})
    {'bias': 6, 'kernel': 24}
    """
    return {path: sum(kinds) for path, kinds in _by_kind(method, structure, params).items()}


def published_bytes(
    method: str,
    structure: Any,
    params: Any,
    widths: Widths = Widths(),  # noqa: B008  (immutable)
) -> dict[str, float]:
    r"""Bytes of optimizer state of each leaf by the published formula of a method.

    .. math:: n_{moments} w_{moments} + n_{basis} w_{basis} + n_{other} w_{other}

    with the numbers of `published_numbers`. The papers count every leaf as quantized, small ones
    too, and scales as if blocks divided it; what is really held is in `memory_report`.

    Args:
      method, structure, params: as in `published_numbers`.
      widths: bytes per number; by default 2, as the papers' bfloat16 tables count. 8-bit GaLore is
        `Widths(moments=1 + 4 / 256)`.

    Returns:
      Bytes by the path of the leaf, in the order of `jax.tree.leaves(params)`.

    Raises:
      ValueError: as `published_numbers`.

    Equals twice `published_numbers` with the widths of bfloat16.

    >>> import jax.numpy as jnp
    >>> eight_bit = Widths(moments=1 + 4 / 256)
    >>> published_bytes("adamw", None, {"kernel": jnp.zeros((64, 64))}, eight_bit)
    {'kernel': 8320.0}
    """
    return {
        path: sum(n * width for n, width in zip(kinds, widths, strict=True))
        for path, kinds in _by_kind(method, structure, params).items()
    }


def _by_kind(method: str, structure: Any, params: Any) -> dict[str, Numbers]:
    if method not in METHODS:
        raise ValueError(f"no formula for {method!r}; there are {', '.join(METHODS)}")
    formula = METHODS[method]
    numbers = {}
    for (path, leaf), spec in zip(named_leaves(params), resolve(structure, params), strict=True):
        shape = np.shape(leaf)
        if spec is None:
            numbers[path] = Numbers(moments=2 * math.prod(shape))
            continue
        if not isinstance(spec.rank, int):
            raise ValueError(f"{path}: the formulas take one rank per matrix, got {spec.rank!r}")
        *batch, m, n = spec.axes.matrix_shape(shape)
        size, length = (m, n) if spec.axes.compressed_side(shape) == "rows" else (n, m)
        matrix = Matrix(size, length, min(spec.rank, m, n), rows=m)
        numbers[path] = Numbers(*(math.prod(batch) * kind for kind in formula(matrix)))
    return numbers
