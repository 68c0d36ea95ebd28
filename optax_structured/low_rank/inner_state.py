"""Finding the low-rank leaves inside the state of any inner transformation, by their keys."""

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import DictKey, keystr

from optax_structured.states import arrays_of
from optax_structured.states.roles import CODES
from optax_structured.transforms.nonfinite import step_if
from optax_structured.trees import name_of_key


class Moment(NamedTuple):
    """What an array of the inner state is."""

    holder: str  # the class of the state that it is a field of
    field: str
    power: int | None  # of the gradient that it averages; None: unknown, or none

    def __str__(self) -> str:
        return f"{self.holder}.{self.field}" if self.holder else "an array"


Found = dict[str, dict[str, Moment]]  # by the key of the leaf, then by place
Moments = dict[str, dict[str, jax.Array]]  # the arrays themselves


class NeedsParameters(ValueError):
    """The inner transformation asked for parameters."""


def find(
    inner: optax.GradientTransformation, low: Callable[[], Any], keys: Collection[str]
) -> Found:
    """The arrays that belong to these low-rank leaves, of the state that `inner` makes of all.

    Read off a new state: in one that went through `nnx.jit`, mappings stand for its classes.
    """
    found: Found = {key: {} for key in keys}
    if not found:
        return found
    for array in arrays_of(jax.eval_shape(lambda: inner.init(low()))):
        key = _key(array.path)
        if key in found and array.role == CODES:
            raise ValueError(
                f"the moments of {name_of_key(key)!r} are in codes, which cannot be moved to "
                "another basis: put quantized around the whole, quantized(galore(...)), or use "
                "Keep() or Align()"
            )
        if key in found:
            power = None if array.role is None else array.role.power
            found[key][_place(array.path)] = Moment(array.holder, array.field, power)
    return found


def read(state: Any, found: Found) -> Moments:
    """The arrays of a state that `find` found."""
    moments: Moments = {key: {} for key in found}
    for path, leaf in jax.tree.leaves_with_path(state):
        if (key := _key(path)) in found and _place(path) in found[key]:
            moments[key][_place(path)] = leaf
    return moments


def write(state: Any, moments: Moments) -> Any:
    """`state` with these arrays."""
    if not moments:
        return state

    def leaf(path: Any, old: jax.Array) -> jax.Array:
        return moments.get(_key(path), {}).get(_place(path), old)

    return jax.tree.map_with_path(leaf, state)


def _key(path: Any) -> str:
    """The key of the leaf that an array of the inner state belongs to; "?" of none."""
    return next((x.key for x in reversed(path) if isinstance(x, DictKey)), "?")


def _place(path: Any) -> str:
    return keystr(path, simple=True, separator=".")


def update(
    inner: optax.GradientTransformationExtraArgs,
    low: Any,
    state: Any,
    usable: jax.Array | None,
    extra: Mapping[str, Any],
) -> tuple[Any, Any]:
    """The step of the inner transformation, which gets the shapes of the leaves as parameters.

    Raises:
      NeedsParameters: it needs them.
    """
    # Some, such as factored root mean squares, look at the shapes of the parameters and no further.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), low)
    try:
        return step_if(usable, inner, low, state, shapes, **extra)
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


def check(inner: optax.GradientTransformationExtraArgs, low: dict[str, Any]) -> None:
    """Raises NeedsParameters at `init` already, if one leaf shows it without extra arguments."""
    one = dict(itertools.islice(low.items(), 1))
    try:
        jax.eval_shape(lambda: update(inner, one, inner.init(one), None, {}))
    except NeedsParameters:
        raise
    except Exception:  # the update itself will tell, when its extra arguments are there
        return
