"""Which fields of optimizer states are stored in codes, and whether their entries have a sign."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np
from jax.tree_util import keystr

Kind = Literal["signed", "unsigned", "plain", "state"]
Fields = Mapping[str, Mapping[str, Kind]]

_ADAM: Mapping[str, Kind] = {"mu": "signed", "nu": "unsigned"}

# By the class of a state and the name of its field: a first moment, a second moment, what stays as
# it is, or a state inside. Of classes that are not here, all fields are states inside, and arrays
# of `min_size` among them are an error: nothing is guessed, and nothing stays wide in silence.
FIELDS: Fields = MappingProxyType(
    {
        "ScaleByAdamState": _ADAM,
        "ScaleByBeliefState": _ADAM,
        "DebiasedAdamState": _ADAM,
        "ScaleByAmsgradState": {**_ADAM, "nu_max": "unsigned"},
        "ScaleByRmsState": {"nu": "unsigned"},
        "ScaleByRmsWithCountState": {"nu": "unsigned"},
        "ScaleByRssState": {"sum_of_squares": "unsigned"},
        "ScaleByLionState": {"mu": "signed"},
        "TraceState": {"trace": "signed"},
        "EmaState": {"ema": "signed"},
        "AdamPreconditionerState": {"mean_square": "unsigned", "max_mean_square": "unsigned"},
        "MovingAverageState": {"mean": "signed"},
        # Sums of squares over rows and columns: few numbers, read by whole matrices.
        "FactoredState": {"v_row": "plain", "v_col": "plain", "v": "unsigned"},
        # Accumulated gradients and bases have codecs of their own, or none.
        "MultiStepsState": {"acc_grads": "plain"},
        "AccumulateState": {"total": "plain"},
        "LowRankState": {"bases": "plain", "refresh": "plain", "residual": "plain"},
        "LDAdamState": {**_ADAM, "bases": "plain", "error": "plain"},
        "LookaheadState": {"v": "plain"},
    }
)


def kinds(state: Any, fields: Fields, min_size: float) -> list[Kind]:
    """What each array of a state is, in the order of `jax.tree.leaves(state)`.

    Raises:
      ValueError: an array of `min_size` floating-point entries that the table does not know.
    """

    def known(node: Any) -> bool:
        return type(node).__name__ in fields

    def visit(path: Any, node: Any) -> list[Kind]:
        if known(node):
            table = fields[type(node).__name__]
            found: list[Kind] = []
            for name in node._fields:
                kind, value = table.get(name, "state"), getattr(node, name)
                if kind == "state":
                    found += kinds(value, fields, min_size)
                else:
                    found += [kind] * len(jax.tree.leaves(value))
            return found
        if np.ndim(node) and np.size(node) >= min_size and np.issubdtype(node.dtype, np.floating):
            raise ValueError(
                f"quantized: no rule for the state{keystr(path)} of shape {np.shape(node)}; say "
                'what it is, fields={"NameOfTheState": {"field": "signed"}}, with "signed" for a '
                'first moment, "unsigned" for a second moment, or "plain" to leave it as it is'
            )
        return ["plain"]

    nodes = jax.tree.leaves_with_path(state, is_leaf=known)
    return [kind for path, node in nodes for kind in visit(path, node)]
