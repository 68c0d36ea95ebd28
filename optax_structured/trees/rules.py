"""Which leaf gets what: one ordered table of patterns and values."""

import dataclasses
import enum
import math
import re
from collections.abc import Callable
from typing import Any

import jax

from optax_structured.trees import assignment
from optax_structured.trees.assignment import Assignment
from optax_structured.trees.matching import check_used, match, same
from optax_structured.trees.paths import is_hole, is_masked, named_positions


class _Missing(enum.Enum):
    DEFAULT = "no default"  # an enum member stays itself through pickling and copying

    def __repr__(self) -> str:
        return "<no default>"


@dataclasses.dataclass(frozen=True)
class Rules:
    """An ordered table of `(pattern, value)` pairs and a default; build it with `rules`.

    Args:
      pairs: `(pattern, value)`, the first match wins.
      default: the value of all leaves that match no pattern.

    >>> Rules((("bias", None),), default="sparse").tree({"kernel": 1.0, "bias": 2.0})
    {'bias': None, 'kernel': 'sparse'}
    """

    pairs: tuple[tuple[str, Any], ...]
    default: Any = _Missing.DEFAULT

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise TypeError(
                    f"rules takes (pattern, value) pairs as separate arguments, got {pair!r}; "
                    "write rules((r'bias|norm', None), default=spec)"
                )
            pattern, value = pair
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"rules: pattern {pattern!r} is not a regular expression ({error}); "
                    "escape literal text with re.escape"
                ) from error
            _check_value(f"pattern {pattern!r}", value)
        _check_value("default", self.default)

    @property
    def has_default(self) -> bool:
        """Whether leaves that match no pattern get a value."""
        return self.default is not _Missing.DEFAULT

    @property
    def values(self) -> list[Any]:
        """All values in order, the default last, if there is one."""
        return [value for _, value in self.pairs] + [self.default] * self.has_default

    def mapped(self, f: Callable[[Any], Any]) -> "Rules":
        """The same patterns with `f` of their values."""
        pairs = tuple((pattern, f(value)) for pattern, value in self.pairs)
        return Rules(pairs, f(self.default)) if self.has_default else Rules(pairs)

    def assign(self, params: Any) -> list[Assignment]:
        """One `Assignment` per leaf, in the order of `jax.tree.leaves(params)`.

        Raises:
          ValueError: a pattern matches no path (with the nearest paths), or only paths that earlier
            patterns take and to which it would give another value, or a leaf matches no pattern and
            there is no default. Positions masked by `optax.masked` and positions that hold None
            keep a pattern alive; below a masked subtree nothing can be seen, so that in a masked
            tree every pattern may be alive. A pattern that matches everything may stand last as a
            default. A tree without leaves is never an error.
        """
        positions = named_positions(params)
        if all(is_hole(leaf) for _, leaf in positions):
            return []
        paths = tuple(path for path, _ in positions)
        matches = match(tuple(pattern for pattern, _ in self.pairs), paths)
        if not any(is_masked(leaf) for _, leaf in positions):
            check_used(self.pairs, paths, matches)

        def assigned(path: str, leaf: Any, owner: int | None) -> Assignment:
            if owner is not None:
                return Assignment(path, leaf, *self.pairs[owner])
            if not self.has_default:
                raise ValueError(
                    f"rules: no pattern matches {path!r} and there is no default; add a pattern or "
                    "a default (default=None leaves the remaining leaves plain)"
                )
            return Assignment(path, leaf, None, self.default)

        pairs = zip(positions, matches.owners, strict=True)
        return [assigned(*position, owner) for position, owner in pairs if not is_hole(position[1])]

    def tree(self, params: Any) -> Any:
        """A tree with the structure of `params` whose leaves are the values.

        A value may be None, which JAX takes for an empty tree: put `params` first,
        `jax.tree.map(f, params, rules.tree(params))`, so that its structure leads and `f` receives
        the None; `is_leaf=lambda x: x is None` is needed only to map over the values alone.

        >>> rules(("bias", None), default="sparse").tree({"kernel": 1.0, "bias": 2.0})
        {'bias': None, 'kernel': 'sparse'}
        """
        values = [assignment.value for assignment in self.assign(params)]
        return jax.tree.unflatten(jax.tree.structure(params), values)

    def labels(self, params: Any) -> Any:
        """A tree of strings for `optax.partition`, with the structure of `params`.

        A value that is a string is the label. Any other value is labelled by the pattern that
        brings it, or "default"; equal values share the first of their labels.

        >>> import optax
        >>> table = rules(("bias|norm", "plain"), default="sparse")
        >>> table.labels({"kernel": 1.0, "bias": 2.0})
        {'bias': 'plain', 'kernel': 'sparse'}
        >>> tx = optax.partition({"plain": optax.sgd(0.1), "sparse": optax.adam(0.1)}, table.labels)

        Raises:
          ValueError: one label would name two different values.
        """
        names: list[tuple[str, Any]] = []
        for rule, value in (*self.pairs, ("default", self.default)):
            if any(same(value, known) for _, known in names):
                continue
            label = value if isinstance(value, str) else rule
            for taken, known in names:
                if taken == label:
                    raise ValueError(
                        f"rules: label {label!r} would name both {known!r} and {value!r}; give "
                        "strings as values, they are used as the labels"
                    )
            names.append((label, value))

        def label_of(value: Any) -> str:
            return next(label for label, known in names if same(value, known))

        labels = [label_of(assignment.value) for assignment in self.assign(params)]
        return jax.tree.unflatten(jax.tree.structure(params), labels)

    def table(self, params: Any) -> str:
        """Plain text: what the leaves get, one row for those that differ in numbers only.

        A leaf that cannot take the default is shown as plain, with the reason.

        >>> import jax.numpy as jnp
        >>> table = rules(("bias", None), default="sparse")
        >>> print(table.table({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}))
        path    shape   dtype    rule     value
        bias    (3,)    float32  bias     None
        kernel  (2, 3)  float32  default  'sparse'
        2 leaves of 9 entries; 1 of 3 entries stay plain
        """
        return assignment.table(settle(self, params), [pattern for pattern, _ in self.pairs])


def rules(*pairs: tuple[str, Any], default: Any = _Missing.DEFAULT) -> Rules:
    """A table that says which leaf gets which value: ordered, the first match wins, total.

    Patterns are regular expressions, searched (`re.search`) in the "/"-joined path of each leaf.
    The table is frozen, hashable when its values are, and not callable.

    Args:
      pairs: `(pattern, value)`. A value is a spec (a regularizer, ...), None (leave the leaf
        plain), or anything else that is not callable, such as a label for `optax.partition`.
      default: the value of all leaves that match no pattern; may be left out when every leaf
        matches one.

    Returns:
      A `Rules`: `.tree(params)`, `.labels(params)`, `.table(params)`, `.assign(params)`.

    Raises:
      TypeError: a pair that is not `(str, value)`; a value that is a class or a function.
      ValueError: a pattern that is not a regular expression. Patterns that match nothing, or only
        what earlier ones take, and leaves that match nothing raise when the table meets the
        parameters.

    >>> rules((r"embed|head", None), default="sparse").tree({"embed": 1.0, "mlp": {"kernel": 2.0}})
    {'embed': None, 'mlp': {'kernel': 'sparse'}}
    """
    return Rules(pairs, default)


def as_rules(value: Any) -> Rules:
    """`value` itself when it is a table, else the table that has it as its only default.

    >>> as_rules("sparse").default
    'sparse'
    """
    return value if isinstance(value, Rules) else Rules((), value)


def resolve(structure: Any, params: Any) -> list[Any]:
    """The spec of every leaf, None where it stays plain, in the order of `jax.tree.leaves(params)`.

    A spec may have `check(shape)`, which raises ValueError when a leaf of that shape cannot take
    it. A leaf that cannot take the *default* stays plain; a leaf that matches a pattern and cannot
    take the pattern's spec is an error. A spec may also have `fitted(shape)`, the spec as it
    applies to a leaf of that shape. Values with neither apply unchanged. A single spec or None
    instead of a `Rules` is the default of all leaves.

    Raises:
      ValueError: as `Rules.assign`, and for a leaf that cannot take an explicit spec.

    >>> resolve(rules(("bias", None), default="sparse"), {"kernel": 1.0, "bias": 2.0})
    [None, 'sparse']
    """
    return [leaf.value for leaf in settle(structure, params)]


def settle(structure: Any, params: Any) -> list[Assignment]:
    """`resolve`, with the path and rule of each leaf and why it cannot take the default."""
    return [assignment.fitted(item) for item in as_rules(structure).assign(params)]


# From so many entries on, a lone vector is taken for a tree that `optax.flatten` has flattened.
_FLATTENED = 8


def check_some_use(structure: Any, params: Any, kind: type, complaint: str) -> None:
    """Raises ValueError where no leaf gets a spec of this kind, though some leaf could take one.

    That is a leaf of two axes or more, or one vector that is all: what `optax.flatten` makes of a
    tree. A tree of biases and scalars is left alone, and so is one with masked leaves, since
    another part may be meant. `complaint` begins the sentence, as "no leaf can be projected".
    """
    leaves = settle(structure, params)
    if not leaves or any(isinstance(leaf.value, kind) for leaf in leaves):
        return
    if any(is_masked(leaf) for _, leaf in named_positions(params)):
        return
    filled = [leaf for leaf in leaves if math.prod(leaf.shape)]
    alone = len(filled) == 1 and filled[0].path == "" and len(filled[0].shape) == 1
    flat = alone and filled[0].shape[0] >= _FLATTENED
    meant = filled if flat else [leaf for leaf in filled if len(leaf.shape) >= 2]
    if not meant:
        return
    path, reason = next(((x.path, x.reason) for x in meant if x.reason), (meant[0].path, ""))
    if not reason:
        raise ValueError(f"{complaint}: the rules leave {path!r} and all other leaves plain")
    flattened = "; optax.flatten makes one vector of all leaves, and cannot go around this"
    raise ValueError(f"{complaint}; {path!r}: {reason}{flattened if flat else ''}")


def _check_value(where: str, value: Any) -> None:
    if isinstance(value, type):
        raise TypeError(
            f"rules: the value of {where} is the class {value.__name__}; give an instance, "
            f"{value.__name__}(...)"
        )
    if callable(value) and not hasattr(value, "check"):
        raise TypeError(
            f"rules: the value of {where} is the function {value!r}; give a spec, None or a label"
        )
