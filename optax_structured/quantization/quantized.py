"""Any optax transformation, with its state in one byte or half a byte an entry."""

import dataclasses
from typing import Any, NamedTuple

import jax
import optax

from optax_structured.quantization.affine import Affine
from optax_structured.quantization.dynamic import Dynamic
from optax_structured.quantization.fields import FIELDS, Fields, kinds
from optax_structured.quantization.leaf_by_leaf import Plan, leaf_by_leaf
from optax_structured.states import owners
from optax_structured.trees import Rules, as_rules, named_leaves, resolve
from optax_structured.trees.precision import finite


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
    r"""Stores the moments of any optimizer in one byte, or half a byte, an entry.

    With :math:`E, D` the codec, each update is one of the inner transformation on a decoded state,

    .. math:: u, s' = \text{inner}(g, D(e)), \qquad e \leftarrow E(s')

    so that a step uses the moments before they are rounded. Leaves are decoded, updated and encoded
    one after the other; the whole state is never in memory in float32, whatever `inner` is.

    What is encoded, and with a sign or without, is said by a table of the states of optax and of
    this library, by class and field: first moments with a sign, second moments without. Counters,
    bases, error buffers and accumulated gradients stay as they are. An entry of a gradient that is
    not finite counts as zero.

    Args:
      inner: any transformation or whole optimizer: `optax.adamw(1e-3)`, `optax.lion(1e-4)`,
        `oxs.galore(0.01, low_rank)`, chains of them.
      codec: a `Dynamic`, or `rules` of them over the paths of the parameters; None keeps a leaf in
        float32, as some do for embeddings. `Dynamic()` is 8 bits in blocks of 256,
        `Dynamic(4, block=128)` half of that.
      min_size: moments with fewer entries stay in float32; 4096. `math.inf` encodes nothing.
      fields: adds to the table: `{"NameOfState": {"field": "signed"}}`, with "signed", "unsigned",
        or "plain" for what stays.

    Returns:
      An optimizer or element like `inner`, extra arguments included. Its state is `QuantizedState`,
      with the arrays of a codec in place of moments.

    Raises:
      TypeError, ValueError: another codec than `Dynamic`, a state with large arrays
        that the table does not know, or blocks that would lie on several devices of a mesh.

    Equals `inner`, bit for bit, with `min_size=math.inf`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> optimizer = oxs.quantized(optax.adam(1e-3))
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
      >>> oxs.state_bytes(optimizer, params)  # two bytes an entry, 8 a block, 8 an entry of bias
      8836

    Reference: Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, ICLR 2022. Their kernels round small second moments to 0:
    the next step of a rare coordinate is then up to :math:`(1-b_2)^{-1/2}` times too long, and
    without a gradient its first moment is divided by eps alone. Here a positive one never becomes
    0. `Dynamic(published=True)` has their rounding.
    """
    table = as_rules(codec)
    defaults = (table.default,) if table.has_default else ()
    for value in (*(value for _, value in table.pairs), *defaults):
        _check(value)
    if not min_size >= 0:
        raise ValueError(f"min_size must be a number of entries, at least 0, got {min_size!r}")
    inner = optax.with_extra_args_support(inner)
    known = {**FIELDS, **(fields or {})}

    def plan(params: Any) -> Plan:
        state = jax.eval_shape(inner.init, params)
        paths = [name for name, _ in named_leaves(params)]
        codecs = resolve(table, params)
        owned = owners(inner, state, params)
        leaves = jax.tree.leaves(state)
        roles = kinds(state, known, min_size)
        chosen = [
            None if i is None or leaf.size < min_size else _codec(codecs[i], kind)
            for i, kind, leaf in zip(owned, roles, leaves, strict=True)
        ]
        return Plan(paths, owned, leaves, chosen)

    def init(params: Any) -> QuantizedState:
        todo = plan(params)
        leaves: Any
        structure: Any
        leaves, structure = jax.tree.flatten(inner.init(params))
        # Moments start as zeros: the compiler would encode them itself, for minutes.
        leaves = jax.lax.optimization_barrier(leaves)
        return QuantizedState(structure.unflatten(todo.encode(range(len(leaves)), leaves)))

    def update(
        updates: Any, state: QuantizedState, params: Any = None, **extra: Any
    ) -> tuple[Any, QuantizedState]:
        todo = plan(updates if params is None else params)
        if not any(todo.codecs):
            updates, new = inner.update(updates, state.inner, params, **extra)
            return updates, QuantizedState(new)
        structure: Any
        states: Any
        gradients, structure = jax.tree.flatten(updates)
        stored, states = todo.stored(state.inner)

        def step(gradients: Any, leaves: Any) -> tuple[Any, Any]:
            tree = states.unflatten(leaves)
            gradient = structure.unflatten(map(finite, gradients))
            return inner.update(gradient, tree, params, **extra)

        updates, new = leaf_by_leaf(step, gradients, stored, todo)
        return updates, QuantizedState(new)

    return optax.GradientTransformationExtraArgs(init, update)


def _codec(codec: Dynamic | None, kind: str) -> Dynamic | None:
    """The codec of one array: with a sign or without."""
    if codec is None or kind == "plain":
        return None
    signed = kind == "signed"
    return dataclasses.replace(codec, signed=signed, settling=signed and not codec.published)


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
