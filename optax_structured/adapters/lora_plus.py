"""LoRA+: a larger step for the factor that starts at zero."""

import optax

from optax_structured.adapters.lora import Pair, map_pairs, with_factors


def scale_b(ratio: float = 16.0) -> optax.GradientTransformation:
    r"""Multiplies the updates of the factors b, and leaves all others.

    .. math:: \Delta b \leftarrow \lambda\, \Delta b

    Args:
      ratio: :math:`\lambda`, the learning rate of b over that of a; 16, useful 2 to 32.

    Returns:
      An element without state, to stand after the preconditioner.

    Equals LoRA at a ratio of 1.

    Example:
      >>> import optax, optax_structured as oxs
      >>> optimizer = optax.chain(optax.adam(1e-4), oxs.adapters.scale_b(16.0))

    Reference: Hayou et al., `LoRA+ <https://arxiv.org/abs/2402.12354>`_, 2024.
    """

    def scaled(pair: Pair) -> Pair:
        return with_factors(pair, pair.a, ratio * pair.b)

    return optax.stateless(lambda updates, _: map_pairs(scaled, updates))
