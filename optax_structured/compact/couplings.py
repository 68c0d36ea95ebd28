"""The groups that have to die together so that a model becomes smaller, read off its program."""

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_structured.compact.labelling import labelled
from optax_structured.compact.program import trace
from optax_structured.compact.units import STAYS, Units, Value
from optax_structured.regularizers.coupled import CoupledGroupLasso
from optax_structured.trees import Rules, named_leaves, rules


def couplings(fn: Callable[..., Any], params: Any, *inputs: Any, whole: str | None = None) -> Rules:
    r"""The group lasso whose zeros `compact` can cut, for any function.

    A unit is a hidden feature, a channel, a head or a feature of a residual stream: what has a
    slice in each of several leaves. The program is followed from leaf to leaf, and slices that meet
    in a sum, a product or an elementwise operation belong to one unit. Units whose values are read
    by something that needs all of them (a softmax or LayerNorm over them, the output, a primitive
    without a rule) have no group, as nothing becomes smaller without them.

    A group has the slices that read its unit or, where something else reads it too (an RMSNorm over
    it), those that write it: if they are zero, the unit is gone. Of the others it has those that no
    other group needs, so that every entry is in one group, and the prox is exact. So a kernel
    between two layers is grouped by the units that it reads; its columns go once nobody reads them.

    Args:
      fn: of (params, *inputs), as for `compact`.
      params: tree of arrays or `jax.ShapeDtypeStruct`: their numbers do not matter.
      *inputs: an example of the other arguments, arrays or `jax.ShapeDtypeStruct`.
      whole: pattern of the leaves that keep their shape: units that have a slice in one of them
        have no group. `"embed"` keeps a residual stream.

    Returns:
      `rules` of `CoupledGroupLasso`, for `ramda`, `prox_adam` and all other proximal recipes;
      `.table(params)` prints them. Of stacked layers a unit has its slices in all layers, as only
      then it can be cut.

    Raises:
      TypeError: the function needs the numbers of its arguments in Python.
      ValueError: no unit can be cut; a pattern that matches no leaf.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]
      >>> params = {"up": jnp.ones((3, 4)), "bias": jnp.ones(4), "down": jnp.ones((4, 2))}
      >>> groups = oxs.compact.couplings(mlp, params, jnp.ones((5, 3)))
      >>> for pattern, group in groups.pairs:
      ...     print(pattern, group.units, group.axis, group.count)
      ^bias$ bias:0 0 4
      ^down$ bias:0 0 4
      ^up$ bias:0 1 4
      >>> optimizer = oxs.ramda(1e-2, groups, strength=1e-3)
    """
    program, _ = trace(fn, params, *inputs, unroll=False)
    named = [(path, np.shape(leaf), jnp.result_type(leaf)) for path, leaf in named_leaves(params)]
    pattern = re.compile(whole) if whole is not None else None
    if pattern is not None and not any(pattern.search(path) for path, _, _ in named):
        raise ValueError(f"couplings: whole={whole!r} matches no parameter path")
    units, leaves = labelled(program, [shape for _, shape, _ in named])
    found = _layers(units, leaves)
    if pattern is not None:
        kept = {i for i, (path, _, _) in enumerate(named) if pattern.search(path)}
        found = [x for x in found if not kept & {part.leaf for part in x.parts}]
    pairs = []
    for layer, parts in _claimed(found):
        first = min(part.leaf for part in parts), min(parts, key=lambda p: p.leaf).axis
        units_name = f"{named[first[0]][0]}:{first[1]}"
        for part in parts:
            group = CoupledGroupLasso(units_name, part.axis, layer.count, part.inner)
            pairs.append((part.leaf, (f"^{re.escape(named[part.leaf][0])}$", group)))
    if not pairs:
        raise ValueError(
            "couplings: no unit of this function can be cut; everything that its parameters write "
            "is returned, or read by an operation that needs all of it"
        )
    return rules(*(pair for _, pair in sorted(pairs, key=lambda x: x[0])), default=None)


@dataclasses.dataclass(frozen=True)
class _Part:
    """The slices of the units of a layer in one leaf."""

    leaf: int
    axis: int
    inner: int  # entries beside each other of one unit; 0: they do not lie in such blocks
    reads: bool
    writes: bool


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Units that lie alike."""

    count: int
    parts: tuple[_Part, ...]
    by_readers: bool  # zero in all slices that read them, they are gone
    by_writers: bool

    def needed(self, by_readers: bool) -> list[_Part] | None:
        """The slices that have to be zero; None where that is not enough, or has no group."""
        if not (self.by_readers if by_readers else self.by_writers):
            return None
        parts = [part for part in self.parts if (part.reads if by_readers else part.writes)]
        return parts if parts and all(part.inner for part in parts) else None


def _layers(units: Units, leaves: list[Value]) -> list[_Layer]:
    """Units by the leaves in which they have slices."""
    slices: dict[int, dict[tuple[int, int], list[int]]] = collections.defaultdict(dict)
    for i, value in enumerate(leaves):
        for k, axis in enumerate(value.axes):
            if axis.labels is None:
                continue
            for place, root in enumerate(units.roots(axis.labels).tolist()):
                if root != STAYS:
                    slices[root].setdefault((i, k), []).append(place)
    by_readers, by_writers, read = dict[int, bool](), dict[int, bool](), set[int]()
    for labels, by_params, zero in units.reads:
        for root in units.roots(labels).tolist():
            read.add(root)
            by_readers[root] = by_readers.get(root, True) and by_params
            by_writers[root] = by_writers.get(root, True) and zero
    alike: dict[Any, list[int]] = collections.defaultdict(list)
    for root, own in slices.items():
        if root in read:
            counts = tuple((leaf, len(places)) for leaf, places in own.items())
            alike[counts, by_readers[root], by_writers[root]].append(root)
    found = []
    for (counts, readers, writers), roots in alike.items():
        parts = []
        for (i, k), _ in counts:
            table = np.array([slices[root][i, k] for root in roots])
            labels = leaves[i].axes[k].labels
            assert labels is not None
            here, inner = set(labels.tolist()), _inner(table, len(labels))
            parts.append(_Part(i, k, inner, bool(here & units.read), bool(here & units.written)))
        if len(roots) > 1:
            found.append(_Layer(len(roots), tuple(parts), readers, writers))
    return found


def _inner(table: np.ndarray, length: int) -> int:
    """How many slices of a unit lie beside each other; 0 if they lie otherwise, or not on all."""
    count = len(table)
    breaks = np.flatnonzero(np.diff(table[0]) != 1)
    inner = int(breaks[0]) + 1 if len(breaks) else table.shape[1]
    if table.size != length or length % (count * inner):
        return 0
    places = np.arange(length).reshape(-1, count, inner)
    expected = np.moveaxis(places, 1, 0).reshape(count, -1)
    return inner if (table == expected).all() else 0


def _claimed(layers: list[_Layer]) -> list[tuple[_Layer, list[_Part]]]:
    """For each layer whose units can go the slices of its groups; a leaf is in one layer only."""
    owner: dict[int, int] = {}
    chosen: dict[int, list[_Part]] = {}
    ways = {n: [x for x in map(layer.needed, (True, False)) if x] for n, layer in enumerate(layers)}
    # Those first that tie most leaves (heads before their entries), then those without a choice.
    for n in sorted(ways, key=lambda n: (-len(layers[n].parts), len(ways[n]))):
        for parts in ways[n]:
            if all(part.leaf not in owner for part in parts):
                chosen[n] = list({part.leaf: part for part in parts}.values())
                owner |= {part.leaf: n for part in parts}
                break
    for n, parts in chosen.items():
        for part in layers[n].parts:
            if part.inner and part.leaf not in owner:
                owner[part.leaf] = n
                parts.append(part)
    return [(layers[n], chosen[n]) for n in sorted(chosen)]
