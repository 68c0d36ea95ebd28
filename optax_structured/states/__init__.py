"""What an array of an optimizer state is: the parameter it belongs to, and its role."""

from optax_structured.states.ownership import owners
from optax_structured.states.reinit import reinit

__all__ = ["owners", "reinit"]
