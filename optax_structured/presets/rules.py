"""Tables of rules for the layers of a model, of flax, equinox or haiku."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from optax_structured.low_rank.spec import LowRank
from optax_structured.presets import equinox, haiku, linen, nnx
from optax_structured.presets.kernels import Kernel, placed
from optax_structured.regularizers.base import Regularizer
from optax_structured.trees import Axes, Rules, named_leaves
from optax_structured.trees.checks import check_choice
from optax_structured.trees.tables import kinds

By = Literal["inputs", "outputs", "heads"]


def kernels(model: Any, *inputs: Any, **named: Any) -> tuple[Kernel, ...]:
    """The kernels of the layers of a model, and what their axes are.

    Layers are told by their classes, not by names or shapes, so that no layout is taken for
    another: linear, general and einsum layers, attention, convolutions, recurrent cells, and what
    subclasses them. Axes along which layers are stacked, by a scan or vmap, are batch axes.

    Args:
      model: an nnx or equinox module, a linen module, or what `hk.transform` returns.
      inputs: of linen and haiku models, example inputs, concrete or abstract; nothing is computed.
      named: more arguments of their `init`, by name.

    Returns:
      One `Kernel` for each leaf of a known layer, in the order of the parameters.

    Raises:
      TypeError: something else, such as bare parameters, which do not say what their axes are.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> x = jnp.ones((1, 5, 6))
      >>> for kernel in kernels(nn.MultiHeadDotProductAttention(num_heads=2), x)[:2]:
      ...     print(kernel.path, kernel.shape, kernel.inputs, kernel.outputs)
      key/kernel (6, 2, 3) (0,) (1, 2)
      out/kernel (2, 3, 6) (0, 1) (2,)
    """
    return _read(model, inputs, named)[1]


def axes(model: Any, *inputs: Any, plain: str | None = None, **named: Any) -> Rules:
    """The matrix view of every linear kernel, rows for outputs; None for everything else.

    For what takes `rules` of `Axes`: `welore_plan`, `weight_normalized`.

    Args:
      model, inputs, named: as in `kernels`.
      plain: pattern of the kernels to leave out, such as "head".

    Returns:
      `rules` of `Axes`.

    Raises:
      TypeError, ValueError: as `kernels`; no linear kernel, or a pattern that matches none.

    Example: see `low_rank`.
    """
    return _rules(model, inputs, named, plain, lambda k: _axes(k) if k.linear else None)


def low_rank(
    model: Any, spec: LowRank, *inputs: Any, plain: str | None = None, **named: Any
) -> Rules:
    """All linear kernels of a model in low rank, each as the one matrix that it is.

    Of attention, general and einsum layers all inputs are one side of the matrix and all outputs
    the other. Rows are outputs, as the papers write weights, so that the sides of `Axes` mean the
    same in every library. Convolutions, embeddings, norms and biases stay plain, and so do kernels
    for which the projection would take more state than plain Adam.

    Args:
      model, inputs, named: as in `kernels`.
      spec: the `LowRank` of all of them; of its axes only `side` applies.
      plain: pattern of the kernels that stay plain, such as "head"; published runs leave the head.

    Returns:
      `rules` of `LowRank`, for `galore(1e-2, rules)` and the like; `.table(params)` prints them.

    Raises:
      TypeError, ValueError: as `axes`; a spec with row and column axes of its own.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structured as oxs
      >>> from flax import linen as nn
      >>> model = nn.MultiHeadDotProductAttention(num_heads=8)
      >>> x = jnp.ones((1, 5, 64))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> low_rank = oxs.presets.low_rank(model, oxs.LowRank(16), x)
      >>> optimizer = oxs.galore(1e-2, low_rank)
      >>> jax.tree.map(jnp.shape, optimizer.init(params).inner_state[0].bases)["query:kernel"]
      (16, 64)
    """
    if not isinstance(spec, LowRank):
        raise TypeError(
            f"presets.low_rank takes a LowRank, such as LowRank(rank=128), got {spec!r}"
        )
    if dataclasses.replace(spec.axes, side="small") != Axes():
        raise ValueError(
            f"presets.low_rank reads the axes off the model, but the LowRank has {spec.axes!r}: "
            "give Axes(side=...) only"
        )

    def value(kernel: Kernel) -> LowRank | None:
        if not kernel.linear:
            return None
        return _taken(dataclasses.replace(spec, axes=_axes(kernel, spec.axes.side)), kernel)

    return _rules(model, inputs, named, plain, value)


def groups(
    model: Any,
    penalty: Callable[..., Regularizer],
    *inputs: Any,
    by: By = "inputs",
    plain: str | None = None,
    **named: Any,
) -> Rules:
    """A penalty on the groups of every kernel: one group an input, an output or a head.

    "inputs" make a layer ignore a feature, so that whatever produces it can be removed once every
    reader ignores it; "outputs" are units and filters; "heads" are those of attention kernels,
    where they are an axis (linen and nnx), and other layers stay plain. A depthwise convolution
    with one filter an input has its filters for inputs; other convolutions in groups have no axis
    of inputs and stay plain.

    Args:
      model, inputs, named: as in `kernels`.
      penalty: makes the regularizer, `penalty(group_axis, batch_axis=...)`: a class such as
        `GroupLasso`, or `functools.partial(GroupMCP, gamma=3.0)`.
      by: what a group is.
      plain: pattern of the kernels that stay plain.

    Returns:
      `rules` of regularizers, for `ramda(1e-2, rules, strength)` and the like.

    Raises:
      TypeError, ValueError: as `kernels`; no kernel with such groups, or a pattern that matches
        none.

    Example:
      >>> import jax, equinox as eqx, optax_structured as oxs
      >>> model = eqx.nn.MLP(4, 3, width_size=5, depth=1, key=jax.random.key(0))
      >>> structure = oxs.presets.groups(model, oxs.GroupLasso)
      >>> params = eqx.filter(model, eqx.is_inexact_array)
      >>> optimizer = oxs.ramda(1e-2, structure, strength=1e-3)
      >>> state = optimizer.init(params)
      >>> structure.pairs[0][1].support(model.layers[0].weight).shape  # (out, in) = (5, 4)
      (4,)
    """
    check_choice("by", by, By)

    if not callable(penalty):
        raise TypeError(
            "presets.groups reads the axes off the model: give what makes a regularizer, the class "
            f"{type(penalty).__name__}, not {penalty!r}"
        )

    def value(kernel: Kernel) -> Regularizer | None:
        axes = _grouped_axes(kernel, by)
        if axes is None:
            return None
        group_axis = axes[0] if len(axes) == 1 else axes
        return _taken(penalty(group_axis, batch_axis=kernel.batch), kernel)

    return _rules(model, inputs, named, plain, value)


def _taken(value: Any, kernel: Kernel) -> Any:
    """The value, or None where the kernel cannot take it."""
    try:
        value.check(kernel.shape)
    except ValueError:
        return None
    return value


def _axes(kernel: Kernel, side: Any = "small") -> Axes:
    rows, cols = (x[0] if len(x) == 1 else x for x in (kernel.outputs, kernel.inputs))
    return Axes(rows, cols, side)


def _grouped_axes(kernel: Kernel, by: By) -> tuple[int, ...] | None:
    """The axes that number the groups; None where no axis does."""
    if by == "inputs" and kernel.groups > 1:
        (filters,) = kernel.outputs
        return kernel.outputs if kernel.shape[filters] == kernel.groups else None
    chosen: tuple[int, ...] = getattr(kernel, by)
    return chosen or None


def _rules(
    model: Any,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    plain: str | None,
    value: Callable[[Kernel], Any],
) -> Rules:
    params, found = _read(model, inputs, named)
    if plain is not None and not any(re.search(plain, kernel.path) for kernel in found):
        raise ValueError(
            f"presets: plain={plain!r} matches none of the kernels "
            f"{', '.join(kernel.path for kernel in found)}"
        )
    chosen = {
        kernel: None if plain is not None and re.search(plain, kernel.path) else value(kernel)
        for kernel in found
    }
    if not any(chosen.values()):
        raise ValueError(
            f"presets: {type(model).__name__} has no kernel that could take this; its kernels are "
            f"{', '.join(f'{k.path} {k.shape}' for k in found) or 'of no layer that is known'}"
        )
    paths = [path for path, _ in named_leaves(params)]
    pairs = (
        (_pattern([kernel.path for kernel in alike], paths), chosen[alike[0]])
        for _, alike in kinds(found, lambda kernel: (kernel.shape, chosen[kernel]))
    )
    return Rules(tuple(pairs), default=None)


def _pattern(chosen: Sequence[str], paths: Sequence[str]) -> str:
    """A pattern for the chosen paths and no other: with any number, if that is enough."""
    short = re.sub(r"\d+", r"\\d+", "^" + re.escape(chosen[0]) + "$")
    if len(chosen) > 1 and [x for x in paths if re.search(short, x)] == list(chosen):
        return short
    listed = "|".join(map(re.escape, chosen))
    return f"^(?:{listed})$" if len(chosen) > 1 else f"^{listed}$"


def _read(
    model: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, tuple[Kernel, ...]]:
    """The parameters of a model and their kernels."""
    library = _library(model)
    if library in (linen, haiku):
        if not inputs and not named:
            raise TypeError(
                f"presets: {type(model).__name__} makes its layers when it is called; give example "
                "inputs too, arrays or jax.ShapeDtypeStruct"
            )
        params, cores = library.found(model, inputs, named)
        return params, placed(cores.items(), params)
    params = library.params_of(model)
    return params, placed(library.cores(model), params)


def _library(model: Any) -> Any:
    """The module here that reads models of this class; nothing is imported to find out."""
    known = {"flax.linen": linen, "flax.nnx": nnx, "equinox": equinox, "haiku": haiku}
    for cls in type(model).__mro__:
        for name, library in known.items():
            if f"{cls.__module__}.".startswith(f"{name}."):
                return library
    raise TypeError(
        "presets read the layers off a model: an nnx or equinox module, or a linen module or "
        f"hk.transform(...) with example inputs; got {type(model).__name__}. Names and shapes of "
        "parameters alone do not say which axes are inputs; write rules by hand for them"
    )
