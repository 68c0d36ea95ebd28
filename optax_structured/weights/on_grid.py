"""Parameters in floating point that an optimizer keeps on the grid of a codec."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.meshes.placement import like
from optax_structured.quantization.affine import Affine
from optax_structured.quantization.checks import of_leaf
from optax_structured.states.clock import Clock, new_clock, tick
from optax_structured.trees import Rules, map_named, named_leaves, resolve
from optax_structured.trees.checks import check_params
from optax_structured.trees.precision import wide_dtype
from optax_structured.trees.tree_checks import check_real
from optax_structured.weights.quantized import Grid, key_of, weight_codecs


class KeepOnGridState(NamedTuple):
    """State of `keep_on_grid`."""

    clock: Clock  # steps since init: with the seed and a path, the key of the draws


def keep_on_grid(
    codec: Affine | Rules = Affine(),  # noqa: B008  (frozen)
    *,
    stochastic: bool = True,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Changes updates so that the updated parameters are on the grid of a codec.

    .. math:: U_t \leftarrow D(E_{\text{random}}(W_{t-1} + U_t)) - W_{t-1}

    The training of weights in one byte per entry, on any model and in any loop, without their
    memory, for which see `quantize_weights`. A step much smaller than that of the grid moves a
    weight occasionally, and by the right amount on average.

    Args:
      codec: an `Affine`, or `rules` of them and None. Leaves of fewer than two axes stay as they
        are. So should stacked norm scales and what is not centred at zero in its group: give them
        None.
      stochastic: round at random; else to the nearest, where steps below half a level are lost.
      seed: of the draws, an int; 0. The key of a leaf is made of it, of the step and
        of the path: the same on all replicas, and after a restore.

    Returns:
      An element that needs `params` and comes last in a chain. Its state is `KeepOnGridState`. An
      entry of an update that is not finite counts as zero. Parameters are on the grid to rounding,
      some 1e-5 of a level, from the first step on.

    Raises:
      TypeError, ValueError: not an `Affine`, a rule for a leaf of fewer than two axes, parameters
        narrower than float32, which the levels would not survive, missing `params`, or groups that
        would lie on several devices of a mesh.

    Equals `apply_updates` on weights from `quantize_weights`, to rounding, and `optax.identity` for
    leaves with None.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> on_grid = oxs.weights.keep_on_grid(oxs.Affine(bits=4, group=16))
      >>> optimizer = optax.chain(optax.sgd(0.1), on_grid)
      >>> params = {"kernel": jnp.linspace(-0.875, 1, 16).reshape(4, 4)}
      >>> zero = {"kernel": jnp.zeros((4, 4))}
      >>> updates, state = optimizer.update(zero, optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"][0])
      [-0.875 -0.75  -0.625 -0.5  ]

    Reference: Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024: its simulation
    mode.
    """
    table = weight_codecs(codec)

    def grids(tree: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(tree), resolve(table, tree))

    def init(params: Any) -> KeepOnGridState:
        check_real("keep_on_grid", params)
        for (path, leaf), grid in zip(named_leaves(params), resolve(table, params), strict=True):
            if grid is not None:
                _check(path, leaf, grid)
        return KeepOnGridState(new_clock())

    def update(
        updates: Any, state: KeepOnGridState, params: Any = None, **_: Any
    ) -> tuple[Any, KeepOnGridState]:
        check_params("keep_on_grid", params)
        # optax.inject_hyperparams hands the seed over as a float.
        root = jax.random.key(seed if isinstance(seed, int) else jnp.asarray(seed, jnp.uint32))
        step = jax.random.fold_in(root, state.clock.count)

        def round(path: str, update: jax.Array, weight: jax.Array, grid: Grid | None) -> jax.Array:
            if grid is None:
                return update
            with of_leaf("keep_on_grid: the weight", path):
                code = grid.moved(weight, update, key_of(path, step) if stochastic else None)
                # As wide as the weight, not the gradient: rounded, it would leave the grid.
                return like(grid.codec.decode(code, weight.shape) - weight, update)

        return map_named(round, updates, params, grids(updates)), KeepOnGridState(tick(state.clock))

    return optax.GradientTransformationExtraArgs(init, update)


def _check(path: str, leaf: Any, grid: Grid) -> None:
    dtype = jnp.result_type(leaf)
    if wide_dtype(dtype) != dtype:
        raise ValueError(
            f"keep_on_grid: {path!r} is {dtype.name}, which cannot hold the levels of {grid!r}; "
            "keep parameters in float32, or hold the codes themselves with quantize_weights"
        )
