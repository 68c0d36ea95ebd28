"""Sketched updates: R g is sent instead of g, and R^T is applied on arrival."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_structured.states.clock import Clock, new_clock, tick
from optax_structured.trees.checks import check_choice, check_positive
from optax_structured.trees.precision import at_least_float32

Kind: TypeAlias = Literal["countsketch", "sparse", "ams", "gaussian", "srht"]


class Sketch(NamedTuple):
    """A linear map from d to b numbers, and its adjoint; both act on the last axis."""

    sketch: Callable[[jax.Array], jax.Array]  # (..., d) -> (..., b): R h
    desketch: Callable[[jax.Array], jax.Array]  # (..., b) -> (..., d): R^T z


def sketch_of(kind: Kind, tables: Mapping[str, ArrayLike], size: int, width: int) -> Sketch:
    r"""The sketch that random tables stand for.

    Args:
      kind: `"countsketch"`: R[bucket[i], i] = sign[i]. `"sparse"`: the same in each of several
        blocks of rows, over the root of their number. `"ams"`: sign / sqrt(b). `"gaussian"`:
        normal / sqrt(b). `"srht"`: rows of a Hadamard matrix times sign, over sqrt(b).
      tables: `bucket` and `sign` (d,); (blocks, d) of `"sparse"`, with buckets within the block;
        `sign` (b, d); `normal` (b, d); `sign` (D,) and `rows` (b,), for D the power of two from d.
      size: d.
      width: b.

    Returns:
      A `Sketch`.

    Example:
      >>> import jax.numpy as jnp
      >>> tables = {"bucket": jnp.array([0, 1, 0]), "sign": jnp.array([1.0, -1.0, -1.0])}
      >>> print(sketch_of("countsketch", tables, 3, 2).sketch(jnp.array([5.0, 7.0, 1.0])))
      [ 4. -7.]
    """
    check_choice("kind", kind, Kind)
    table = {name: jnp.asarray(tables[name]) for name in _TABLES[kind]}
    if kind in ("ams", "gaussian"):
        matrix = table[_TABLES[kind][0]] / width**0.5
        return Sketch(lambda h: h @ matrix.T.astype(h.dtype), lambda z: z @ matrix.astype(z.dtype))
    sign = table["sign"]
    if kind == "srht":
        rows, padded = table["rows"], len(sign)

        def sketch(h: jax.Array) -> jax.Array:
            h = jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, padded - size)])
            return _hadamard(h * sign.astype(h.dtype))[..., rows] / width**0.5

        def desketch(z: jax.Array) -> jax.Array:
            spread = jnp.zeros((*z.shape[:-1], padded), z.dtype).at[..., rows].add(z)
            return (_hadamard(spread) * sign.astype(z.dtype))[..., :size] / width**0.5

        return Sketch(sketch, desketch)
    blocks = sign.size // size
    first_row = width // blocks * jnp.arange(blocks)[:, None]
    bucket, sign = table["bucket"].reshape(blocks, size) + first_row, sign.reshape(blocks, size)
    weight = sign / blocks**0.5

    def scatter(h: jax.Array) -> jax.Array:
        parts = h[..., None, :] * weight.astype(h.dtype)
        return jnp.zeros((*h.shape[:-1], width), h.dtype).at[..., bucket].add(parts)

    return Sketch(scatter, lambda z: jnp.sum(z[..., bucket] * weight.astype(z.dtype), -2))


_TABLES = {
    "countsketch": ("bucket", "sign"),
    "sparse": ("bucket", "sign"),
    "ams": ("sign",),
    "gaussian": ("normal",),
    "srht": ("sign", "rows"),
}


def draw_sketch(
    key: jax.Array, size: int, width: int, kind: Kind = "countsketch", *, blocks: int = 4
) -> Sketch:
    r"""A random sketch with :math:`E[R^\top R] = I`.

    What arrives is unbiased, and :math:`E\|R^\top R h\|^2 = (1 + (d - 1)/b)\|h\|^2` for the
    count sketch, about that for the others.

    Args:
      key: the same on all machines; a fixed sketch only ever moves in b directions, so draw one
        for each round.
      size: d.
      width: b, at least 1.
      kind: `"countsketch"` is O(d), `"srht"` O(d log d), `"ams"` and `"gaussian"` O(bd).
      blocks: of `"sparse"`, a divisor of b.

    Returns:
      A `Sketch`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sketch, desketch = draw_sketch(jax.random.key(0), 1000, 100)
      >>> print(sketch(jnp.ones(1000)).shape, desketch(jnp.ones(100)).shape)
      (100,) (1000,)
    """
    if kind == "sparse" and width % blocks:
        raise ValueError(
            f"a sparse sketch of {blocks} blocks takes a multiple of that, got {width}"
        )
    where, how = jax.random.split(key)

    def signs(*shape: int) -> jax.Array:
        return jax.random.rademacher(how, shape, jnp.float32)

    tables: dict[str, ArrayLike]
    if kind == "gaussian":
        tables = {"normal": jax.random.normal(how, (width, size))}
    elif kind == "ams":
        tables = {"sign": signs(width, size)}
    elif kind == "srht":
        padded = 1 << max(size - 1, 0).bit_length()
        tables = {"sign": signs(padded), "rows": jax.random.randint(where, (width,), 0, padded)}
    else:
        shape = (blocks, size) if kind == "sparse" else (size,)
        rows = width // blocks if kind == "sparse" else width
        tables = {"bucket": jax.random.randint(where, shape, 0, rows), "sign": signs(*shape)}
    return sketch_of(kind, tables, size, width)


class SketchedUpdatesState(NamedTuple):
    """State of `sketched_updates`."""

    clock: Clock  # rounds since init: a new sketch in each


def sketched_updates(
    ratio: float,
    kind: Kind = "countsketch",
    *,
    seed: int = 0,
    axis_name: Any = None,
) -> optax.GradientTransformation:
    r"""Sends gradients through a channel of few numbers, :math:`g \leftarrow R^\top R g`.

    Put it first in a chain. Without `axis_name` it simulates the channel. With it, under
    `jax.shard_map`, only sketches are averaged over the devices,
    :math:`R^\top \operatorname{mean}(R g)`, which is the same as a sketch of the mean: each leaf
    costs `ratio` of its bytes.

    The noise of one round is d / b of the squared gradient: learning rates go down by about
    `ratio`, rounds go up by its inverse, so that all rounds together send no fewer bytes in the
    worst case. What is gained is smaller messages. Sketches hide nothing from who knows the seed.

    Args:
      ratio: b / d in (0, 1], 0.01 to 0.5, of each leaf.
      kind: see `draw_sketch`; `"countsketch"` or `"srht"`.
      seed: the same on all devices.
      axis_name: of the mesh axis (or axes) over which gradients are averaged.

    Returns:
      An element whose state is `SketchedUpdatesState`. There is no error feedback: a memory of
      what an unbiased sketch has lost grows without bound. Moments of Adam see the noise, and its
      second one is up to d / b too large.

    Raises:
      ValueError: a ratio outside (0, 1].

    Equals the average over `axis_name` in expectation.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(sketched_updates(0.25), optax.sgd(0.05))
      >>> w = jnp.ones(64)
      >>> state = optimizer.init(w)
      >>> for _ in range(200):
      ...     updates, state = optimizer.update(2 * w, state)
      ...     w = optax.apply_updates(w, updates)
      >>> print(bool(jnp.abs(w).max() < 1e-3))
      True

    References:
      Song et al., `Sketching for First Order Method: Efficient Algorithm for Low-Bandwidth Channel
      and Vulnerability <https://arxiv.org/abs/2210.08371>`_, 2023. No code was published.
    """
    check_positive("ratio", ratio)
    if ratio > 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio!r}")
    check_choice("kind", kind, Kind)

    def init(params: Any) -> SketchedUpdatesState:
        del params
        return SketchedUpdatesState(new_clock())

    def update(
        updates: Any, state: SketchedUpdatesState, params: Any = None
    ) -> tuple[Any, SketchedUpdatesState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        # Of the round and the leaf only: equal on all devices.
        round_key = jax.random.fold_in(jax.random.key(seed), state.clock.count)
        arrived = []
        for i, g in enumerate(leaves):
            if not g.size:
                arrived.append(g)
                continue
            width = max(1, round(ratio * g.size))
            blocks = max(b for b in (1, 2, 4) if width % b == 0)
            key = jax.random.fold_in(round_key, i)
            channel = draw_sketch(key, g.size, width, kind, blocks=blocks)
            sent = channel.sketch(at_least_float32(g).reshape(-1))
            if axis_name is not None:
                sent = jax.lax.pmean(sent, axis_name)
            arrived.append(channel.desketch(sent).reshape(g.shape).astype(g.dtype))
        return jax.tree.unflatten(structure, arrived), SketchedUpdatesState(tick(state.clock))

    return optax.GradientTransformation(init, update)


def _hadamard(x: jax.Array) -> jax.Array:
    """Times the +-1 Sylvester matrix, along the last axis, a power of two."""
    size = x.shape[-1]
    for level in range(int(np.log2(size))):
        pairs = x.reshape(*x.shape[:-1], -1, 2, 1 << level)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], -2).reshape(*x.shape[:-1], size)
    return x
