"""The bytes of weights, gradients and optimizer state, leaf by leaf, from abstract shapes."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.memory.formulas import published_numbers
from optax_structured.states import owners
from optax_structured.trees.rules import settle
from optax_structured.trees.tables import aligned, kinds

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LeafMemory:
    """What one parameter and its optimizer state take."""

    path: str
    shape: Shape
    dtype: str  # of the parameter
    rule: str  # the pattern that matched, "default", or "" without rules
    spec: Any  # what the rules give to the leaf; None where it is plain
    weight_bytes: int  # a gradient takes the same
    state_numbers: int  # entries of the state arrays of this leaf; two 4-bit codes are one, a byte
    state_bytes: int
    code_bytes: int  # of these, in codes of 8 or 4 bits, without their scales
    formula_numbers: int | None  # by the published formula; None without a method
    reason: str = ""  # why the leaf cannot take the default of the rules; "" where it can


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What parameters and optimizer state take, per leaf and in total; prints as a table."""

    leaves: tuple[LeafMemory, ...]
    shared_numbers: int  # state that belongs to no leaf: counters, random keys
    shared_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.weight_bytes for leaf in self.leaves)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one full gradient, which has the dtypes of the parameters."""
        return self.weight_bytes

    @property
    def state_numbers(self) -> int:
        """Entries of all state arrays; twice them are comparable to published bfloat16 tables.

        Of a quantized state this is the number of codes (of bytes, with two 4-bit codes each) and
        scales: compare `state_bytes`.
        """
        return self.shared_numbers + sum(leaf.state_numbers for leaf in self.leaves)

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer state, as `state_bytes(tx, params)`."""
        return self.shared_bytes + sum(leaf.state_bytes for leaf in self.leaves)

    @property
    def code_bytes(self) -> int:
        """Bytes of the optimizer state in codes of 8 or 4 bits; 0 where nothing is quantized."""
        return sum(leaf.code_bytes for leaf in self.leaves)

    @property
    def formula_numbers(self) -> int | None:
        """Entries by the published formula; None without a method."""
        numbers = [leaf.formula_numbers for leaf in self.leaves]
        return None if None in numbers else sum(filter(None, numbers))

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each kind of leaf that a low-rank spec does not serve."""
        found = []
        for name, leaves in kinds(self.leaves, lambda x: (x.shape, x.spec, x.reason)):
            leaf, entries = leaves[0], math.prod(leaves[0].shape)
            if leaf.reason and len(leaf.shape) > 1:
                found.append(f"{name} stays plain: {leaf.reason}")
            elif hasattr(leaf.spec, "rank") and leaf.state_numbers > 2 * entries:
                found.append(
                    f"{name} takes {leaf.state_numbers:,} numbers of state, more than the "
                    f"{2 * entries:,} of plain Adam"
                )
        return tuple(found)

    def table(self) -> str:
        """Plain text: a row for leaves that differ in numbers only, the shared state, the total.

        Bytes and numbers of a row are those of all its leaves.
        """
        heading = ("path", "shape", "dtype", "rule", "rank", *_NUMBERS)
        rows: list[tuple[str, ...]] = [heading]
        alike = lambda x: (x.shape, x.dtype, x.rule, x.spec, x.formula_numbers is None)  # noqa: E731
        for name, leaves in kinds(self.leaves, alike):
            x = leaves[0]
            rank = "" if x.spec is None else str(getattr(x.spec, "rank", x.spec))
            rows.append((name, str(x.shape), x.dtype, x.rule, rank, *_sizes(leaves)))
        shared = (None, None, self.shared_bytes, None, self.shared_numbers, None)
        rows.append(("shared", "", "", "", "", *_cells(*shared)))
        total = (self.weight_bytes, self.gradient_bytes, self.state_bytes, self.code_bytes)
        numbers = (self.state_numbers, self.formula_numbers)
        rows.append(("total", "", "", "", "", *_cells(*total, *numbers)))
        return "\n".join((aligned(rows, range(5, len(heading))), *self.notes))

    def __repr__(self) -> str:
        return self.table()


_NUMBERS = (
    "weight bytes",
    "gradient bytes",
    "state bytes",
    "in codes",
    "state numbers",
    "by formula",
)


def _sizes(leaves: Sequence[LeafMemory]) -> tuple[str, ...]:
    """The cells of `_NUMBERS`, of all these leaves together."""
    sizes = ("weight_bytes", "weight_bytes", "state_bytes", "code_bytes", "state_numbers")
    formula = [leaf.formula_numbers for leaf in leaves]
    known = None if None in formula else sum(filter(None, formula))
    return _cells(*(sum(getattr(leaf, size) for leaf in leaves) for size in sizes), known)


def _cells(*numbers: int | None) -> tuple[str, ...]:
    return tuple("" if number is None else f"{number:,}" for number in numbers)


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _shapes(params: Any) -> Any:
    """The parameters as `jax.ShapeDtypeStruct`, without their placement."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), params
    )


def abstract_state(tx: Any, params: Any) -> Any:
    """The state of a transformation as shapes, for parameters on any mesh.

    Args:
      tx: any optax transformation.
      params: parameters, concrete or abstract (`jax.ShapeDtypeStruct`).

    Returns:
      What `tx.init(params)` returns, with `jax.ShapeDtypeStruct` for arrays.

    >>> import optax
    >>> abstract_state(optax.trace(0.9), {"kernel": jnp.zeros((4, 3))}).trace
    {'kernel': ShapeDtypeStruct(shape=(4, 3), dtype=float32)}
    """
    return jax.eval_shape(tx.init, _shapes(params))


def state_bytes(tx: Any, params: Any) -> int:
    """Bytes of the state of a transformation, exactly, without allocating anything.

    The sum of `size * itemsize` over the leaves of `jax.eval_shape(tx.init, params)`: the `nbytes`
    of the real state. On several devices see `state_shardings` for what each of them holds.

    Args:
      tx, params: as in `abstract_state`.

    Returns:
      Bytes, an int.

    >>> import jax.numpy as jnp, optax
    >>> state_bytes(optax.adam(1e-3), {"kernel": jnp.zeros((4, 3))})  # two moments and a counter
    100
    """
    return sum(map(_bytes, jax.tree.leaves(abstract_state(tx, params))))


def memory_report(
    tx: Any, params: Any, structure: Any = None, *, method: str | None = None
) -> MemoryReport:
    """Weights, gradients and optimizer state of each leaf and in total, without allocating.

    Walks the actual state, `jax.eval_shape(tx.init, params)`, and gives each array to the parameter
    that its place in the state belongs to.

    Args:
      tx, params: as in `abstract_state`.
      structure: the `LowRank` or regularizer (or `rules` of them) that `tx` was built with: adds
        the rule and the rank of each leaf.
      method: adds the published formula of a method beside the actual numbers: one of
        `oxs.memory.METHODS`, such as `"galore"`.

    Returns:
      A `MemoryReport`: `.state_bytes`, `.state_numbers`, `.code_bytes`, `.weight_bytes`,
      `.gradient_bytes`, `.leaves`; `print(report)` shows the table. Accumulators are float32 here,
      four bytes per number, for any dtype of the parameters (published tables count two), flags
      and counts of fits one; `quantized` and codecs of bases make them codes, of which
      `.code_bytes` says how many bytes there are. An inner transformation may hold less:
      `galore(..., inner=optax.scale_by_adam(mu_dtype="bfloat16"))`.

    Raises:
      ValueError: an unknown method; rules that match nothing.

    >>> import jax.numpy as jnp, optax, optax_structured as oxs
    >>> params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    >>> report = memory_report(optax.adam(1e-3), params, method="adamw")
    >>> report.weight_bytes, report.state_bytes, report.state_numbers, report.formula_numbers
    (60, 124, 31, 30)

    Of a quantized state, codes and scales, here one per block of 256:

    >>> params = {"kernel": jnp.zeros((64, 64))}
    >>> report = memory_report(oxs.quantized(optax.adam(1e-3)), params)
    >>> report.state_bytes, report.code_bytes, report.state_numbers
    (8332, 8192, 8227)
    """
    params = _shapes(params)
    numbers: collections.Counter[int | None] = collections.Counter()
    sizes: collections.Counter[int | None] = collections.Counter()
    codes: collections.Counter[int | None] = collections.Counter()
    state = abstract_state(tx, params)
    for owner, leaf in zip(owners(tx, state, params), jax.tree.leaves(state), strict=True):
        numbers[owner] += leaf.size
        sizes[owner] += _bytes(leaf)
        codes[owner] += _bytes(leaf) if leaf.dtype == jnp.uint8 else 0
    formula = published_numbers(method, structure, params) if method else {}
    leaves = []
    for i, item in enumerate(settle(structure, params)):
        rule = "" if structure is None else item.rule or "default"
        leaves.append(
            LeafMemory(
                item.path,
                item.leaf.shape,
                item.leaf.dtype.name,
                rule,
                item.value,
                _bytes(item.leaf),
                numbers[i],
                sizes[i],
                codes[i],
                formula.get(item.path),
                item.reason,
            )
        )
    return MemoryReport(tuple(leaves), numbers[None], sizes[None])
