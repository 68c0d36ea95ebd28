"""Every public transformation of optax and optax.contrib with its state in codes.

Either the bytes fall and training follows, or a sentence says why the state keeps its precision.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from tolerances import rounding

import optax_structured as oxs
from optax_structured.states import arrays_of

# Of deprecated aliases and of keys that are not given.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{w}") for w in ("UserWarning", "DeprecationWarning")
]

ADAM = optax.adam(1e-2)
ARGUMENTS = {
    "adv_optimizer": optax.sgd(1e-2),
    "base_optimizer": ADAM,
    "clipping": 0.1,
    "decay": 0.9,
    "eta": 1e-4,
    "f": lambda updates, params: updates,
    "fast_optimizer": ADAM,
    "freeze_mask": False,
    "gamma": 0.55,
    "inner": ADAM,
    "l2_norm_clip": 1.0,
    "learning_rate": 1e-2,
    "mask": True,
    "max_backtracking_steps": 5,
    "max_consecutive_errors": 3,
    "max_delta": 1.0,
    "max_linesearch_steps": 5,
    "max_norm": 1.0,
    "measure": optax.tree.norm,
    "measure_name": "norm",
    "noise_multiplier": 0.1,
    "optimizer": ADAM,
    "param_labels": lambda params: jax.tree.map(lambda _: "all", params),
    "seed": 0,
    "should_transform_fn": lambda step: step >= 0,
    "slow_step_size": 0.5,
    "step_size": -1e-2,
    "step_size_fn": lambda count: -1e-2,
    "sync_period": 2,
    "threshold": 1.0,
    "transforms": {"all": ADAM},
    "tx": ADAM,
}
CALLS = {
    "chain": lambda: optax.chain(ADAM),
    "named_chain": lambda: optax.named_chain(("adam", ADAM)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-2),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(1e-2),
    "MultiSteps": lambda: optax.MultiSteps(ADAM, 2).gradient_transformation(),
    "rmsprop_centered": lambda: optax.rmsprop(1e-2, centered=True),
    "trace_then_centered": lambda: optax.rmsprop(1e-2, centered=True, momentum=0.9),
    "reuse_of_gradients": lambda: optax.scale_by_backtracking_linesearch(5, store_grad=True),
}
# Without a return type in their signature.
UNTYPED = ("dog", "dowg")

STAYS = {  # what is refused, by the field that the sentence names first
    "apply_every": "ApplyEvery.grad_acc: gradients of a step to come",
    "cocob": "COCOBState.init_particles: a point among the parameters",
    "dog": "DoGState.init_params: a point among the parameters",
    "dowg": "DoWGState.init_params: a point among the parameters",
    "lbfgs": "ScaleByLBFGSState.params, .*: differences of points and of gradients",
    "reuse_of_gradients": "ScaleByBacktrackingLinesearchState.grad: handed back as the gradient",
    "rmsprop_centered": "ScaleByRStdDevState.mu, ScaleByRStdDevState.nu: nu - mu",
    "scale_by_cocob": "COCOBState.*cumulative_gradients: a sum of all gradients",
    "scale_by_distance_over_gradients": "ScaleByDistanceOverGradientsState.init_params: a point",
    "scale_by_lbfgs": "ScaleByLBFGSState.params, .*: differences of points and of gradients",
    "scale_by_stddev": "ScaleByRStdDevState.mu, ScaleByRStdDevState.nu: nu - mu",
    "scale_by_zoom_linesearch": "ScaleByZoomLinesearchState.grad: handed back as the gradient",
    "schedule_free_sgd": "ScheduleFreeState.z: a point among the parameters",
}
WITHOUT_MOMENTS = frozenset(
    """adaptive_grad_clip add_decayed_weights add_noise centralize clip clip_by_block_rms
    clip_by_global_norm differentially_private_aggregate dpsgd freeze fromage identity
    keep_params_nonnegative measure_with_ema noisy_sgd normalize normalize_by_update_norm
    polyak_sgd reduce_on_plateau scale scale_by_backtracking_linesearch scale_by_learning_rate
    scale_by_param_block_norm scale_by_param_block_rms scale_by_polyak scale_by_schedule
    scale_by_sign scale_by_trust_ratio set_to_zero sgd sign_sgd
    snapshot stateless stateless_with_tree_map zero_nans""".split()
)
WIDE_BESIDE_CODES = {
    "MultiSteps": {"acc_grads"},
    "ademamix": {"m2"},
    "galore": {"projector"},
    "madgrad": {"s", "x0"},
    "mechanize": {"x0"},
    "prodigy": {"params0"},
    "rprop": {"step_sizes"},
    "sam": {"cache"},
    "scale_by_ademamix": {"m2"},
    "scale_by_galore": {"projector"},
    "scale_by_madgrad": {"s", "x0"},
    "scale_by_rprop": {"step_sizes"},
    "schedule_free": {"z"},
    "schedule_free_adamw": {"z"},
    "trace_then_centered": {"mu", "nu"},
}


def public():
    for module in (optax, optax.contrib):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                result = str(inspect.signature(function).return_annotation)
                if "GradientTransformation" in result or name in UNTYPED:
                    yield name, function


FUNCTIONS = dict(sorted(public()))


@functools.cache
def build(name):
    if name in CALLS:
        return optax.with_extra_args_support(CALLS[name]())
    function = FUNCTIONS[name]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in kinds
    ]
    tx = function(**{p: ARGUMENTS[p] for p in needed})
    return optax.with_extra_args_support(tx)


def start(name):
    params = {"kernel": jnp.full((16, 32), 0.01), "bias": jnp.zeros(32)}
    return optax.LookaheadParams.init_synced(params) if name == "lookahead" else params


LARGE = 64
NAMES = sorted({*FUNCTIONS, *CALLS})


@pytest.mark.parametrize("name", NAMES)
def test_bytes_fall_or_a_sentence_says_why_not(name):
    tx, params = build(name), start(name)
    state = jax.eval_shape(tx.init, params)
    stored = oxs.quantized(tx, min_size=LARGE)
    if name in STAYS:
        message = "(?s)nothing in the state .* use it without quantized.*" + STAYS[name]
        with pytest.raises(ValueError, match=message):
            stored.init(params)
        return
    large = [x for x in arrays_of(state) if x.array.size >= LARGE]
    wide = {x.field for x in large if x.role is None or x.role.wide}
    assert wide == WIDE_BESIDE_CODES.get(name, set())
    moments = sum(x.array.size * 4 for x in large if not x.role.wide)
    counters = 8  # of skipped steps
    saved = oxs.state_bytes(tx, params) - (oxs.state_bytes(stored, params) - counters)
    assert (moments == 0) == (name in WITHOUT_MOMENTS)
    assert saved >= 0.73 * moments  # a byte and some scales, of four
    assert moments or saved == 0


INPUTS = jax.random.normal(jax.random.key(0), (128, 16))
TARGETS = INPUTS @ jax.random.normal(jax.random.key(1), (16, 32))


def loss(params):
    return jnp.mean((INPUTS @ params["kernel"] + params["bias"] - TARGETS) ** 2)


def trained(name, tx, steps=12):
    """The loss before and after."""
    params = start(name)

    def body(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        extra = {"value": value} if name in NEED_VALUES else {}
        extra |= {"obj_fn": loss} if name == "sophia" else {}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=steps))
    (params, _), values = run((params, tx.init(params)))
    return float(values[0]), float(loss(params))


NEED_VALUES = {"momo", "momo_adam", "polyak_sgd", "reduce_on_plateau"}
# One of each kind of state; `pytest -m slow` trains with all of them.
IN_EVERY_RUN = {"adan", "madgrad", "muon", "rprop"}
# Not optimizers of the gradients of one loss by themselves.
NOT_TRAINED = {"differentially_private_aggregate", "dpsgd", "lookahead", "sam", "scale_by_muon"}


TRAINED = [
    pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow)
    for name in NAMES
    if name not in {*STAYS, *WITHOUT_MOMENTS, *NOT_TRAINED}
]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training_follows(name):
    before, plain = trained(name, build(name))
    _, stored = trained(name, oxs.quantized(build(name), min_size=LARGE))
    assert plain != before
    assert abs(stored - plain) <= 0.05 * abs(plain - before) + rounding("float32") * before


def test_a_centered_second_moment_would_be_nan():
    """Why both halves of it keep their precision."""
    fields = {"ScaleByRStdDevState": {"mu": "first_moment", "nu": "second_moment"}}
    tx = oxs.quantized(optax.scale_by_stddev(), min_size=LARGE, fields=fields)
    grads = jnp.ones(LARGE) + 1e-3 * jnp.arange(LARGE) % 7
    state = tx.init(grads)
    for _ in range(100):
        updates, state = jax.jit(tx.update)(grads, state)
    assert np.isnan(updates).any()
