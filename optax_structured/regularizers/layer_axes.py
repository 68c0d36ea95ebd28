"""Group axes of common layers in the layouts of flax and haiku, and what stacked layers need.

In equinox inputs and outputs change places: `oxs.presets.groups` reads the axes off any model.
All axes count from the end, so that leading batch axes do not move them. "Inputs" make a layer
ignore a feature, so that whatever produces it can be removed once every reader ignores it.

>>> import jax.numpy as jnp
>>> from optax_structured.regularizers.group import GroupLasso
>>> GroupLasso(CONV_INPUTS).support(jnp.ones((3, 3, 16, 32))).shape
(16,)
>>> stacked(GroupLasso(DENSE_INPUTS)).support(jnp.ones((12, 64, 256))).shape
(12, 64)
"""

import dataclasses
from typing import TypeVar

from optax_structured.regularizers.groups import Grouped

DENSE_INPUTS = -2  # kernel (in, out)
DENSE_OUTPUTS = -1

CONV_INPUTS = -2  # kernel (*window, in, out)
CONV_FILTERS = -1
DEPTHWISE_FILTERS = -1  # kernel (*window, 1, channels): its input axis has length 1

ATTENTION_IN_INPUTS = -3  # query, key and value kernels (in, heads, d)
ATTENTION_IN_HEADS = -2
ATTENTION_OUT_INPUTS = (-3, -2)  # output kernel (heads, d, out)
ATTENTION_OUT_HEADS = -3

G = TypeVar("G", bound=Grouped)


def stacked(regularizer: G) -> G:
    """The same regularizer for a leaf that stacks layers along its first axis, as `nn.scan` does.

    For layers stacked along another axis, say so: `GroupLasso(0, batch_axis=1)`.

    Args:
      regularizer: one with groups, whose `group_axis` counts from the end (all presets do).

    Returns:
      `regularizer` with `batch_axis=0`: each layer has groups of its own.

    Raises:
      ValueError: a group axis that counts from the front, which stacking would shift.
      TypeError: a regularizer without groups, which takes a stacked leaf unchanged.

    >>> from optax_structured.regularizers.group import GroupLasso
    >>> stacked(GroupLasso(DENSE_INPUTS))
    GroupLasso(group_axis=-2, batch_axis=0, weight=None)
    """
    if not isinstance(regularizer, Grouped):
        raise TypeError(
            f"stacked takes a regularizer with groups, got {regularizer!r}; penalties on entries "
            "and matrices take stacked leaves unchanged"
        )
    given = regularizer.group_axis
    if any(axis >= 0 for axis in (given if isinstance(given, tuple) else (given,))):
        raise ValueError(
            f"stacked needs a group_axis that counts from the end, got {given!r}: a leading stack "
            "axis shifts the others; write it as a negative number"
        )
    return dataclasses.replace(regularizer, batch_axis=0)
