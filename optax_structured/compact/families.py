"""Primitives by what they do to axes, and the arithmetic of axes that all passes share."""

from typing import NamedTuple

import numpy as np

from optax_structured.compact.program import Equation
from optax_structured.compact.sets import Sets, Shape, block, everything, hull

# Each entry of the result is made from the entries in its place; axes of length 1 are repeated.
ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne
    neg nextafter not or population_count pow real reduce_precision rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient
    sub tan tanh xor""".split()
)
# Each entry of the result is one entry of an operand, or none.
MOVES = frozenset(
    """broadcast_in_dim concatenate pad reshape rev slice split squeeze stack tile transpose
    unstack""".split()
)
REDUCTIONS = frozenset(
    """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_xor""".split()
)
# Along some axes everything mixes, along the others every slice goes its own way.
ALONG = frozenset(
    """cumlogsumexp cummax cummin cumprod cumsum dynamic_slice reduce_window reduce_window_max
    reduce_window_min reduce_window_sum sort top_k""".split()
)


def mixed_axes(equation: Equation, shape: Shape, out: Shape) -> frozenset[int]:
    """The axes along which an operation of ALONG mixes."""
    params, name = equation.params, equation.name
    if name.startswith("cum"):
        return frozenset({params["axis"]})
    if name == "sort":
        return frozenset({params["dimension"]})
    if name == "top_k":
        return frozenset({params.get("axis", len(shape) - 1) % len(shape)})
    if name.startswith("reduce_window"):
        zero = ((1, 1, (0, 0), 1, 1),)
        keys = "window_dimensions window_strides padding base_dilation window_dilation".split()
        settings = zip(*(params[key] for key in keys), strict=True)
        return frozenset(
            k for k, s in enumerate(settings) if (s[0], s[1], tuple(s[2]), s[3], s[4]) not in zero
        )
    return frozenset(k for k, (n, m) in enumerate(zip(shape, out, strict=True)) if n != m)


class Dot(NamedTuple):
    """A dot_general as einsum writes it: letters of both operands and of the result."""

    left: str
    right: str
    out: str
    summed: str


def dot(equation: Equation, left: Shape, right: Shape) -> Dot:
    (lc, rc), (lb, rb) = equation.params["dimension_numbers"]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first = [next(letters) for _ in left]
    second = ["" for _ in right]
    for i, j in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        second[j] = first[i]
    second = [x or next(letters) for x in second]
    free = [x for k, x in enumerate(first) if k not in (*lc, *lb)]
    others = [x for k, x in enumerate(second) if k not in (*rc, *rb)]
    out = [*(first[i] for i in lb), *free, *others]
    return Dot("".join(first), "".join(second), "".join(out), "".join(first[i] for i in lc))


def product(left: str, right: str, out: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where any product of two masks is."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    return np.einsum(f"{left},{right}->{out}", a, b, optimize=True) > 0


class Grouped(NamedTuple):
    """Features of a convolution in groups: (batch, groups, per group) in, (groups, out, in)."""

    batch: int
    feature: int
    kernel_out: int
    kernel_in: int
    out_batch: int
    out_feature: int
    groups: int

    def inputs(self, mask: np.ndarray) -> np.ndarray:
        """(batch, groups, inputs per group): any over the window."""
        other = tuple(k for k in range(mask.ndim) if k not in (self.batch, self.feature))
        found = np.asarray(mask.any(axis=other))
        found = found if self.batch < self.feature else found.T
        return found.reshape(len(found), self.groups, -1)

    def kernel(self, mask: np.ndarray) -> np.ndarray:
        """(groups, outputs per group, inputs per group)."""
        other = tuple(k for k in range(mask.ndim) if k not in (self.kernel_out, self.kernel_in))
        found = np.asarray(mask.any(axis=other))
        found = found if self.kernel_out < self.kernel_in else found.T
        return found.reshape(self.groups, -1, found.shape[1])

    def outputs(self, mask: np.ndarray) -> np.ndarray:
        """(batch, groups, outputs per group)."""
        other = tuple(k for k in range(mask.ndim) if k not in (self.out_batch, self.out_feature))
        found = np.asarray(mask.any(axis=other))
        found = found if self.out_batch < self.out_feature else found.T
        return found.reshape(len(found), self.groups, -1)


def spread(features: np.ndarray, first: int, second: int, shape: Shape) -> np.ndarray:
    """A matrix of two axes, repeated over the others."""
    features = features if first < second else features.T
    view = [n if k in (first, second) else 1 for k, n in enumerate(shape)]
    return np.broadcast_to(features.reshape(view), shape)


def convolution(equation: Equation) -> Grouped | None:
    """The features of a convolution; None where batches are grouped."""
    params = equation.params
    if params["batch_group_count"] != 1:
        return None
    d = params["dimension_numbers"]
    (n, c, *_), (o, i, *_), (on, oc, *_) = d.lhs_spec, d.rhs_spec, d.out_spec
    return Grouped(n, c, o, i, on, oc, params["feature_group_count"])


class Gathered(NamedTuple):
    """Axes of the operand of a gather that pass through whole, with their axes of the result."""

    axes: tuple[int, ...]
    out: tuple[int, ...]


def gather(equation: Equation, shape: Shape) -> Gathered:
    params = equation.params
    d, lengths = params["dimension_numbers"], params["slice_sizes"]
    gone = {*d.collapsed_slice_dims, *getattr(d, "operand_batching_dims", ())}
    offsets = dict(zip((k for k in range(len(shape)) if k not in gone), d.offset_dims, strict=True))
    whole = [
        k for k in offsets if lengths[k] == shape[k] and k not in d.start_index_map and shape[k]
    ]
    return Gathered(tuple(whole), tuple(offsets[k] for k in whole))


def factors(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Axes of a reshape that belong together: each group has one number of entries on both sides.

    Axes of length 1 belong to no group.
    """
    ins = [k for k, n in enumerate(before) if n != 1]
    outs = [k for k, n in enumerate(after) if n != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while ins or outs:
        a, b = ([ins.pop(0)] if ins else []), ([outs.pop(0)] if outs else [])
        while (m := _count(before, a)) != (n := _count(after, b)):
            if (m < n and ins) or not outs:
                a.append(ins.pop(0))
            else:
                b.append(outs.pop(0))
        groups.append((a, b))
    return groups


def _count(shape: Shape, axes: list[int]) -> int:
    return int(np.prod([shape[k] for k in axes], dtype=int))


def through_reshape(sets: Sets, after: Shape, before: Shape) -> tuple[Sets, Sets]:
    """The smallest blocks of both sides that hold a block of the result and are one another."""
    if 0 in after:
        return everything(before), everything(after)
    ins = [np.arange(n) for n in before]
    outs = [s if n != 1 else np.arange(1) for s, n in zip(sets, after, strict=True)]
    for a, b in factors(before, after):
        small, large = tuple(before[k] for k in a), tuple(after[k] for k in b)
        there = tuple(outs[k] for k in b)
        while True:
            here = hull(block(large, there).reshape(small))
            back = hull(block(small, here).reshape(large))
            assert here is not None and back is not None
            if sum(map(len, back)) == sum(map(len, there)):
                break
            there = back
        for k, s in zip(a, here, strict=True):
            ins[k] = s
        for k, s in zip(b, there, strict=True):
            outs[k] = s
    return tuple(ins), tuple(outs)


def repeated(sets: Sets, shape: Shape) -> Sets:
    """The sets of an operand whose axes of length 1 are repeated, and which may be a scalar."""
    if not shape:
        return ()
    return tuple(s if n != 1 else np.arange(1) for s, n in zip(sets, shape, strict=True))


def unrepeated(mask: np.ndarray, shape: Shape) -> np.ndarray:
    """Any over the axes along which an operand was repeated."""
    if not shape:
        return np.asarray(mask.any())
    axes = tuple(k for k, (n, m) in enumerate(zip(shape, mask.shape, strict=True)) if n != m)
    return np.asarray(mask.any(axis=axes, keepdims=True))
