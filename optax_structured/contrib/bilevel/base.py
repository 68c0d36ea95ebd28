"""What bilevel solvers look like: two players, each with an optimizer of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple


class BilevelSolver(NamedTuple):
    """Pure functions for the upper variables x and the lower variables y, two trees."""

    init: Callable[..., Any]  # x, y -> state
    update: Callable[..., tuple[Any, Any, Any]]  # x, y, state, ... -> x, y, state
