"""What an array of an optimizer state is: the parameter it belongs to, and its role."""

from optax_structured.states.arrays import StateArray, arrays_of
from optax_structured.states.errors import changed_setting
from optax_structured.states.ownership import owners
from optax_structured.states.reinit import reinit

__all__ = ["StateArray", "arrays_of", "changed_setting", "owners", "reinit"]
