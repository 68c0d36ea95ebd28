"""What people would otherwise take, as recipes of the tasks: `compare` sets ours beside them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structured.recipes.registry import RECIPES, ImageRun, Recipe, TextRun
from optax_structured.regularizers import GroupLasso
from optax_structured.regularizers.layer_axes import DENSE_INPUTS
from optax_structured.step_sizes import Stages
from optax_structured.training.names import PLAIN
from optax_structured.trees import Rules, resolve, rules
from optax_structured.trees.checks import check_fraction

_RMS_OF_ADAM = 0.2  # of an update, so that Muon takes the rate of Adam


def adafactor(learning_rate: Any, *, weight_decay: Any = 0.0) -> optax.GradientTransformation:
    """Factors sides from 32 on: those of small models are below optax's 128."""
    decay = weight_decay or None
    return optax.adafactor(learning_rate, min_dim_size_to_factor=32, weight_decay_rate=decay)


def muon(learning_rate: Any, *, weight_decay: Any = 0.0) -> optax.GradientTransformation:
    """On all matrices of attention and MLP; AdamW, at the same rate, for the rest."""

    def dimensions(params: Any) -> Any:
        matrix = optax.contrib.MuonDimensionNumbers()
        return rules((PLAIN, None), default=matrix).tree(params)

    return optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=_RMS_OF_ADAM,
    )


def optax_galore(
    learning_rate: Any, low_rank: Rules, *, scale: Any = 0.25, weight_decay: Any = 0.0
) -> optax.GradientTransformation:
    """On all matrices of attention and MLP, at the rank and period of `low_rank`; AdamW elsewhere.

    Partitioned, since its state of leaves that it does not project has no entries, which orbax
    refuses to save.
    """
    rank, period = low_rank.default.rank, low_rank.default.period
    galore = optax.contrib.galore(learning_rate, rank, period, scale, weight_decay=weight_decay)
    plain = optax.adamw(learning_rate, weight_decay=weight_decay)
    labels = rules((PLAIN, "plain"), default="galore").tree
    return optax.partition({"galore": galore, "plain": plain}, labels)


class PrunedState(NamedTuple):
    """State of `adamw_pruned`."""

    step: jax.Array  # () int32: taken
    adam: Any
    alive: list[Any]  # by leaf: None, or bool that broadcasts against it, False for good


def adamw_pruned(
    learning_rate: Any,
    groups: Rules | None,
    strength: float,
    *,
    stages: Stages,
    b1: float,
    eps: float,
) -> optax.GradientTransformation:
    """AdamW with gradual magnitude pruning of groups.

    At the end of each stage the groups of smallest norm of each leaf become zero for good, a share
    of `strength` of them at the last one and, before it, one that rises along a cubic.
    """
    if groups is None or groups.default != GroupLasso(DENSE_INPUTS):
        raise ValueError(f"adamw_pruned prunes inputs of layers, not {groups and groups.default!r}")
    check_fraction("strength", strength)
    adam = optax.adamw(learning_rate, b1, eps=eps, weight_decay=0.0)
    ends = jnp.array(stages.milestones, jnp.int32)

    def init(params: Any) -> PrunedState:
        alive = [
            None if spec is None else jnp.ones_like(_norms(w), bool)
            for w, spec in zip(jax.tree.leaves(params), resolve(groups, params), strict=True)
        ]
        return PrunedState(jnp.zeros((), jnp.int32), adam.init(params), alive)

    def update(updates: Any, state: PrunedState, params: Any = None) -> tuple[Any, PrunedState]:
        updates, inner = adam.update(updates, state.adam, params)
        step = state.step + 1
        done = jnp.sum(step >= ends) / max(1, len(ends))
        share = strength * (1 - (1 - done) ** 3)
        due = jnp.any(step == ends)

        def cut(update: jax.Array, w: jax.Array, alive: Any) -> tuple[jax.Array, Any]:
            if alive is None:
                return update, None
            rank = jnp.argsort(jnp.argsort(_norms(w + update).ravel())).reshape(alive.shape)
            alive &= ~due | (rank >= jnp.floor(share * alive.size))
            return jnp.where(alive, update, -w), alive

        flat, tree = jax.tree.flatten(updates)
        made = [cut(*leaf) for leaf in zip(flat, jax.tree.leaves(params), state.alive, strict=True)]
        updates = jax.tree.unflatten(tree, [update for update, _ in made])
        return updates, PrunedState(step, inner, [alive for _, alive in made])

    return optax.GradientTransformation(init, update)


def _norms(w: jax.Array) -> jax.Array:
    """Of what a layer reads from each input, axes kept."""
    others = tuple(axis for axis in range(w.ndim) if axis != w.ndim - 2)
    return jnp.sqrt(jnp.sum(jnp.square(w), axis=others, keepdims=True))


PEERS: Mapping[str, Recipe] = MappingProxyType(
    {
        "adafactor": Recipe(
            adafactor,
            "plain",
            "second moments as a row and a column, no first moment",
            "https://arxiv.org/abs/1804.04235",
            text=TextRun(2e-2, period=None),
        ),
        "lion": Recipe(
            optax.lion,
            "plain",
            "signs of one moment",
            "https://arxiv.org/abs/2302.06675",
            text=TextRun(1e-3, period=None),
        ),
        "muon": Recipe(
            muon,
            "plain",
            "orthogonalized momentum",
            "https://kellerjordan.github.io/posts/muon/",
            text=TextRun(3e-3, period=None),
        ),
        "optax_galore": Recipe(
            optax_galore,
            "low_rank",
            "optax.contrib.galore",
            "https://arxiv.org/abs/2403.03507",
            text=TextRun(1e-2, scale=0.25),
        ),
        "adamw_pruned": Recipe(
            adamw_pruned,
            "proximal",
            "gradual magnitude pruning",
            "https://arxiv.org/abs/1710.01878",
            images=ImageRun(1e-3, 0.5, 0.9, 1e-8),
        ),
    }
)
# All that a task knows by name.
KNOWN: Mapping[str, Recipe] = MappingProxyType({**RECIPES, **PEERS})
