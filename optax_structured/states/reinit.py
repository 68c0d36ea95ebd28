"""Starting a part of an optimizer state again, whatever transformation made it."""

from typing import Any

import jax

from optax_structured.states.ownership import owners
from optax_structured.trees import rules


def reinit(tx: Any, state: Any, params: Any, where: str) -> Any:
    """The state with everything that belongs to some of the parameters as `tx.init` makes it.

    For leaves that were grown, pruned, merged or replaced: their moments, accumulators and bases
    start again (a low-rank leaf is fitted at the next step); all others, and the counters that all
    leaves share, stay as they are.

    Args:
      tx: the transformation that `state` belongs to.
      state: its present state.
      params: the present parameters, with the shapes that `state` was made for.
      where: regular expression, searched in the "/"-joined path of each leaf.

    Returns:
      A state of the same structure and types.

    Raises:
      ValueError: no path matches, or the state was made for parameters of other shapes.

    >>> import jax.numpy as jnp, optax
    >>> params = {"head": jnp.ones(2), "body": jnp.ones(2)}
    >>> tx = optax.trace(0.9)
    >>> _, state = tx.update(params, tx.init(params))
    >>> reinit(tx, state, params, "head").trace
    {'body': Array([1., 1.], dtype=float32), 'head': Array([0., 0.], dtype=float32)}
    """
    table = rules((where, True), default=False).assign(params)
    fresh = tx.init(params)
    structure: Any = jax.tree.structure(state)
    if structure != jax.tree.structure(fresh):
        raise ValueError(
            "reinit: tx.init(params) and the state differ in structure; give the transformation "
            "and the parameters that the state was made for"
        )
    leaves = []
    old_and_new = zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True)
    for (old, new), owner in zip(old_and_new, owners(tx, fresh, params), strict=True):
        if new.shape != old.shape:
            of = "what all parameters share" if owner is None else repr(table[owner].path)
            raise ValueError(
                f"reinit: the state of {of} has an array of shape {old.shape} where "
                f"tx.init(params) makes {new.shape}"
            )
        leaves.append(new if owner is not None and table[owner].value else old)
    return structure.unflatten(leaves)
