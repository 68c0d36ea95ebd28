"""Weights as products of two factors, and training of the factors only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structured.trees import Axes, map_named, named_leaves, rules
from optax_structured.weights.base import Form, Weight, init
from optax_structured.weights.spectra import host_matrix
from optax_structured.weights.welore import WelorePlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors(Weight):
    r"""A matrix, or a stack of them, as a product of two factors of one rank.

    Args:
      left: (\*batch, m, k).
      right: (\*batch, k, n).
      axes: the matrix view of the leaf that they stand for.
      shape: its shape.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> factors = oxs.weights.Factors(jnp.ones((3, 1)), jnp.ones((1, 2)), oxs.Axes(), (3, 2))
      >>> factors.merged().shape
      (3, 2)
    """

    left: Any
    right: Any
    axes: Axes = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def merged(self) -> jax.Array:
        return self.axes.from_matrix(jnp.matmul(self.left, self.right), self.shape)


def factorize(params: Any, plan: WelorePlan) -> Any:
    r"""Replaces each matrix that the plan gives a rank by its best two factors of that rank.

    .. math:: W \approx (U_k S_k^{1/2}) (S_k^{1/2} V_k^\top)

    Args:
      params: the parameters of the plan.
      plan: from `welore_plan`, or any mapping of paths to ranks or None.

    Returns:
      `params` with `Factors` instead of those leaves, in their dtype. For the model, and
      inside the loss, `merge` makes them leaves again.

    Raises:
      ValueError: a path of the plan that is not in `params`.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> params = {"mlp": jnp.outer(jnp.arange(4.0), jnp.ones(4)), "attention": jnp.eye(4)}
      >>> factored = oxs.weights.factorize(params, oxs.weights.welore_plan(params, threshold=0.1))
      >>> factored["mlp"].left.shape, factored["attention"].shape
      ((4, 1), (4, 4))
      >>> print(jnp.allclose(oxs.weights.merge(factored)["mlp"], params["mlp"], atol=1e-6))
      True
    """
    views = {entry.path: entry.axes for entry in getattr(plan, "entries", ())}
    if unknown := set(plan) - {path for path, _ in named_leaves(params)}:
        raise ValueError(
            f"factorize: the plan names {min(unknown)!r}, which is not a path of these parameters"
        )

    def form(path: str, leaf: Any) -> Product | None:
        rank = plan.get(path)
        return None if rank is None else Product(rank, views.get(path, Axes()))

    return init(params, map_named(form, params))


@dataclasses.dataclass(frozen=True)
class Product(Form):
    """The best two factors of a rank."""

    rank: int
    axes: Axes

    def init(self, path: str, leaf: Any) -> Factors:
        u, s, vt = np.linalg.svd(host_matrix(path, self.axes, leaf), full_matrices=False)
        root = np.sqrt(s[..., : self.rank])
        left = u[..., : self.rank] * root[..., None, :]
        right = root[..., None] * vt[..., : self.rank, :]
        left, right = (jnp.asarray(x, leaf.dtype) for x in (left, right))
        return Factors(left, right, self.axes, leaf.shape)


def train_factors(
    inner: optax.GradientTransformation, also: str | None = "norm"
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer for the factors only: all that stayed dense is frozen and has no state.

    Args:
      inner: optimizer of what is trained; published `optax.adamw(5e-5)` with warm-up and cosine.
      also: regular expression of the paths of other leaves to train, published those of the norms;
        None for none.

    Returns:
      An optimizer for parameters from `factorize`.

    Raises:
      ValueError: no leaf is factored, or `also` matches no path.

    Equals `inner` where everything is factored.

    Example:
      >>> import jax, optax, jax.numpy as jnp, optax_structured as oxs
      >>> params = {"mlp": jnp.outer(jnp.arange(4.0), jnp.ones(4)), "attention": jnp.eye(4)}
      >>> factored = oxs.weights.factorize(params, oxs.weights.welore_plan(params, threshold=0.1))
      >>> state = oxs.weights.train_factors(optax.adam(1e-3), also=None).init(factored)
      >>> sum(x.size for x in jax.tree.leaves(state))  # two moments of (4, 1) and (1, 4), a count
      17
    """
    table = rules(*(((also, "trained"),) if also is not None else ()), default="frozen")

    def labels(params: Any) -> Any:
        if not any(map(_is_factors, jax.tree.leaves(params, is_leaf=_is_factors))):
            raise ValueError("train_factors: no leaf is factored; give it what factorize returned")
        # Factors are a single leaf here, so `also` decides about the dense leaves only.
        single = jax.tree.map(lambda _: 0, params, is_leaf=_is_factors)
        return jax.tree.map(
            lambda x, label: jax.tree.map(lambda _: "trained", x) if _is_factors(x) else label,
            params,
            table.labels(single),
            is_leaf=_is_factors,
        )

    return optax.partition({"trained": inner, "frozen": optax.set_to_zero()}, labels)


def _is_factors(x: Any) -> bool:
    return isinstance(x, Factors)
