"""Adam with its moments in 8 bits: alone or inside GaLore, with bases and weights in codes or not.

An entry between two codes falls to either side with the last bit of a product or of an SVD, and
all that follows with it. So each step starts from the recorded codes, bases and parameters and is
judged by itself; and bases, which depend on gradients alone, are fitted and judged apart, in
float64.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerances
from golden_files import Golden, Settings
from replays.low_rank import SIDES, Specs, of_rank, projected, signs_are_fixed, turned
from replays.running import by_name, largest, path, rate
from tolerances import FLIPPED_CODES, GOLDEN_8BIT_RUN, GOLDEN_BY_DTYPE

import optax_structured as oxs
from optax_structured.quantization import AffineCode, DynamicCode
from optax_structured.quantization import rounding as at_random
from optax_structured.quantization.blocks import in_blocks
from optax_structured.quantization.packing import pack
from optax_structured.trees.paths import state_key
from optax_structured.weights import on_grid

NEVER = 2**30
MOMENTS = ("mu", "nu")


@dataclasses.dataclass(frozen=True)
class Run:
    """A file, and what its settings stand for."""

    golden: Golden
    rate: Any
    specs: Specs  # of the projected leaves; never fitted again
    refits: dict[str, Any]  # their period and rule, as published
    grid: oxs.Affine | None  # of the projected weights
    tx: optax.GradientTransformation

    def key(self, leaf: str) -> str:
        """Of a leaf in the state of its moments."""
        return state_key(leaf) if self.specs else leaf


def eight_bits(golden: Golden) -> None:
    run = read(golden)
    assert_steps(run)
    if run.specs:
        assert_bases(run)


def read(golden: Golden) -> Run:
    h = golden.settings()
    specs, refits = low_rank(golden, h)
    b1, b2 = h["betas"]
    adam = oxs.quantized(
        oxs.transforms.debiased_adam(b1, b2, h["eps"]),
        oxs.Dynamic(block=h.get("block", 256), published=True),
        min_size=h["min_8bit_size"],
    )
    if specs:
        adam = as_published(adam, golden, specs)
        adam = oxs.low_rank_projection(adam, by_name(specs), scale=h["scale"])
    learning_rate, decay = rate(golden, h), h.get("weight_decay", 0.0)
    parts = [
        adam,
        optax.scale_by_learning_rate(learning_rate),
        oxs.transforms.decay_updated_weights(learning_rate, decay),
    ]
    grid = None
    if h.get("weight_quant"):
        grid = oxs.Affine(h["weight_bits"], h["weight_group"], published=True)
        table = by_name(dict.fromkeys(specs, grid))
        parts.append(oxs.weights.keep_on_grid(table, stochastic=h["stochastic_round"]))
    else:
        h.pass_over("weight_quant", "weight_bits", "weight_group", "stochastic_round")
    h.check_all_read()
    return Run(golden, learning_rate, specs, refits, grid, optax.chain(*parts))


def low_rank(golden: Golden, h: Settings) -> tuple[Specs, dict[str, Any]]:
    """Which leaves are projected, and when they are fitted again."""
    leaves = projected(golden, wanted=lambda shape: False)
    if not leaves:
        return {}, {}
    parts: dict[str, Any] = {"projector": oxs.SVD(), "transport": oxs.Keep(), "period": NEVER}
    parts["axes"] = oxs.Axes(side=h.one_of("proj_type", SIDES, default="std"))
    refits = {"period": h["update_proj_gap"]}
    if "proj_bits" in h:
        parts["codec"] = oxs.Affine(h["proj_bits"], h["proj_group"], published=True)
        refits["refresh"] = oxs.Lazy(h["cos_threshold"], h["gamma_proj"], h["queue_size"])
    return of_rank(h, leaves, **parts), refits


def as_published(inner: Any, golden: Golden, specs: Specs) -> optax.GradientTransformation:
    """Low-rank leaves as the file has them, with the long axis first: it decides their blocks."""
    sides = {x: spec.axes.compressed_side(golden.start[x].shape) for x, spec in specs.items()}
    keys = {state_key(leaf) for leaf, side in sides.items() if side == "cols"}

    def turn(tree: dict[str, Any]) -> dict[str, Any]:
        return {key: x.T if key in keys else x for key, x in tree.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(turn(updates), state)
        return turn(updates), state

    return optax.GradientTransformation(lambda params: inner.init(turn(params)), update)


# Steps


def assert_steps(run: Run) -> None:
    for t, current, adam in steps(run):
        for leaf, x in run.golden.steps("params")[t].items():
            assert_weights(run, t, leaf, np.asarray(current[leaf]), x)
        for field in MOMENTS:
            for leaf, codes in run.golden.leaves(f"state/code_{field}").items():
                assert_codes(run, t, field, leaf, getattr(adam, field)[run.key(leaf)], codes[t])


def steps(run: Run) -> Iterator[tuple[int, Any, Any]]:
    """The parameters and the state of Adam after each step, from what was recorded before it."""
    golden = run.golden
    recorded = golden.leaves("state/uniform")
    tape: dict[str, Any] = {}

    def one(grads: Any, state: Any, params: Any, uniform: Any) -> tuple[Any, Any]:
        tape.update(uniform)
        updates, state = run.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_grid, "key_of", lambda path, _: path)
        patch.setattr(at_random, "draws", lambda path, x: in_blocks(tape[path], x.shape[-1]))
        step = jax.jit(one)
        before = {leaf: jnp.asarray(x) for leaf, x in golden.start.items()}
        state = run.tx.init(before)
        for t, grads in enumerate(golden.steps("grads")):
            uniform = {path(leaf): jnp.asarray(x[t]) for leaf, x in recorded.items()}
            state = (as_recorded(run, state[0], t), *state[1:])
            current, state = step(grads, state, before, uniform)
            adam = state[0].inner if run.specs else state[0]
            yield t, current, adam.inner_state.inner
            before = {leaf: jnp.asarray(x) for leaf, x in golden.steps("params")[t].items()}


def as_recorded(run: Run, state: Any, t: int) -> Any:
    """The state before step t: with the moments that were recorded before, and the basis of it."""
    if not run.specs:
        return with_codes(run, state, t)
    refresh = {
        key: there._replace(missing=jnp.zeros_like(there.missing))
        for key, there in state.refresh.items()
    }
    bases = {state_key(leaf): recorded_basis(run, leaf, t) for leaf in run.specs}
    count = jnp.full_like(state.count, t + 1)  # after the first fits
    inner = with_codes(run, state.inner, t)
    return state._replace(count=count, bases=bases, refresh=refresh, inner=inner)


def with_codes(run: Run, state: Any, t: int) -> Any:
    adam = state.inner_state.inner
    for field in MOMENTS if t else ():
        moments = dict(getattr(adam, field))
        scales = run.golden.leaves(f"state/absmax_{field}")
        for leaf, codes in run.golden.leaves(f"state/code_{field}").items():
            old = moments[run.key(leaf)]
            assert isinstance(old, DynamicCode), f"{leaf} is not in codes"
            absmax = jnp.asarray(scales[leaf][t - 1]).reshape(old.absmax.shape)
            moments[run.key(leaf)] = DynamicCode(jnp.asarray(codes[t - 1]), absmax)
        adam = adam._replace(**{field: moments})
    return state._replace(inner_state=state.inner_state._replace(inner=adam))


def recorded_basis(run: Run, leaf: str, t: int) -> Any:
    """Of this step, as a state holds it."""
    golden, codec = run.golden, run.specs[leaf].codec
    if codec is None:
        basis = jnp.asarray(golden.leaves("state/projector")[leaf][t])
        side = run.specs[leaf].axes.compressed_side(golden.start[leaf].shape)
        return basis.T if side == "rows" else basis
    codes, scale, zero = (golden.leaves(f"state/proj_{x}")[leaf][t] for x in AFFINE)
    made = jax.eval_shape(codec.encode, codes)
    codes = jnp.asarray(codes, jnp.uint8)
    codes = pack(in_blocks(codes, codec.group)) if codec.bits == 4 else codes
    zero = jnp.asarray(zero, jnp.uint8).reshape(made.zero.shape)
    return AffineCode(codes, jnp.asarray(scale).reshape(made.scale.shape), zero)


AFFINE = ("code", "scale", "zero")


def assert_weights(run: Run, t: int, leaf: str, got: np.ndarray, x: np.ndarray) -> None:
    where = f"{run.golden.name}: params/{leaf} after step {t + 1}"
    off = np.abs(got - x)
    if x.dtype == np.float64:
        assert off.max() <= GOLDEN_BY_DTYPE["float64"] * largest(x), where
        return
    flipped = off > GOLDEN_8BIT_RUN * (run.rate(t) if callable(run.rate) else run.rate)
    may_flip = run.grid is not None and leaf in run.specs  # from one level to the next
    assert np.mean(flipped) <= (FLIPPED_CODES if may_flip else 0), where
    if flipped.any():
        assert off.max() <= np.ptp(x) / (2**run.grid.bits - 1), where


def assert_codes(run: Run, t: int, field: str, leaf: str, got: Any, codes: np.ndarray) -> None:
    where = f"{run.golden.name}: {field}/{leaf} after step {t + 1}"
    apart = np.abs(np.asarray(got.codes, int) - codes)
    assert apart.max() <= 1 and np.mean(apart > 0) <= FLIPPED_CODES, where
    expected = run.golden.leaves(f"state/absmax_{field}")[leaf][t].ravel()
    np.testing.assert_allclose(got.absmax.ravel(), expected, rtol=GOLDEN_8BIT_RUN, err_msg=where)


# Bases


def assert_bases(run: Run) -> None:
    """Each fit, and when there is another one, from the gradients alone."""
    golden = run.golden
    specs = {leaf: dataclasses.replace(spec, **run.refits) for leaf, spec in run.specs.items()}
    tx = oxs.low_rank_projection(optax.identity(), by_name(specs))
    wide = {leaf: jnp.asarray(x, jnp.float64) for leaf, x in golden.start.items()}
    state = tx.init(wide)
    step = jax.jit(lambda grads, state: tx.update(grads, state, wide)[1])
    for t, grads in enumerate(golden.steps("grads")):
        state = step({leaf: jnp.asarray(x, jnp.float64) for leaf, x in grads.items()}, state)
        for leaf, spec in specs.items():
            where = f"{golden.name}: basis of {leaf} after step {t + 1}"
            basis = state.bases[state_key(leaf)]
            if spec.codec is None:
                assert_vectors(golden, specs, leaf, t, basis, where)
            else:
                assert_basis_codes(golden, spec.codec, leaf, t, basis, where)
                assert_rule(golden, spec, leaf, t, state.refresh[state_key(leaf)].rule, where)


def assert_vectors(golden: Golden, specs: Specs, leaf: str, t: int, basis: Any, where: str) -> None:
    expected = golden.leaves("state/projector")[leaf][t]
    got = np.asarray(turned(golden, specs, {state_key(leaf): basis}, "rows")[leaf])
    if not signs_are_fixed(golden, specs[leaf].axes):
        axis = 0 if specs[leaf].axes.compressed_side(golden.start[leaf].shape) == "rows" else 1
        got = got * np.sign(np.sum(got * expected, axis, keepdims=True))
    atol = GOLDEN_BY_DTYPE[expected.dtype.name]
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=where)


def assert_basis_codes(
    golden: Golden, codec: oxs.Affine, leaf: str, t: int, basis: Any, where: str
) -> None:
    codes, scale, zero = (golden.leaves(f"state/proj_{x}")[leaf][t] for x in AFFINE)
    tolerance = GOLDEN_BY_DTYPE[scale.dtype.name]
    groups = codes.reshape(-1, codec.group)
    scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
    np.testing.assert_array_equal(basis.zero.ravel(), zero.ravel(), err_msg=where)
    np.testing.assert_allclose(basis.scale.ravel(), scale.ravel(), rtol=tolerance, err_msg=where)
    steps = np.asarray(codec.decode(basis, codes.shape)).reshape(groups.shape) / scale + zero
    apart = np.abs(np.round(steps) - groups)
    share = FLIPPED_CODES if scale.dtype == np.float32 else 0
    assert apart.max() <= 1 and np.mean(apart > 0) <= share, where


def assert_rule(golden: Golden, spec: Any, leaf: str, t: int, rule: Any, where: str) -> None:
    """Gaps and similarities of `Lazy`."""
    assert int(rule.gap) == golden.leaves("state/gap_after")[leaf][t], where
    fits = int(golden.leaves("state/svd_count")[leaf][t])
    if fits > 1:  # the first is compared with nothing
        assert int(rule.seen) == min(fits - 1, spec.refresh.memory), where
        cosine = abs(float(golden.leaves("state/last_cos")[leaf][t]))
        assert abs(float(rule.similarities[-1]) - cosine) <= tolerances.rounding("float32"), where
