"""Published methods that stand beside the optimizers, one file each; loaded only where imported.

`from optax_structured import contrib` loads them all, `from optax_structured.contrib import losses`
one room. They are built on the same habits as the library, and nothing in the library needs them.
"""

from optax_structured.contrib import (
    bilevel,
    communication,
    layers,
    learning_curves,
    losses,
    scores,
    solvers,
)

__all__ = ["bilevel", "communication", "layers", "learning_curves", "losses", "scores", "solvers"]
