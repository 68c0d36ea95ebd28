"""Which leaf gets what: one ordered table of patterns and values."""

import dataclasses
import difflib
import enum
import heapq
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_structured.trees.paths import is_hole, named_positions


class _Missing(enum.Enum):
    DEFAULT = "no default"  # an enum member stays itself through pickling and copying

    def __repr__(self) -> str:
        return "<no default>"


class Assignment(NamedTuple):
    """What a table gives to one leaf."""

    path: str  # "/"-joined name of the leaf
    leaf: Any  # the leaf itself
    rule: str | None  # the pattern that matched first; None where the default applies
    value: Any  # the value of that rule


@dataclasses.dataclass(frozen=True)
class Rules:
    """An ordered table of `(pattern, value)` pairs and a default; build it with `rules`."""

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

    def assign(self, params: Any) -> list[Assignment]:
        """One `Assignment` a leaf, in the order of `jax.tree.leaves(params)`.

        Raises:
          ValueError: a pattern matches no path (with the nearest paths), or a leaf matches no
            pattern and there is no default. Positions masked by `optax.masked` and positions that
            hold None keep a pattern alive. A tree without leaves is never an error.
        """
        positions = named_positions(params)
        leaves = [(path, leaf) for path, leaf in positions if not is_hole(leaf)]
        if not leaves:
            return []
        paths = [path for path, _ in positions]
        for pattern, _ in self.pairs:
            if not any(re.search(pattern, path) for path in paths):
                nearest = ", ".join(repr(path) for path in _nearest(pattern, paths))
                raise ValueError(
                    f"rules: pattern {pattern!r} matches no parameter path; the nearest paths are "
                    f"{nearest}; correct the pattern or remove it"
                )
        return [Assignment(path, leaf, *self._lookup(path)) for path, leaf in leaves]

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
            if any(_same(value, known) for _, known in names):
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
            return next(label for label, known in names if _same(value, known))

        labels = [label_of(assignment.value) for assignment in self.assign(params)]
        return jax.tree.unflatten(jax.tree.structure(params), labels)

    def table(self, params: Any) -> str:
        """Plain text, one line a leaf: path, shape, dtype, the rule that matched and its value.

        A leaf that cannot take the default is shown as it is treated: left plain.

        >>> import jax.numpy as jnp
        >>> table = rules(("bias", None), default="sparse")
        >>> print(table.table({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}))
        path    shape   dtype    rule     value
        bias    (3,)    float32  bias     None
        kernel  (2, 3)  float32  default  'sparse'
        """
        rows = [("path", "shape", "dtype", "rule", "value")]
        for item, value in zip(self.assign(params), resolve(self, params), strict=True):
            dtype = str(getattr(item.leaf, "dtype", type(item.leaf).__name__))
            rule = "default" if item.rule is None else item.rule
            plain = value is None and item.value is not None
            shown = "None (cannot take the default)" if plain else repr(value)
            rows.append((item.path, str(np.shape(item.leaf)), dtype, rule, shown))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)

    def _lookup(self, path: str) -> tuple[str | None, Any]:
        for pattern, value in self.pairs:
            if re.search(pattern, path):
                return pattern, value
        if self.default is _Missing.DEFAULT:
            raise ValueError(
                f"rules: no pattern matches {path!r} and there is no default; add a pattern or a "
                "default (default=None leaves the remaining leaves plain)"
            )
        return None, self.default


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
      ValueError: a pattern that is not a regular expression. Patterns that match nothing and
        leaves that match nothing raise when the table meets the parameters.

    >>> rules((r"embed|head", None), default="sparse").tree({"embed": 1.0, "mlp": {"kernel": 2.0}})
    {'embed': None, 'mlp': {'kernel': 'sparse'}}
    """
    return Rules(pairs, default)


def as_rules(value: Any) -> Rules:
    """`value` itself when it is a table, else the table that has it as its only default."""
    return value if isinstance(value, Rules) else Rules((), value)


def resolve(structure: Any, params: Any) -> list[Any]:
    """The spec of every leaf, None where it stays plain, in the order of `jax.tree.leaves(params)`.

    A spec may have `check(shape)`, which raises ValueError when a leaf of that shape cannot take
    it. A leaf that cannot take the *default* stays plain; a leaf that matches a pattern and cannot
    take the pattern's spec is an error. Values without `check` are taken as they are.

    Args:
      structure: a `Rules`, or a single spec or None, which then is the default of all leaves.
      params: concrete or abstract parameters.

    Returns:
      One spec or None a leaf.

    Raises:
      ValueError: as `Rules.assign`, and for a leaf that cannot take an explicit spec.
    """
    specs = []
    for path, leaf, rule, value in as_rules(structure).assign(params):
        try:
            if hasattr(value, "check"):
                value.check(np.shape(leaf))
        except ValueError as error:
            if rule is not None:
                raise ValueError(
                    f"rules: pattern {rule!r} gives {value!r} to {path!r} of shape "
                    f"{np.shape(leaf)}, which cannot take it: {error}"
                ) from error
            value = None
        specs.append(value)
    return specs


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


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _nearest(pattern: str, paths: list[str]) -> list[str]:
    """The three paths most like a pattern, as wholes or by one of their components."""
    words = [pattern, *re.findall(r"\w+", pattern)]

    def likeness(path: str) -> float:
        parts = (path, *path.split("/"))
        return max(difflib.SequenceMatcher(None, w, p).ratio() for w in words for p in parts)

    return heapq.nlargest(3, paths, key=likeness)
