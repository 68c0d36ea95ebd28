"""GaLore with Adafactor: its averages inside, and its rate, which parameters decide."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_files import Golden, Settings
from replays.galore import YES_OR_NO, bases
from replays.low_rank import published
from replays.running import assert_run, by_name, find, held, rate

import optax_structured as oxs
from optax_structured.trees.paths import state_key


def adafactor(golden: Golden) -> None:
    h = golden.settings()
    specs = published(golden, h)
    check_axes(golden, set(specs))
    tiny, floor = h["eps"]
    inner = [
        optax.scale_by_factored_rms(
            decay_rate=-h["decay_rate"],
            min_dim_size_to_factor=1,
            epsilon=tiny,
            decay_rate_fn=decay_in_float64,
        ),
        optax.clip_by_block_rms(h["clip_threshold"]),
        times_rates(),
    ]
    if "beta1" in h:
        inner.append(optax.ema(h["beta1"], debias=False))  # of whole steps
    projection = oxs.low_rank_projection(
        optax.chain(*inner), by_name(specs), scale=h.get("scale", 1.0)
    )
    floor = floor if h.one_of("scale_parameter", YES_OR_NO) else None
    tx = with_rates(projection, steps(golden, h), floor, h.get("weight_decay", 0.0))
    h.check_all_read()

    def look(state: Any, current: Any) -> dict[str, dict[str, Any]]:
        factors = find(state, optax.FactoredState)
        by_rank, by_length = held(golden, factors.v_row), held(golden, factors.v_col)
        seen: dict[str, dict[str, Any]] = {"v_row": {}, "v_col": {}}
        for leaf, spec in specs.items():
            sides = by_rank[leaf], by_length[leaf]
            left = spec.axes.compressed_side(golden.start[leaf].shape) == "rows"
            seen["v_row"][leaf], seen["v_col"][leaf] = sides if left else sides[::-1]
        return bases(golden, specs, state) | seen

    assert_run(golden, tx, look)


def steps(golden: Golden, h: Settings) -> Any:
    """The rate before parameters are looked at, a function of the steps done."""
    warming = h.one_of("warmup_init", YES_OR_NO, default=False)
    if not h.one_of("relative_step", YES_OR_NO):
        given = rate(golden, h)
        return given if callable(given) else lambda count: given

    def relative(count: jax.Array) -> jax.Array:
        s = count + 1.0
        return jnp.minimum(1e-6 * s if warming else 1e-2, 1 / jnp.sqrt(s))

    return relative


def with_rates(
    projection: optax.GradientTransformationExtraArgs, step: Any, floor: float | None, decay: float
) -> optax.GradientTransformation:
    """Descent, the inner transformation of which gets the rate of each leaf as `rates`."""

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), projection.init(params)

    def update(updates: Any, state: Any, params: Any) -> Any:
        count, inner = state
        root = lambda p: 1.0 if floor is None else jnp.maximum(floor, jnp.sqrt(jnp.mean(p**2)))  # noqa: E731
        rates = jax.tree.map(lambda p: step(count) * root(p), params)
        by_key = {state_key(leaf): r for leaf, r in rates.items()}
        moves, inner = projection.update(updates, inner, rates=by_key)
        descents = jax.tree.map(lambda u, r, p: -u - decay * r * p, moves, rates, params)
        return descents, (count + 1, inner)

    return optax.GradientTransformation(init, update)


def times_rates() -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, *, rates: Any, **_: Any) -> Any:
        return jax.tree.map(lambda u, r: r * u, updates, rates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def decay_in_float64(step: jax.Array, power: float) -> jax.Array:
    """Optax's own, from a float32 counter, is 1.6e-9 away from the published trajectory."""
    return 1 - (step + 1.0) ** -power


def check_axes(golden: Golden, projected: set[str]) -> None:
    """Adafactor as published factors the last two axes, and optax the two longest."""
    for leaf, x in golden.start.items():
        if x.ndim > 2 and leaf not in projected and set(np.argsort(x.shape)[:-2]) & {-2, -1}:
            raise ValueError(f"{golden.name}: optax factors {leaf!r} of shape {x.shape} otherwise")
