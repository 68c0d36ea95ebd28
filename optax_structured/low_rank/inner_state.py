"""Finding the low-rank leaves inside the state of any inner transformation, by their keys."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr

from optax_structured.quantization.codec import is_encoded
from optax_structured.trees import name_of_key

KeyPath = tuple[Any, ...]
Fields = dict[str, dict[str, jax.Array]]  # by the path of the state that holds them, then by name


class NeedsParameters(ValueError):
    """The inner transformation asked for parameters."""


def fields(state: Any, key: str) -> Fields:
    """The leaves of `state` that belong to one parameter."""
    found: Fields = {}
    for path, leaf in jax.tree.leaves_with_path(state, is_leaf=is_encoded):
        if path and path[-1] == DictKey(key):
            if is_encoded(leaf):
                raise ValueError(
                    f"the moments of {name_of_key(key)!r} are in codes, which cannot be moved to "
                    "another basis: put quantized around the whole, quantized(galore(...)), or use "
                    "Keep() or Align()"
                )
            found.setdefault(keystr(path[:-2]), {})[_field(path)] = leaf
    return found


def replace(state: Any, key: str, new: Fields) -> Any:
    """`state` with what `fields` found replaced."""
    if not new:
        return state

    def leaf(path: KeyPath, old: jax.Array) -> jax.Array:
        if path and path[-1] == DictKey(key):
            return new[keystr(path[:-2])][_field(path)]
        return old

    return jax.tree.map_with_path(leaf, state)


def update(
    inner: optax.GradientTransformationExtraArgs, low: Any, state: Any, extra: Mapping[str, Any]
) -> tuple[Any, Any]:
    """The update of the inner transformation, which gets the shapes of the leaves as parameters.

    Raises:
      NeedsParameters: it needs them.
    """
    # Some, such as factored root mean squares, look at the shapes of the parameters and no further.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), low)
    try:
        return inner.update(low, state, shapes, **extra)
    except Exception as error:
        try:  # the same call with parameters tells whether they are what is missing
            jax.eval_shape(lambda: inner.update(low, state, low, **extra))
        except Exception:
            raise error from None
        raise NeedsParameters(
            "low_rank_projection: the inner transformation needs the parameters, which have no "
            "low-rank form; put weight decay, trust ratios and parameter scaling after "
            "low_rank_projection in the chain: for adamw, scale_by_adam inside and "
            "add_decayed_weights outside"
        ) from error


def check(inner: optax.GradientTransformationExtraArgs, low: Any, state: Any) -> None:
    """Raises NeedsParameters at `init` already, if that can be seen without extra arguments."""
    try:
        jax.eval_shape(lambda: update(inner, low, state, {}))
    except NeedsParameters:
        raise
    except Exception:  # the update itself will tell, when its extra arguments are there
        return


def _field(path: KeyPath) -> str:
    key = path[-2] if len(path) > 1 else None
    if isinstance(key, GetAttrKey):
        return key.name
    if isinstance(key, DictKey | SequenceKey):
        return str(key.key if isinstance(key, DictKey) else key.idx)
    return ""
