"""The record that flows between the proximal elements of a chain, one per leaf."""

import dataclasses
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from optax_structured.xla.leaf_loops import made

_REFUSAL = (
    "a proximal subproblem is not an update yet, and nothing but adaptive_preconditioner or "
    "adam_preconditioner may stand between dual_averaging (or moving_average) and prox_step. "
    "Put what acts on gradients (clipping, weight decay, accumulation) before dual_averaging, "
    "close the chain with prox_step, and wrap apply_if_finite or other control flow around the "
    "whole recipe."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Subproblem:
    r"""What `prox_step` is to minimise for one leaf.

    .. math::
        \langle V, w\rangle + \tfrac12 \langle w - W_0, P (w - W_0)\rangle
            + \alpha \lambda\, \psi(w)

    An opaque leaf on purpose, not a pytree: it has the shape and dtype of the gradient it came
    from, so that mask functions work on it, and refuses arithmetic, so that a foreign
    transformation between two proximal elements fails while tracing instead of training wrongly.
    """

    # Arrays; between elements also `Late` ones, which are made when the leaf is solved.
    direction: Any  # V, like the leaf
    metric: Any  # P > 0, a scalar or like the leaf
    centre: Any  # W0, like the leaf
    weight: jax.Array  # (): alpha; `prox_step` multiplies it by the strength, for the solver
    gradient: Any = None  # the raw gradient of this step, for the preconditioner
    gradient_weight: Any = None  # (): how much of this gradient went into V
    origin: str = ""  # the element that posed it
    start: Any = None  # where an iteration starts; None: at the parameters

    @property
    def shape(self) -> tuple[int, ...]:
        return self.direction.shape

    @property
    def dtype(self) -> Any:
        return self.direction.dtype if self.gradient is None else self.gradient.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __repr__(self) -> str:
        return f"<Subproblem of shape {self.shape}: {_REFUSAL}>"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(f"Got a Subproblem of shape {self.shape}: {_REFUSAL}")

    def __getattr__(self, name: str) -> NoReturn:
        """Refuses the attributes of arrays (real, at, astype, ...), whichever they are."""
        if name.startswith("__"):  # protocols are looked up everywhere, and are answered below
            raise AttributeError(name)
        self._refuse()

    # jnp functions, arithmetic from either side. JAX looks `__jax_array__` up before it says, in
    # words of its own, that it cannot use it: the look-up itself refuses.
    __jax_array__ = property(_refuse)
    __array__ = __iter__ = __len__ = __getitem__ = __bool__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = (
        _refuse
    )
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__


def unpenalised(sub: Subproblem) -> jax.Array:
    """The minimiser without a regularizer, W0 - V / P: the point that a prox moves."""
    return made(sub.centre) - made(sub.direction) / made(sub.metric)


def posed_by(first: str, updates: Any, element: str, otherwise: str) -> None:
    """Raises TypeError unless every leaf of `updates` is a `Subproblem` posed by `first`."""
    for leaf in jax.tree.leaves(updates):
        if not isinstance(leaf, Subproblem):
            raise TypeError(
                f"{element} takes the subproblems of {first}, but got a plain update of shape "
                f"{jnp.shape(leaf)}: put {first} directly before it in the chain"
            )
        if leaf.origin != first:
            raise TypeError(f"{element} {otherwise}")
