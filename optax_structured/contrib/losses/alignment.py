"""Hessian alignment: heads whose loss has the same slope and curvature in every environment."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_structured.trees.precision import at_least_float32

Method = Literal["hgp", "hutchinson"]
Reference = Literal["mean_loss", "mean_product"]


def hessian_alignment_penalty(
    loss: Callable[[Any, Any], jax.Array],
    head: Any,
    environments: Any,
    *,
    alpha: ArrayLike,
    beta: ArrayLike,
    method: Method = "hgp",
    reference: Reference = "mean_loss",
    probes: Any = None,
) -> jax.Array:
    r"""How much head gradients and head Hessians differ between environments.

    With the loss :math:`L_e(\phi)` of environment e, its gradient :math:`g_e` and Hessian
    :math:`H_e` in the head :math:`\phi`, and a bar for those of the mean of the E losses,

    .. math:: \frac1E \sum_e \alpha\,\|c_e - \operatorname{sg}(\bar c)\|^2
        + \beta\,\|g_e - \operatorname{sg}(\bar g)\|^2, \qquad
        c_e = H_e g_e \quad\text{or}\quad c_e = \frac1K \sum_k z_k \odot H_e z_k

    for `"hgp"` and for `"hutchinson"`, an estimate of :math:`\operatorname{diag} H_e` from random
    signs z. The means are constants (sg); everything else is differentiated, through the head and
    through whatever computed the environments, such as a feature extractor.

    Args:
      loss: `loss(head, environment)`, () : the mean loss of one environment. Examples that fill
        up a smaller environment need weight 0 in it.
      head: parameters of the classifier head.
      environments: a tree whose leaves have a leading axis E: features, labels, weights.
      alpha: weight of the curvature term, a number; published: 1e-5 to 1e-3 for `"hgp"`, 1e-3 to
        1e4 for `"hutchinson"`. Searched over decades, and switched on after a warm-up.
      beta: weight of the gradient term, a number; published: 1e-3 to 0.1 for `"hgp"`, up to 1e6.
      method: which curvature.
      reference: whether :math:`\bar c` is that of the mean loss (`"mean_loss"`) or the mean of
        the :math:`c_e` (`"mean_product"`). The mean of :math:`H_e g_e` is not
        :math:`\bar H\bar g`; with shared probes the two are one.
      probes: z for `"hutchinson"`, from `rademacher`: leaves (K, ...) of probes that all
        environments share, or (1 + E, K, ...) of independent ones, those of the mean loss first,
        which adds their noise to the difference.

    Returns:
      () float32 or wider: the penalty, to be added to the mean loss.

    Raises:
      ValueError: an unknown method or reference; `"hutchinson"` without probes, or the reverse.

    Equals zero for environments that are alike, if they share their probes. For a linear head
    under softmax cross-entropy see `linear_head_alignment_penalty`: no probes, and no derivatives
    of third order.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(head, data):
      ...     return jnp.mean((data["x"] @ head - data["y"]) ** 2)
      >>> environments = {"x": jnp.array([[[1.0]], [[2.0]]]), "y": jnp.zeros((2, 1))}
      >>> print(hessian_alignment_penalty(loss, jnp.ones(1), environments, alpha=0.0, beta=1.0))
      9.0

    References:
      Hemati et al., `Understanding Hessian Alignment for Domain Generalization
      <https://arxiv.org/abs/2308.11778>`_, 2023. Their product H g is the norm of g
      times its gradient: the same where g is not 0, NaN where it is.
    """
    _check(method, reference, probes)
    gradient = jax.grad(loss)

    def product(v: Any, environment: Any) -> Any:
        return jax.jvp(lambda phi: gradient(phi, environment), (head,), (v,))[1]

    def diagonal(z: Any, environment: Any) -> Any:
        products = jax.vmap(product, (0, None))(z, environment)
        return jax.tree.map(lambda a, b: jnp.mean(a * b, 0), z, products)

    slopes = jax.vmap(gradient, (None, 0))(head, environments)
    mean_slope = mean_over_environments(slopes)
    curvature: Callable[[Any, Any], Any]
    if method == "hgp":
        curvature, own, shared = product, slopes, mean_slope
    else:
        curvature, own, shared = diagonal, *_by_environment(probes, head)
    curvatures = jax.vmap(curvature, (None if own is shared else 0, 0))(own, environments)
    if own is shared or reference == "mean_product":
        of_mean = curvatures
    else:
        of_mean = jax.vmap(curvature, (None, 0))(shared, environments)
    bent = spread(curvatures, mean_over_environments(of_mean))
    return jnp.asarray(alpha * bent + beta * spread(slopes, mean_slope))


def rademacher(key: jax.Array, head: Any, count: int, environments: int | None = None) -> Any:
    """Random signs for `hessian_alignment_penalty`.

    Args:
      key: a PRNG key; a new one each step.
      head: parameters of the classifier head.
      count: K, probes; 100 to 300 are published.
      environments: E for independent probes, None for probes that all environments share.

    Returns:
      A tree like `head` with leaves (K, ...) or (1 + E, K, ...).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jax.tree.map(jnp.shape, rademacher(jax.random.key(0), {"w": jnp.ones((3, 2))}, 10))
      {'w': (10, 3, 2)}
    """
    leaves, structure = jax.tree.flatten(head)
    keys = jax.random.split(key, max(len(leaves), 1))
    lead = (count,) if environments is None else (1 + environments, count)
    signs = [
        jax.random.rademacher(k, (*lead, *jnp.shape(leaf)), jnp.result_type(leaf))
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(structure, signs)


def mean_over_environments(tree: Any) -> Any:
    """The mean over the leading axis, as a constant.

    >>> print(mean_over_environments(jnp.array([[1.0, 2.0], [3.0, 4.0]])))
    [2. 3.]
    """
    return jax.lax.stop_gradient(jax.tree.map(lambda x: jnp.mean(x, 0), tree))


def spread(tree: Any, mean: Any) -> jax.Array:
    """Mean over the leading axis of the squared distance from `mean`.

    >>> print(spread(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([2.0, 3.0])))
    2.0
    """
    squares = jax.tree.map(lambda x, m: jnp.sum(jnp.square(at_least_float32(x - m))), tree, mean)
    return jnp.asarray(sum(jax.tree.leaves(squares))) / len(jax.tree.leaves(tree)[0])


def _by_environment(probes: Any, head: Any) -> tuple[Any, Any]:
    """Probes of the environments and of the mean loss; one object where they are shared."""
    probes = jax.tree.map(lambda z, p: jnp.asarray(z, jnp.result_type(p)), probes, head)
    extra = {
        z.ndim - jnp.ndim(p) for z, p in zip(*map(jax.tree.leaves, (probes, head)), strict=True)
    }
    if extra == {1}:
        return probes, probes
    if extra == {2}:
        return tuple(jax.tree.map(lambda z, i=i: z[i], probes) for i in (slice(1, None), 0))
    raise ValueError(
        "hessian_alignment_penalty: probes need leaves of shape (K, *leaf) or (1 + E, K, *leaf) "
        f"for each leaf of the head, got {jax.tree.map(jnp.shape, probes)}"
    )


def _check(method: str, reference: str, probes: Any) -> None:
    for name, value, known in (("method", method, Method), ("reference", reference, Reference)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
    if (method == "hutchinson") != (probes is not None):
        raise ValueError(
            "hessian_alignment_penalty: method='hutchinson' takes probes=rademacher(key, head, K), "
            "and the other method none"
        )
