"""Names that users choose from."""

import difflib
from collections.abc import Iterable


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless `name` is known: lists all names, and the nearest."""
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(names)}{hint}")
