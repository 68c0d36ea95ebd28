"""What parameters in another form have in common: made by a record, merged, counted in bytes."""

import abc
from typing import Any

import jax

from optax_structured.trees import map_named


class Form(abc.ABC):
    """How one parameter is held; subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def init(self, path: str, leaf: Any) -> "Weight":
        """The parameter in this form; errors name its path."""


class Weight(abc.ABC):
    """A parameter in another form: a node of arrays where the tree had a leaf."""

    @abc.abstractmethod
    def merged(self) -> jax.Array:
        """The parameter itself."""

    @property
    def bytes(self) -> int:
        """What its arrays take."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def is_weight(x: Any) -> bool:
    """Whether a node of a tree is a parameter in another form."""
    return isinstance(x, Weight)


def init(params: Any, forms: Any) -> Any:
    """The parameters in these forms: a tree like `params` of `Form`, or None for leaves that stay.

    Args:
      params: concrete parameters.
      forms: a tree like them.
    """
    return map_named(lambda path, x, form: form.init(path, x) if form else x, params, forms)


def merge(weights: Any) -> Any:
    """The parameters themselves, for the model: factors multiplied out, codes decoded.

    Args:
      weights: from `factorize`, `quantize_weights` or `apply_updates`.

    Returns:
      A tree with the structure of the parameters that they were made of; codes are float32 or
      wider. Factors are differentiated through, and trained; nothing is differentiated through the
      rounding of codes: take the gradient with respect to what this returns.

    Example: see `factorize` and `quantize_weights`.
    """
    return jax.tree.map(lambda w: w.merged() if is_weight(w) else w, weights, is_leaf=is_weight)
