"""What ours are compared with."""

import jax
import jax.numpy as jnp
import pytest
from training_small import lm

from optax_structured import LowRank, diagnostics
from optax_structured.regularizers import L1, GroupLasso
from optax_structured.regularizers.layer_axes import DENSE_INPUTS
from optax_structured.step_sizes import Stages
from optax_structured.training import peers
from optax_structured.training.names import PLAIN
from optax_structured.trees import rules

GROUPS = rules(("bias", None), default=GroupLasso(DENSE_INPUTS))
PARAMS = {"bias": jnp.ones(3), "kernel": jnp.arange(1.0, 31.0).reshape(10, 3)}


def pruned(share, groups=GROUPS):
    return peers.adamw_pruned(1e-3, groups, share, stages=Stages((2, 4)), b1=0.9, eps=1e-8)


def test_pruning_takes_the_smallest_groups_at_the_ends_of_stages_for_good():
    optimizer, params, shares = pruned(0.8), PARAMS, []
    state = optimizer.init(params)
    for _ in range(6):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        shares.append(float(diagnostics.structured_sparsity(params, GROUPS)))
    # 0.8 * (1 - (1 - 1/2)**3) of ten groups, rounded down, then all of the share.
    assert [round(share, 3) for share in shares] == [0, 0.7, 0.7, 0.8, 0.8, 0.8]
    assert not params["kernel"][:8].any() and params["kernel"][8:].all() and params["bias"].all()


def test_pruning_refuses_what_it_does_not_prune():
    with pytest.raises(ValueError, match="prunes inputs of layers, not L1"):
        pruned(0.5, rules(default=L1()))
    with pytest.raises(ValueError, match="strength"):
        pruned(1.0)


def test_muon_leaves_embedding_head_and_norms_to_adam():
    params = {"embed": jnp.ones((4, 8)), "block": {"kernel": jnp.ones((8, 8))}, "norm": jnp.ones(8)}
    state = peers.muon(1e-3).init(params)
    sizes = {x.size for x in jax.tree.leaves(state.inner_states["muon"]) if x.ndim == 2}
    assert sizes == {64}


def test_the_state_of_every_peer_can_be_saved():
    params = {"embed": jnp.ones((4, 8)), "block": {"kernel": jnp.ones((8, 8))}, "norm": jnp.ones(8)}
    low_rank = rules((PLAIN, None), default=LowRank(2))
    for name, recipe in peers.PEERS.items():
        if recipe.text:
            structure = (low_rank,) if recipe.family == "low_rank" else ()
            state = jax.eval_shape(recipe.make(1e-3, *structure).init, params)
            assert all(leaf.size for leaf in jax.tree.leaves(state)), name


@pytest.mark.slow
def test_a_run_of_every_peer_can_be_evaluated():
    for name, recipe in peers.PEERS.items():
        if recipe.text:
            task = lm(name)
            assert task.evaluate(task.init(), 0).row["perplexity"] > 1, name
