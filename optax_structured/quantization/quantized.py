"""Any optax transformation, with its state in 8 or 4 bits per entry."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.quantization.affine import Affine
from optax_structured.quantization.dynamic import Dynamic
from optax_structured.quantization.leaf_by_leaf import leaf_by_leaf
from optax_structured.quantization.selection import Fields, as_roles, selected
from optax_structured.quantization.stored_state import StoredState
from optax_structured.states import owners
from optax_structured.states.roles import Role
from optax_structured.transforms.nonfinite import Skipping, skip_nonfinite, step_if, unguarded
from optax_structured.trees import Rules, as_rules, named_leaves, resolve
from optax_structured.trees.precision import wide_dtype
from optax_structured.trees.tree_checks import check_same_tree


class QuantizedState(NamedTuple):
    """State of `quantized`."""

    inner: Any  # of the inner transformation, its large moments as tuples of codes and scales


def quantized(
    inner: optax.GradientTransformation,
    codec: Dynamic | Rules = Dynamic(),  # noqa: B008  (frozen)
    *,
    min_size: float = 4096,
    fields: Fields | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stores the moments of any optimizer in 8 or 4 bits per entry.

    With :math:`E, D` the codec, each update is one of the inner transformation on a decoded state,

    .. math:: u, s' = \text{inner}(g, D(e)), \qquad e \leftarrow E(s')

    so that a step uses the moments before they are rounded. Leaves are decoded, updated and encoded
    one after the other; the whole state is never in memory in float32, for any `inner`.

    What is encoded follows from what an array is, which the states of this library say beside their
    fields, and a table says for those of optax and optax.contrib: averages of gradients (first
    moments) with a sign, averages and sums of their squares without. Sums of gradients, copies of
    parameters, bases, error buffers and accumulated gradients keep their precision; an optimizer
    that holds nothing else is refused with the reasons.

    Args:
      inner: any transformation or whole optimizer: `optax.adamw(1e-3)`, `optax.lion(1e-4)`,
        `oxs.galore(0.01, low_rank)`, chains of them.
      codec: a `Dynamic`, or `rules` of them over the paths of the parameters; None keeps a leaf in
        float32, as some do for embeddings. `Dynamic()` is 8 bits in blocks of 256,
        `Dynamic(4, block=128)` half of that.
      min_size: moments with fewer entries stay in float32; 4096. `math.inf` encodes nothing.
      fields: what arrays of other states are, by class and field: `{"MyState": {"mean":
        "first_moment"}}`, or "second_moment" (never negative), "curvature", or "wide" to keep an
        array as it is.

    Returns:
      An optimizer or element like `inner`, extra arguments included. Its state is a
      `SkipNonfiniteState` around `QuantizedState`, with the arrays of a codec instead of moments.
      Updates are float32 or wider.

    Raises:
      TypeError, ValueError: another codec than `Dynamic`, a state of which nothing is known or
        nothing can be encoded, complex moments, blocks that would lie on several devices of a mesh,
        or, in `update`, a state made with other settings.

    Equals `skip_nonfinite(inner)`, bit for bit, with `min_size=math.inf`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.quantized(optax.adam(1e-3))
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
      >>> oxs.state_bytes(optimizer, params)  # 2 per entry, 8 per block, 8 per entry of bias, 12
      8844

    Reference: Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, ICLR 2022. Their kernels round small second moments to 0:
    the next step of a rare coordinate is then up to :math:`(1-b_2)^{-1/2}` times too long, and
    without a gradient its first moment is divided by eps alone. Here a positive one never becomes
    0. `Dynamic(published=True)` has their rounding.
    """
    table = as_rules(codec)
    for value in table.values:
        _check(value)
    if not min_size >= 0:
        raise ValueError(f"min_size must be a number of entries, at least 0, got {min_size!r}")
    inner = unguarded(inner)  # the whole is guarded
    as_roles(fields or {})  # names of roles are checked before there is a state
    shared = table.default if table.has_default else None  # for what belongs to no one parameter

    def plan(params: Any) -> StoredState:
        state = jax.eval_shape(inner.init, params)
        paths = [name for name, _ in named_leaves(params)]
        owned = owners(inner, state, params)
        codecs = resolve(table, params)
        wanted = [shared if i is None else codecs[i] for i in owned]
        leaves = jax.tree.leaves(state)
        large = [c is not None and x.size >= min_size for c, x in zip(wanted, leaves, strict=True)]
        roles = selected(state, fields or {}, large)
        return StoredState(paths, owned, state, [*map(_codec, wanted, roles)])

    def init(params: Any) -> QuantizedState:
        todo = plan(params)
        leaves: Any
        structure: Any
        leaves, structure = jax.tree.flatten(inner.init(params))
        # Moments start as zeros: the compiler would encode them itself, for minutes.
        leaves = jax.lax.optimization_barrier(leaves)
        stored = [todo.array(i).encode(x) for i, x in enumerate(leaves)]
        return QuantizedState(structure.unflatten(stored))

    def update(
        updates: Any,
        state: QuantizedState,
        params: Any = None,
        *,
        usable: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, QuantizedState]:
        if params is not None:
            check_same_tree("quantized", updates, params, whose="the parameters")
        todo = plan(updates if params is None else params)
        stored, states = todo.stored(state.inner)
        if not any(todo.codecs):
            updates, new = step_if(usable, inner, updates, state.inner, params, **extra)
            return updates, QuantizedState(new)
        structure: Any
        gradients, structure = jax.tree.flatten(updates)
        # Moments are computed in float32, and steps are as wide as parameters at least.
        like = gradients if params is None else jax.tree.leaves(params)
        dtypes = [wide_dtype(*pair) for pair in zip(gradients, like, strict=True)]

        def step(gradients: Any, leaves: Any) -> tuple[Any, Any]:
            tree = states.unflatten(leaves)
            wide = map(jnp.asarray, gradients, dtypes)
            return inner.update(structure.unflatten(wide), tree, params, **extra)

        updates, new = leaf_by_leaf(step, gradients, stored, todo, usable)
        return updates, QuantizedState(new)

    return skip_nonfinite(Skipping(init, update))


def _codec(codec: Dynamic | None, role: Role | None) -> Dynamic | None:
    """The codec of one array: with a sign or without."""
    if codec is None or role is None:
        return None
    settling = role.signed and not codec.published
    return dataclasses.replace(codec, signed=role.signed, settling=settling)


def _check(codec: Any) -> None:
    if isinstance(codec, Affine):
        raise ValueError(
            f"quantized: {codec!r} has equal steps, in which small second moments become 0 and "
            "training explodes; use Dynamic(bits=8) or Dynamic(bits=4)"
        )
    if codec is not None and not isinstance(codec, Dynamic):
        raise TypeError(
            "quantized takes Dynamic(bits=8), Dynamic(bits=4, block=128), rules of them, or None "
            f"for a leaf that stays as it is, got {codec!r}"
        )
