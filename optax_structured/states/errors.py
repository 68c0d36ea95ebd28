"""A state that was made with other settings than those of the optimizer that it is given to."""

import re


class ChangedSetting(ValueError):
    """Says which setting of which leaf: no other sentence takes its place."""


def changed_setting(element: str, leaf: str, old: str, new: str) -> ValueError:
    """The error of every element whose state was made with another rank, codec or block size.

    Args:
      element: that found it, such as "low_rank_projection".
      leaf: path of the parameter.
      old: what the state was made for: "rank 4".
      new: what the optimizer has: "rank 8".

    Returns:
      The error, to be raised.

    >>> print(changed_setting("low_rank_projection", "dense/kernel", "rank 4", "rank 8"))
    low_rank_projection: the state of 'dense/kernel' was made for rank 4, and the optimizer has \
rank 8; go on with rank 4, or start the state of that leaf again: \
state = oxs.reinit(optimizer, state, params, '^dense/kernel$')
    """
    pattern = f"^{re.escape(leaf)}$"
    return ChangedSetting(
        f"{element}: the state of {leaf!r} was made for {old}, and the optimizer has {new}; go on "
        f"with {old}, or start the state of that leaf again: "
        f"state = oxs.reinit(optimizer, state, params, {pattern!r})"
    )
