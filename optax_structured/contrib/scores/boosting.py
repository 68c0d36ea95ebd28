"""A hidden layer trained a few units at a time, by gradient boosting."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_structured.contrib.scores.boosting_losses import Kind, boosting_loss
from optax_structured.trees.precision import at_least_float32


class BoostedNetwork(NamedTuple):
    """T rounds of J hidden units, and the constant that they correct."""

    start: jax.Array  # (outputs,)
    kernel: jax.Array  # (T, inputs, J)
    bias: jax.Array  # (T, J)
    output: jax.Array  # (T, J, outputs): output weights, times the step of the round
    offset: jax.Array  # (T, outputs): output biases, times the step of the round
    loss: jax.Array  # (T,): mean training loss after each round

    def scores(self, x: ArrayLike, activation: Callable[[Any], Any] = jax.nn.sigmoid) -> jax.Array:
        """(T, n, outputs): the score after each round, for inputs (n, inputs)."""
        hidden = activation(jnp.einsum("nd,tdj->tnj", x, self.kernel) + self.bias[:, None])
        learned = jnp.einsum("tnj,tjk->tnk", hidden, self.output) + self.offset[:, None]
        return self.start + jnp.cumsum(learned, 0)

    def dense(self, rounds: int | None = None, scale: float = 1.0) -> dict[str, Any]:
        """One ordinary hidden layer and output layer, of the first `rounds` rounds.

        `scale=2` turns the scores of the logistic loss into logits.
        """
        kernel, bias, output, offset = (x[:rounds] for x in self[1:5])
        inputs, outputs = kernel.shape[1], output.shape[2]
        return {
            "hidden": {
                "kernel": jnp.moveaxis(kernel, 0, 1).reshape(inputs, -1),
                "bias": bias.reshape(-1),
            },
            "output": {
                "kernel": scale * output.reshape(-1, outputs),
                "bias": scale * (self.start + jnp.sum(offset, 0)),
            },
        }


def fit_boosted_network(
    key: jax.Array,
    x: ArrayLike,
    y: ArrayLike,
    loss: Kind = "squared",
    *,
    rounds: int,
    units: int = 1,
    shrinkage: float = 1.0,
    subsample: float = 0.5,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    l2: float = 1e-4,
    activation: Callable[[Any], Any] = jax.nn.sigmoid,
) -> BoostedNetwork:
    r"""Trains a one-hidden-layer network greedily, each round of units on what is left.

    With the residual r of the loss at the scores :math:`F_{t-1}`, a small network
    :math:`h_t(x) = a^\top\operatorname{act}(W x + b) + c` is fitted to r by squared error on a
    random part of the rows, and

    .. math:: F_t = F_{t-1} + \nu\rho_t h_t

    with the Newton step :math:`\rho_t` on all rows. The sum is one ordinary network, `dense`, that
    can be cut after any round.

    Args:
      key: a PRNG key, for rows and initial weights.
      x: (n, inputs), standardised.
      y: targets: (n,) or (n, outputs) for `"squared"`, (n,) of -1 and 1 for `"logistic"`,
        (n, classes) one-hot for `"softmax"`.
      loss: see `boosting_loss`.
      rounds: T.
      units: J, hidden units a round; 1 to 4.
      shrinkage: :math:`\nu`, 0.025 to 1.
      subsample: share of the rows that a round is fitted to, 0.25 to 1.
      optimizer: of the fit of each round; None: `optax.lbfgs()`.
      steps: of that optimizer a round.
      l2: penalty of its weights, :math:`\tfrac{l_2}{2n}\|\cdot\|^2`, not of biases.
      activation: of the hidden units.

    Returns:
      A `BoostedNetwork`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.linspace(-1.0, 1.0, 32)[:, None]
      >>> network = fit_boosted_network(jax.random.key(0), x, x[:, 0] ** 2, rounds=3, steps=50)
      >>> print(network.kernel.shape, bool(network.loss[-1] < network.loss[0]))
      (3, 1, 1) True

    References:
      Emami and Martínez-Muñoz, `Sequential Training of Neural Networks with Gradient Boosting
      <https://arxiv.org/abs/1909.12098>`_, 2023. Its code draws rows without the seed, and does
      not guard the denominators of the steps.
    """
    part = boosting_loss(loss)
    inner = optax.with_extra_args_support(optax.lbfgs() if optimizer is None else optimizer)
    x = at_least_float32(x)
    y = jnp.asarray(y, x.dtype).reshape(len(x), -1)
    inputs, outputs, rows = x.shape[1], y.shape[1], int(subsample * len(x))

    def scores(small: Any, x: jax.Array) -> jax.Array:
        return activation(x @ small["kernel"] + small["bias"]) @ small["output"] + small["offset"]

    def initial(key: jax.Array) -> Any:
        draw = jax.nn.initializers.glorot_uniform()
        first, second = jax.random.split(key)
        return {
            "kernel": draw(first, (inputs, units), x.dtype),
            "bias": jnp.zeros(units, x.dtype),
            "output": draw(second, (units, outputs), x.dtype),
            "offset": jnp.zeros(outputs, x.dtype),
        }

    def fitted(key: jax.Array, x: jax.Array, residual: jax.Array) -> Any:
        def objective(small: Any) -> jax.Array:
            squares = sum(jnp.sum(small[name] ** 2) for name in ("kernel", "output"))
            error = jnp.sum((scores(small, x) - residual) ** 2, -1)
            return 0.5 * jnp.mean(error) + 0.5 * l2 / len(x) * squares

        def step(carry: Any, _: None) -> tuple[Any, None]:
            small, state = carry
            value, gradient = jax.value_and_grad(objective)(small)
            updates, state = inner.update(
                gradient, state, small, value=value, grad=gradient, value_fn=objective
            )
            return (optax.apply_updates(small, updates), state), None

        start = initial(key)
        (small, _), _ = jax.lax.scan(step, (start, inner.init(start)), length=steps)
        return small

    def round_of(f: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        choose, begin = jax.random.split(key)
        chosen = jax.random.choice(choose, len(x), (rows,), replace=False)
        small = fitted(begin, x[chosen], part.residual(y, f)[chosen])
        h = scores(small, x)
        rate = shrinkage * part.step(y, f, h)
        f = f + rate * h
        output, offset = rate * small["output"], rate * small["offset"]
        mean = jnp.mean(part.value(y, f))
        return f, (small["kernel"], small["bias"], output, offset, mean)

    start = part.start(y)
    _, layers = jax.lax.scan(
        round_of, jnp.broadcast_to(start, y.shape), jax.random.split(key, rounds)
    )
    return BoostedNetwork(start, *layers)
