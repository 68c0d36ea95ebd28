"""Starting a part of the state of any optimizer again."""

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
      tx: the transformation that `state` belongs to; for the leaves that start again its rank,
        codec and the like may be others than before.
      state: its present state.
      params: the present parameters; for the leaves that start again shapes may be new.
      where: regular expression, searched in the "/"-joined path of each leaf.

    Returns:
      A state as of `tx.init(params)`.

    Raises:
      ValueError: no path matches, or the state of the others was made for other shapes.

    >>> import jax.numpy as jnp, optax
    >>> params = {"head": jnp.ones(2), "body": jnp.ones(2)}
    >>> tx = optax.trace(0.9)
    >>> _, state = tx.update(params, tx.init(params))
    >>> reinit(tx, state, params, "head").trace
    {'body': Array([1., 1.], dtype=float32), 'head': Array([0., 0.], dtype=float32)}
    """
    table = rules((where, True), default=False).assign(params)
    fresh = tx.init(params)

    def staying(state: Any) -> dict[Any, tuple[Any, str]]:
        """The arrays that belong to other parameters, or to all, by their place."""
        arrays = zip(jax.tree.leaves_with_path(state), owners(tx, state, params), strict=True)
        return {
            path: (x, "what all parameters share" if owner is None else repr(table[owner].path))
            for (path, x), owner in arrays
            if owner is None or not table[owner].value
        }

    old, new = staying(state), staying(fresh)
    if old.keys() != new.keys():
        raise ValueError(
            "reinit: tx.init(params) and the state differ in structure; give the transformation "
            "and the parameters that the state was made for"
        )
    for path, (x, of) in new.items():
        if x.shape != old[path][0].shape:
            raise ValueError(
                f"reinit: the state of {of} has an array of shape {old[path][0].shape} where "
                f"tx.init(params) makes {x.shape}"
            )
    return jax.tree.map_with_path(lambda path, x: old[path][0] if path in old else x, fresh)
