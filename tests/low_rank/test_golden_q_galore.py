"""The published trajectories of Q-GaLore and of GaLore with 8-bit states, past every refit."""

import golden_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import FLIPPED_CODES, GOLDEN, GOLDEN_8BIT_RUN, rounding

import optax_structured as oxs
from optax_structured.quantization import rounding as draws


def low_rank(h, **parts):
    """The files have fixed signs, moments that stay, and groups that do not contain 0."""
    if "proj_bits" in h:
        parts["codec"] = oxs.Affine(h["proj_bits"], h["proj_group"], published=True)
        parts["refresh"] = oxs.Lazy(h["cos_threshold"], h["gamma_proj"], h["queue_size"])
    return oxs.LowRank(h["rank"], h["update_proj_gap"], projector=oxs.SVD(), **parts)


def on_grid(h):
    codec = oxs.Affine(h["weight_bits"], h["weight_group"], published=True)
    return oxs.keep_on_grid(codec, stochastic=h["stochastic_round"])


def as_published(inner, names):
    """The low-rank leaves of these names with the long axis first, which decides their blocks."""

    def turned(tree):
        return {name: x.T if name in names else x for name, x in tree.items()}

    def update(updates, state, params=None):
        updates, state = inner.update(turned(updates), state)
        return turned(updates), state

    return optax.GradientTransformation(lambda params: inner.init(turned(params)), update)


def trajectory(tx, golden, monkeypatch):
    """Parameters and state after each step, on the draws of the file."""
    tape = {}
    monkeypatch.setattr(draws, "uniform", lambda key, x: tape[x.size].reshape(x.shape))
    current = jax.tree.map(jnp.asarray, golden.start)
    state = tx.init(current)

    @jax.jit
    def step(grads, state, current, uniform):
        tape.update({x.size: x for x in uniform.values()})
        updates, state = tx.update(grads, state, current)
        return optax.apply_updates(current, updates), state

    for t, grads in enumerate(golden.steps("grads")):
        uniform = {name: x[t] for name, x in golden.leaves("state/uniform").items()}
        current, state = step(grads, state, current, uniform)
        yield t, current, state


def assert_bases(golden, state, t, tolerance):
    """Codes, scales and zero points, gaps and similarities."""
    h = golden.hyperparameters
    codec = low_rank(h).codec
    stored = {key: golden.leaves(f"state/proj_{key}") for key in ("code", "scale", "zero")}
    for name in stored["code"]:
        basis = state.bases[name]
        codes, scale, zero = (stored[key][name][t] for key in ("code", "scale", "zero"))
        np.testing.assert_array_equal(basis.zero.ravel(), zero.ravel())
        np.testing.assert_allclose(basis.scale.ravel(), scale.ravel(), rtol=tolerance)
        steps = codec.decode(basis, codes.shape).reshape(len(zero), -1) / scale + zero
        np.testing.assert_array_equal(np.round(steps), codes.reshape(len(zero), -1))
        rule = state.refresh[name].rule
        assert int(rule.gap) == golden.leaves("state/gap_after")[name][t]
        # Of the last fit; the first is compared with nothing.
        if (fits := golden.leaves("state/svd_count")[name][t]) > 1:
            assert int(rule.seen) == min(fits - 1, h["queue_size"])
            cosine = abs(golden.leaves("state/last_cos")[name][t])
            assert abs(float(rule.similarities[-1]) - cosine) <= rounding("float32")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", ["int4proj-floatw", "int8proj-nearest", "int4proj-int8w-sr"])
def test_q_galore(case, monkeypatch):
    golden = golden_files.load(f"q_galore-{case}")
    h = golden.hyperparameters
    settings = {"scale": h["scale"], "eps": h["eps"], "weight_decay": h["weight_decay"]}
    settings |= dict(zip(("b1", "b2"), h["betas"], strict=True))
    tx = oxs.q_galore(h["lr"], low_rank(h), weights=None, **settings)
    tx = optax.chain(tx, on_grid(h) if h["weight_quant"] else optax.identity())
    for t, current, state in trajectory(tx, golden, monkeypatch):
        for name, expected in golden.steps("params")[t].items():
            scale = np.max(np.abs(expected))
            assert np.max(np.abs(current[name] - expected)) <= GOLDEN * scale
        assert_bases(golden, state[0][0], t, GOLDEN)


@pytest.mark.parametrize("case", ["galore-adamw8bit-std", "q_galore-8bitstate"])
def test_8bit_states(case, monkeypatch):
    golden = golden_files.load(case)
    h = golden.hyperparameters
    codec = oxs.Dynamic(block=h.get("block", 256), published=True)
    adam = oxs.debiased_adam(*h["betas"], h["eps"])
    adam = oxs.quantized(adam, codec, min_size=h["min_8bit_size"])
    tx = optax.chain(
        oxs.low_rank_projection(
            as_published(adam, ("tall", "square")), low_rank(h), scale=h["scale"]
        ),
        optax.scale_by_learning_rate(h["lr"]),
        oxs.decay_updated_weights(h["lr"], h["weight_decay"]),
        on_grid(h) if h.get("weight_quant") else optax.identity(),
    )
    for t, current, (state, *_) in trajectory(tx, golden, monkeypatch):
        for name, expected in golden.steps("params")[t].items():
            assert np.max(np.abs(current[name] - expected)) <= GOLDEN_8BIT_RUN * h["lr"]
        assert_bases(golden, state, t, GOLDEN_8BIT_RUN)
        for field in ("mu", "nu"):
            for name, expected in golden.leaves(f"state/code_{field}").items():
                codes = getattr(state.inner.inner, field)[name].codes
                off = np.abs(codes.astype(int) - expected[t])
                assert np.max(off) <= 1 and np.mean(off > 0) <= FLIPPED_CODES
