"""Q-GaLore: GaLore with everything that it holds stored in 8 or 4 bits per entry."""

from typing import Any

import jax
import optax

from optax_structured.low_rank.refresh import Lazy
from optax_structured.low_rank.spec import LowRank, completed
from optax_structured.low_rank.wrapper import low_rank_projection
from optax_structured.quantization import Affine, Dynamic, quantized
from optax_structured.recipes.descent import descent
from optax_structured.recipes.end_of_chain import closed_chain
from optax_structured.states.clock import ScalarOrSchedule
from optax_structured.transforms import debiased_adam, decay_updated_weights, skip_nonfinite
from optax_structured.transforms.nonfinite import unguarded
from optax_structured.trees import Rules, as_rules, resolve
from optax_structured.weights import keep_on_grid


def q_galore(
    learning_rate: ScalarOrSchedule,
    low_rank: LowRank | Rules,
    *,
    weights: Affine | None = Affine(),  # noqa: B008  (frozen)
    moments: Dynamic | Rules | None = Dynamic(),  # noqa: B008  (frozen)
    scale: ScalarOrSchedule = 0.25,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Q-GaLore: bases in 4 bits, moments and weights in 8, and subspaces that are fitted rarely.

    For each projected leaf, with P its decoded basis, :math:`R = P^\top G` and Q the rounding of
    weights,

    .. math::
        M &\leftarrow b_1 M + (1-b_1) R, \qquad V \leftarrow b_2 V + (1-b_2) R^2 \\
        W' &= W - \eta\, a\, P \frac{M / (1-b_1^t)}{\sqrt{V / (1-b_2^t)} + \epsilon}, \qquad
        W \leftarrow Q\big((1 - \eta d)\, W'\big)

    with the moments of the leaf stored in codes, as by `quantized`; the other leaves get 8-bit Adam
    in the same way, without P, :math:`a` and Q.

    Args:
      learning_rate: :math:`\eta`, a number or schedule; published 0.015 at 60M and 130M, 0.01 at
        350M and 1B, 0.004 at 7B.
      low_rank: a `LowRank`, or `rules` of them: exclude embeddings, head, norms and biases. What it
        leaves open is `refresh=Lazy()`, `codec=Affine(bits=4)`, and as in `galore`.
      weights: keeps projected leaves, which are float32, on this grid, as `keep_on_grid` does; None
        does not, for weights from `quantize_weights` or plain ones.
      moments: a `Dynamic`, or `rules` of them; those of fewer than 4096 entries are float32. None
        is float32 for all of them.
      scale: :math:`a`, a number or schedule; 0.25.
      b1: decay of Adam's mean, in [0, 1), a number or schedule.
      b2: decay of its mean square, in [0, 1), a number or schedule; 0.95, and published 0.999 in
        per-layer mode.
      eps: added to its corrected root, a number or schedule.
      weight_decay: d, of the updated weights, a number or schedule.
      seed: of the draws that round weights, an int; 0.

    Returns:
      An optimizer that needs `params` for weights on a grid and for weight decay only, and after
      which nothing may follow in a chain.

    Raises:
      TypeError, ValueError: a value out of range, parts that cannot do with a basis in codes, or as
        `low_rank_projection`, `quantized` and `keep_on_grid`.

    Equals `galore` with `inner=debiased_adam()` and `Lazy` refits where nothing is in codes.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> low_rank = oxs.rules(("bias", None), default=oxs.LowRank(rank=2))
      >>> optimizer = oxs.q_galore(0.01, low_rank)
      >>> params = {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)
      >>> state.inner_state[0].bases["kernel"].codes.nbytes  # two entries a byte
      6

    References:
      Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
      Gradients <https://arxiv.org/abs/2407.08296>`_, CPAL 2025. The paper compares projection
      matrices where its code compares their leading vectors, with their arbitrary signs; `Lazy`
      has both, without the signs. The code keeps 4-bit codes in a byte each; here they are packed.
    """
    table = completed(low_rank, refresh=Lazy(), codec=Affine(bits=4))
    adam = unguarded(quantized(debiased_adam(b1, b2, eps), as_rules(moments)))

    elements = [
        low_rank_projection(adam, table, scale=scale),
        descent(learning_rate),
        decay_updated_weights(learning_rate, weight_decay),
    ]

    def projected(tree: Any) -> Any:
        leaves = [spec is not None for spec in resolve(table, tree)]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    if weights is not None:
        elements.append(optax.masked(keep_on_grid(weights, seed=seed), projected))
    return closed_chain(*elements) if weights is not None else skip_nonfinite(*elements)
