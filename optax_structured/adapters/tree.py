"""Adapters of a whole model: made by a table of rules, merged into its weights."""

import math
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.adapters.nodes import Adapter, Node
from optax_structured.meshes import placement
from optax_structured.trees import Rules, as_rules, map_named, named_leaves
from optax_structured.trees.rules import check_some_use, settle
from optax_structured.trees.tables import aligned, kinds


def init(key: jax.Array, params: Any, rules: Adapter | Rules) -> dict[str, Any]:
    r"""The adapter of a model: for each weight that the rules name, a few small arrays to train.

    .. math:: \text{params}' = \operatorname{merge}(\text{params}, \text{adapter}), \qquad
        \min_{\text{adapter}} L(\text{params}')

    Args:
      key: random key; each weight derives its own from its path.
      params: parameters of any library, frozen from here on.
      rules: one `LoRA`, `SVFit`, `SNELL`, `SNELLA`, `Codebook` or `Full` for all weights that can
        take it, or `rules` of them, with None for weights that stay as they are.

    Returns:
      A dictionary of path and node, to be given to any optax optimizer, without masks. Arrays are
      float32 independent of the weights: a small step is lost in half precision.

    Raises:
      TypeError: a value that is not an adapter, or an adapter for an integer leaf.
      ValueError: a pattern that matches nothing, a weight that cannot take what a pattern gives
        it, such as a rank above its smaller side, or no adapter at all.

    Example:
      >>> import jax, optax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"mlp": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, "head": jnp.ones((4, 2))}
      >>> table = oxs.rules(("head", oxs.adapters.Full()), default=oxs.adapters.LoRA(rank=1))
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, table)
      >>> sorted(adapter)
      ['head', 'mlp/kernel']
      >>> def loss(adapter, x):
      ...     merged = oxs.adapters.merge(params, adapter)
      ...     hidden = x @ merged["mlp"]["kernel"] + merged["mlp"]["bias"]
      ...     return jnp.mean((hidden @ merged["head"]) ** 2)
      >>> optimizer = optax.adam(1e-3)
      >>> state = optimizer.init(adapter)
      >>> gradient = jax.grad(loss)(adapter, jnp.ones((2, 4)))
      >>> updates, state = optimizer.update(gradient, state, adapter)
      >>> adapter = optax.apply_updates(adapter, updates)
    """
    table = as_rules(rules)
    for value in table.values:
        if not (value is None or isinstance(value, Adapter)):
            raise TypeError(
                f"adapters.init takes adapters such as LoRA(rank=8), rules of them, or None; got "
                f"{value!r}"
            )
    adapter: dict[str, Any] = {}
    for path, leaf, rule, spec, _ in settle(table, params):
        if spec is None:
            continue
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            if rule is None:
                continue
            raise TypeError(
                f"rules: pattern {rule!r} gives {spec!r} to {path!r}, which is "
                f"{jnp.result_type(leaf).name}: only floating-point weights are adapted; give it "
                "None"
            )
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        adapter[path] = spec.init(own, leaf)
    if not adapter:
        check_some_use(table, params, Adapter, "adapters.init: no weight can be adapted")
        raise ValueError("adapters.init: the rules adapt no weight of these parameters")
    return adapter


def merge(
    params: Any, adapter: Mapping[str, Any], constants: Mapping[str, Any] | None = None
) -> Any:
    """The adapted parameters: pure, differentiable, with the structure and dtypes of `params`.

    Computed in float32 and cast once. Costs one copy of the adapted weights; under a scan over
    layers, merge inside its body, or use `attach`.

    Args:
      params: the frozen parameters, those that `init` saw.
      adapter: from `init`, trained or not.
      constants: from `constants`, for the adapters that have any; they are computed here if left
        out, which for `SVFit` and `start="svd"` is an SVD of each weight.

    Returns:
      A tree like `params`, each leaf sharded as it is there. Leaves without adapter are the same
      arrays.

    Raises:
      ValueError: the adapter is that of another model.

    Warns:
      UserWarning: weights in half precision are rounded after the sum; small updates vanish there.

    Example: see `init`.
    """
    nodes = checked("merge", params, adapter)
    warn_of_rounding("merge", params, nodes)

    def one(path: str, leaf: Any) -> Any:
        if path not in nodes:
            return leaf
        node = nodes[path]
        return merged_leaf(leaf, node, constant_of(path, leaf, node, constants))

    return map_named(one, params)


def constants(params: Any, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapters read off the frozen weights once: singular vectors, rows of groups.

    Args:
      params: the frozen parameters.
      adapter: from `init`.

    Returns:
      A dictionary of path and arrays, for `merge` and `attach`; without the weights that need none.
      It is a function of `params`, so checkpoints need not hold it.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"kernel": jnp.diag(jnp.arange(1.0, 5.0))}
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, oxs.adapters.SVFit(rank=2))
      >>> oxs.adapters.constants(params, adapter)["kernel"].values.tolist()
      [4.0, 3.0]
    """
    leaves = dict(named_leaves(params))
    nodes = checked("constants", params, adapter)
    found = {path: node.constant(leaves[path]) for path, node in nodes.items()}
    return {path: value for path, value in found.items() if value is not None}


def sub(adapter: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The part of an adapter, or of its constants, that belongs to a subtree of the parameters.

    Args:
      adapter: any dictionary of paths.
      prefix: path of the subtree.

    Returns:
      The entries below it, by their paths there: for `merge` inside the body of a scan over layers.

    Raises:
      ValueError: nothing lies below.

    Example:
      >>> sub({"layers/mlp/kernel": 1, "head": 2}, "layers")
      {'mlp/kernel': 1}
    """
    below = prefix.rstrip("/") + "/"
    found = {path[len(below) :]: node for path, node in adapter.items() if path.startswith(below)}
    if not found:
        raise ValueError(
            f"adapters.sub: nothing lies below {prefix!r}; the paths are {', '.join(adapter)}"
        )
    return found


def describe(params: Any, adapter: Mapping[str, Any]) -> str:
    """Plain text: which weights are adapted, by what, and how many numbers and bytes are trained.

    Args:
      params: the frozen parameters, concrete or abstract.
      adapter: from `init`, concrete or abstract.

    Returns:
      A table, one row for the weights that differ in numbers only.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}
      >>> adapter = oxs.adapters.init(jax.random.key(0), params, oxs.adapters.LoRA(rank=2))
      >>> print(oxs.adapters.describe(params, adapter))
      path    shape   adapter  arrays                 trained  bytes
      kernel  (6, 4)  Pair     a (2, 6) and b (4, 2)       20     80
      20 numbers trained in 80 bytes, beside 28 frozen
    """
    leaves = dict(named_leaves(params))
    nodes = checked("describe", params, adapter)
    rows = [_Row(path, leaves[path].shape, node) for path, node in nodes.items()]
    cells = [("path", "shape", "adapter", "arrays", "trained", "bytes")]
    for name, alike in kinds(rows, lambda row: row.cells):
        numbers, size = sum(r.numbers for r in alike), sum(r.bytes for r in alike)
        cells.append((name, *alike[0].cells, f"{numbers:,}", f"{size:,}"))
    frozen = sum(math.prod(np.shape(leaf)) for leaf in leaves.values())
    numbers, size = sum(r.numbers for r in rows), sum(r.bytes for r in rows)
    total = f"{numbers:,} numbers trained in {size:,} bytes, beside {frozen:,} frozen"
    return f"{aligned(cells, numbers=(4, 5))}\n{total}"


class _Row:
    """One adapted weight, for a table."""

    def __init__(self, path: str, shape: tuple[int, ...], node: Any) -> None:
        arrays = named_leaves(node)
        self.path = path
        shown = " and ".join(f"{name} {x.shape}" for name, x in arrays)
        self.cells = (str(shape), type(node).__name__, shown)
        self.numbers = sum(math.prod(x.shape) for _, x in arrays)
        self.bytes = sum(math.prod(x.shape) * x.dtype.itemsize for _, x in arrays)


def constant_of(path: str, leaf: Any, node: Node, given: Mapping[str, Any] | None) -> Any:
    """The constant of one weight: the one that is given, or read off the weight."""
    return given[path] if given is not None and path in given else node.constant(leaf)


def merged_leaf(leaf: Any, node: Node, constant: Any) -> jax.Array:
    """One adapted weight, in the dtype and the sharding of the frozen one."""
    merged = node.merged(leaf, constant).astype(leaf.dtype)
    place = placement.home(leaf)
    return merged if place is None else placement.put(merged, *place)


def checked(element: str, params: Any, adapter: Mapping[str, Any]) -> dict[str, Node]:
    """The nodes of an adapter that belongs to these parameters."""
    leaves = dict(named_leaves(params))
    for path, node in adapter.items():
        if path not in leaves:
            raise ValueError(
                f"adapters.{element}: the adapter is that of another model: {path!r} is not a path "
                f"of these parameters, which begin with {', '.join(map(repr, [*leaves][:3]))}"
            )
        if not node.fits(leaves[path]):
            raise ValueError(
                f"adapters.{element}: the adapter is that of another model: {path!r} has shape "
                f"{leaves[path].shape}, and its {type(node).__name__} was made for {node.made_for}"
            )
        if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
            raise ValueError(
                f"adapters.{element}: the adapter is that of another model: {path!r} is "
                f"{leaves[path].dtype.name}, and only floating-point weights are adapted"
            )
    return dict(adapter)


def warn_of_rounding(element: str, params: Any, nodes: Mapping[str, Node]) -> None:
    leaves = dict(named_leaves(params))
    narrow = [path for path in nodes if leaves[path].dtype.itemsize < 4]
    if narrow:
        warnings.warn(
            f"adapters.{element} rounds the sum to {leaves[narrow[0]].dtype.name} in {narrow[0]!r} "
            f"and {len(narrow) - 1} more weights, where small updates vanish: give it the "
            "parameters in float32, or use adapters.factored",
            stacklevel=3,
        )
