r"""Numbers of optimizer state by the published formulas, one method a line.

A matrix has a compressed axis of `size` entries, of which `rank` are kept, and another of `length`
entries. The papers compress the smaller axis (:math:`q` of :math:`p \ge q`); with
`Axes(side="large")` the same lines give `reverse_std` and the other side of `optax.contrib.galore`.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from optax_structured.trees import named_leaves, resolve


class Matrix(NamedTuple):
    """What the formulas know of one matrix."""

    size: int  # of the compressed axis
    length: int  # of the other
    rank: int  # kept of `size`
    rows: int  # the axis of the outputs, whichever is compressed


Formula = Callable[[Matrix], int]


def _moments(x: Matrix) -> int:
    return 2 * x.length * x.rank


def _basis(x: Matrix) -> int:
    return x.size * x.rank


def _entries(x: Matrix) -> int:
    return x.size * x.length


# One norm for Fira's limiter; a seed and a norm for APOLLO, whose basis is drawn again. The error
# buffers of `dct_adamw`, `trion` and `ldadam` are counted: in JAX no gradient buffer can hold them.
METHODS: Mapping[str, Formula] = MappingProxyType(
    {
        "adamw": lambda x: 2 * _entries(x),
        "galore": lambda x: _basis(x) + _moments(x),
        "galore_two_sided": lambda x: (x.size + x.length) * x.rank + 2 * x.rank**2,
        "galore_adafactor": lambda x: _basis(x) + x.length + x.rank,
        "galore_adafactor_momentum": lambda x: _basis(x) + x.length + x.rank + x.length * x.rank,
        "fira": lambda x: _basis(x) + _moments(x) + 1,
        "apollo": lambda x: _moments(x) + 2,
        "apollo_mini": lambda x: 2 * x.length + 2,
        "dct_adamw": lambda x: _moments(x) + x.rank + _entries(x),
        "trion": lambda x: x.rank + _entries(x),
        "ldadam": lambda x: _basis(x) + _moments(x) + _entries(x),
        "grad_norm_lorp": lambda x: _basis(x) + _moments(x) + 2 * x.rows,
        "grad_norm_lorp_lookahead": lambda x: _basis(x) + _moments(x) + _entries(x) + 3 * x.rows,
    }
)


def published_numbers(method: str, structure: Any, params: Any) -> dict[str, int]:
    r"""Numbers of optimizer state of each leaf by the published formula of a method.

    For a batch of :math:`B` matrices whose compressed axis has :math:`q` entries and the other
    :math:`p`, and rank :math:`\rho`, for example

    .. math:: \text{galore: } B(q\rho + 2p\rho), \qquad \text{apollo: } B(2p\rho + 2), \qquad
        \text{adamw: } 2Bpq

    and Adam's :math:`2 \cdot \text{entries}` for leaves that are not projected. Multiply by the
    bytes a number takes: 4 here, where accumulators are float32; 2 in the papers' bfloat16 tables.

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
    if method not in METHODS:
        raise ValueError(f"no formula for {method!r}; there are {', '.join(METHODS)}")
    formula = METHODS[method]
    numbers = {}
    for (path, leaf), spec in zip(named_leaves(params), resolve(structure, params), strict=True):
        shape = np.shape(leaf)
        if spec is None:
            numbers[path] = 2 * math.prod(shape)
            continue
        if not isinstance(spec.rank, int):
            raise ValueError(f"{path}: the formulas take one rank a matrix, got {spec.rank!r}")
        *batch, m, n = spec.axes.matrix_shape(shape)
        size, length = (m, n) if spec.axes.compressed_side(shape) == "rows" else (n, m)
        matrix = Matrix(size, length, min(spec.rank, m, n), rows=m)
        numbers[path] = math.prod(batch) * formula(matrix)
    return numbers
