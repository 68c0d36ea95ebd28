"""Whether a state was made for these leaves and these settings: one sentence where it was not."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, keystr

from optax_structured.low_rank import inner_state
from optax_structured.low_rank.leaves import Leaves, Projected
from optax_structured.projectors.frames import Frame
from optax_structured.states import changed_setting
from optax_structured.trees import name_of_key
from optax_structured.trees.tree_checks import another_tree
from optax_structured.xla.alike import is_hashable

Arrays = dict[str, tuple[tuple[int, ...], bool]]  # by place: the shape, and whether it is real


def check_leaves(
    element: str, leaves: Leaves, begun: Callable[..., Mapping[str, Any]], held: Any, state: Any
) -> None:
    """Raises ValueError for a state of other leaves, or of another rank, codec or projector.

    `begun` is what `init` makes of `(leaf, p)`, by field of the state; the fields `held` hold
    dictionaries by key.
    """
    alike: dict[Any, dict[str, Arrays]] = {}  # once for leaves that are alike
    parts = {name: x if isinstance(x := getattr(state, name), Mapping) else {} for name in held}
    for key, (leaf, p) in leaves.items():
        aval = jax.typeof(leaf)
        likeness: Any = (aval.shape, aval.dtype, p and (p.spec, p.frame))
        likeness = likeness if is_hashable(likeness) else key
        if likeness not in alike:
            fresh = jax.eval_shape(functools.partial(begun, p=p), leaf)
            alike[likeness] = {field: _arrays(fresh.get(field, ())) for field in held}
        for field, new in alike[likeness].items():
            old = _arrays(parts[field].get(key, ()))
            if not old and new and key not in _by_key(state):
                raise another_tree(element, [f"{name_of_key(key)!r} is new"])
            if old != new:
                raise changed_setting(element, name_of_key(key), *_difference(field, old, new, p))
    for part in parts.values():
        for key in part.keys() - leaves.keys():
            raise another_tree(element, [f"{name_of_key(key)!r} is missing"])


def update_inner(
    element: str,
    inner: optax.GradientTransformationExtraArgs,
    leaves: Leaves,
    low: Any,
    state: Any,
    usable: jax.Array | None,
    extra: Mapping[str, Any],
) -> tuple[Any, Any]:
    """The update of the inner transformation, whose state has to be one of these low-rank leaves.

    Checked only where something went wrong: tracing `inner.init` takes time.
    """
    try:
        directions, new = inner_state.update(inner, low, state, usable, extra)
    except Exception:
        _check_inner(element, leaves, jax.eval_shape(inner.init, low), state)
        raise
    if _arrays(new) != _arrays(state):
        _check_inner(element, leaves, jax.eval_shape(inner.init, low), state)
    return directions, new


def _check_inner(element: str, leaves: Leaves, fresh: Any, state: Any) -> None:
    made, found = _by_key(fresh), _by_key(state)
    for key, (_, p) in leaves.items():
        old, new = found.get(key, {}), made.get(key, {})
        if new and not old:
            raise another_tree(element, [f"{name_of_key(key)!r} is new"])
        if old != new:
            raise changed_setting(element, name_of_key(key), *_difference("inner", old, new, p))
    for key in found.keys() - made.keys():
        raise another_tree(element, [f"{name_of_key(key)!r} is missing"])


def _arrays(tree: Any) -> Arrays:
    """The arrays of a part of a state; the same where Flax made mappings of its tuples."""
    return {
        keystr(path, simple=True, separator="."): (jnp.shape(x), _is_real(x))
        for path, x in jax.tree.leaves_with_path(tree)
    }


def _by_key(state: Any) -> dict[str, Arrays]:
    """The arrays of each leaf in the state of an inner transformation."""
    found: dict[str, Arrays] = {}
    for path, x in jax.tree.leaves_with_path(state):
        for i, entry in enumerate(path):
            if isinstance(entry, DictKey) and isinstance(entry.key, str):
                place = keystr((*path[:i], *path[i + 1 :]), simple=True, separator=".")
                found.setdefault(entry.key, {})[place] = jnp.shape(x), _is_real(x)
    return found


def _is_real(x: Any) -> bool:
    return bool(jnp.issubdtype(jax.typeof(x).dtype, jnp.floating))


def _difference(field: str, old: Arrays, new: Arrays, p: Projected | None) -> tuple[str, str]:
    """What the state was made for, and what the optimizer has."""
    if p is not None and "codes" not in new:
        for place in sorted(old.keys() & new.keys()):
            if ranks := _ranks(old[place][0], new[place][0], p.frame):
                return ranks
    before, now = (_described(field, arrays, p) for arrays in (old, new))
    only = [(m, n) for m, n in itertools.zip_longest(before, now, fillvalue="") if m != n]
    was, has = (", ".join(filter(None, side)) for side in zip(*only, strict=True))
    return was or f"no {field}", has or f"no {field}"


def _ranks(before: tuple[int, ...], now: tuple[int, ...], frame: Frame) -> tuple[str, str] | None:
    """Two ranks, where all that differs between two arrays is an axis of the length of the rank."""
    if isinstance(rank := frame.rank, tuple):
        batch = len(frame.batch)
        same = len(before) == len(now) and now[batch:] == rank != before[batch:]
        return (f"rank {before[batch:]}", f"rank {rank}") if same else None
    if len(before) != len(now):
        return None
    differing = [pair for pair in zip(before, now, strict=True) if pair[0] != pair[1]]
    if [n for _, n in differing] != [rank]:
        return None
    return f"rank {differing[0][0]}", f"rank {rank}"


def _described(field: str, arrays: Arrays, p: Projected | None) -> list[str]:
    """What can be told from arrays of their settings, one phrase each."""
    if p is None or field != "bases" or "codes" not in arrays:
        named = {f"{field}.{place}" if place else field: x for place, (x, _) in arrays.items()}
        return [f"{name} of shape {shape}" for name, shape in sorted(named.items())]
    codes, scales = arrays["codes"][0], arrays["scale"][0]
    bits = 4 if codes[:-1] == scales else 8  # two codes per byte, and blocks are an axis
    entries = math.prod(codes) * 8 // bits
    group = codes[-1] * 2 if bits == 4 else -(-entries // math.prod(scales))
    rank = entries // (p.frame.count * p.frame.size)  # but for what fills the last group
    return [f"rank {rank}", f"bases of {bits} bits in groups of {group}"]
