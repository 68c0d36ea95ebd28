"""Every mistake gets a sentence that says what to do. A new one joins by adding a line."""

import functools
import re
import tempfile

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_structured as oxs
from optax_structured import adapters
from optax_structured.adapters import SNELL, SNELLA, Codebook, Full, LoRA, SVFit
from optax_structured.recipes import registry

PARAMS = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
GROUPS = oxs.GroupLasso(group_axis=-2)

RECIPES = {n: r.make for n, r in registry.RECIPES.items() if r.family == "proximal"}
FOREIGN = "not an update yet.*Put what acts on gradients.*before dual_averaging"
NO_PARAMS = r"needs the current parameters: call update\(grads, state, params\)"


def step(*elements, params=PARAMS):
    """One traced step of a chain."""
    tx = optax.chain(*elements)
    state = tx.init(params)
    return jax.eval_shape(tx.update, params, state, params)


def between(foreign):
    """A foreign transformation between two proximal elements, at each place where it could be."""
    return lambda: step(oxs.dual_averaging(0.1), foreign, oxs.adaptive_preconditioner())


def before_the_prox(foreign):
    return lambda: step(oxs.moving_average(0.1), foreign, oxs.prox_step(GROUPS, 0.1))


def without_params(make):
    tx = make(0.1, GROUPS, 0.1)
    return lambda: tx.update(PARAMS, tx.init(PARAMS))


GRADIENTS = {"dense": {"kernel": jnp.ones((4, 3))}}
NARROW = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(3)}}
MISSING = (
    "was given another tree than that of (init|the parameters): 'dense/bias' is missing. Call init"
)
NARROWER = r"than that of (init|the parameters): 'dense/kernel' has shape \(4, 2\) and had \(4, 3\)"


def other_tree(make, grads):
    tx = make(0.1, GROUPS, 0.1)
    return lambda: tx.update(grads, tx.init(PARAMS), PARAMS)


def unfinished_chain():
    tx = optax.chain(oxs.dual_averaging(0.1), oxs.adaptive_preconditioner())
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)


def bad_numbers(**structures):
    """Every recipe of the registry with what each of its scalars refuses."""
    for name, recipe in registry.RECIPES.items():
        if recipe.make is optax.adamw:
            continue
        given = {key: value for key, value in structures.items() if recipe.takes(key)}
        for scalar, (expected, refused) in recipe.scalars.items():
            for number in refused:
                arguments = {"learning_rate": 0.1, **given, scalar: number}
                yield (
                    f"{name}-{scalar}={number}",
                    functools.partial(recipe.make, **arguments),
                    re.escape(f"{scalar} must be {expected} or a schedule, got"),
                )


TRANSFORMATIONS = {
    "scale": optax.scale(0.5),
    "scale_by_schedule": optax.scale_by_schedule(lambda count: 0.5),
    "clip": optax.clip(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "trace": optax.trace(0.9),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "add_noise": optax.add_noise(0.1, 0.1, key=0),
    "ema": optax.ema(0.9),
    "scale_by_adam": optax.scale_by_adam(),
    "scale_by_rms": optax.scale_by_rms(),
    "scale_by_sign": optax.scale_by_sign(),
    "centralize": optax.centralize(),
    "zero_nans": optax.zero_nans(),
    "apply_every": optax.apply_every(2),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio(),
    "masked": optax.masked(optax.scale(0.5), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
    "apply_if_finite": optax.apply_if_finite(optax.identity(), 3),
}

MODEL = {"head": jnp.ones((4, 2)), "ids": jnp.ones((3, 3), jnp.int32), "bias": jnp.ones(2)}
ADAPTERS = {
    "lora": LoRA(2),
    "lora-root": LoRA(2, scaling="root"),
    "lora-svd": LoRA(2, start="svd"),
    "svfit": SVFit(2),
    "snell": SNELL(2),
    "snella": SNELLA(2),
    "codebook": Codebook(2),
    "full": Full(),
}


def adapt(pattern, spec, default=None):
    return lambda: adapters.init(
        jax.random.key(0), MODEL, oxs.rules((pattern, spec), default=default)
    )


def of_another_model(spec, element, params):
    """An adapter of `{"w": (6, 4)}`, given to other parameters."""

    def thunk():
        adapter = adapters.init(jax.random.key(0), {"w": jnp.ones((6, 4))}, spec)
        if element != "load":
            return getattr(adapters, element)(params, adapter)
        with tempfile.TemporaryDirectory() as folder:
            adapters.export(f"{folder}/adapter.safetensors", adapter)
            return adapters.load(f"{folder}/adapter.safetensors", params)

    return thunk


ANOTHER = "adapters.{}: the adapter is that of another model: 'w' "
OTHER_SHAPES = [(4, 6), (2, 6, 4), (4,)]
AT = ("merge", "attach", "constants", "describe", "load")

ADAPTER_MISUSE = [
    *(
        (f"{n}-dead-pattern", adapt("encoder", spec), "'encoder' matches no parameter path")
        for n, spec in ADAPTERS.items()
    ),
    *(
        (
            f"{n}-integers",
            adapt("ids", spec),
            "pattern 'ids' gives .* to 'ids', which is int32: only floating-point .* give it None",
        )
        for n, spec in ADAPTERS.items()
    ),
    *(
        (f"{n}-rank", adapt("head", spec), r"rank 3 exceeds the smaller side of a \(4, 2\) matrix")
        for n, spec in {
            "lora": LoRA(3),
            "lora-root": LoRA(3, scaling="root"),
            "lora-svd": LoRA(3, start="svd"),
            "svfit": SVFit(3),
        }.items()
    ),
    *(
        (f"{n}-bias", adapt("bias", spec), "'bias' of shape .*2,")
        for n, spec in ADAPTERS.items()
        if n != "full"
    ),
    *(
        (
            f"{n}-of-other-paths-{element}",
            of_another_model(spec, element, {"v": jnp.ones((6, 4))}),
            ANOTHER.format(element) + "is not a path of these parameters, which begin with 'v'",
        )
        for n, spec in ADAPTERS.items()
        for element in AT
    ),
    *(
        (
            f"{n}-of-other-shape-{i}-{element}",
            of_another_model(spec, element, {"w": jnp.ones(shape)}),
            ANOTHER.format(element) + r"has shape .*, and its \w+ was made for \(6, 4\)",
        )
        for n, spec in ADAPTERS.items()
        for i, shape in enumerate(OTHER_SHAPES)
        for element in (AT if i == 0 else ("merge",))
    ),
    (
        "adapter-of-floats-for-integers",
        of_another_model(Full(), "merge", {"w": jnp.ones((6, 4), jnp.int32)}),
        ANOTHER.format("merge") + "is int32, and only floating-point weights are adapted",
    ),
    ("adapter-not-one", adapt("head", 8), "takes adapters such as LoRA"),
    ("adapter-of-nothing", adapt("head", None), "no weight can be adapted"),
    (
        "adapter-by-default-of-nothing",
        lambda: adapters.init(jax.random.key(0), MODEL, LoRA(9)),
        "no weight can be adapted.*rank 9 exceeds the smaller side",
    ),
    ("lora-rank-zero", lambda: LoRA(0), "at least 1"),
    ("lora-rank-array", lambda: LoRA(jnp.ones(())), "takes a Python int"),
    ("lora-alpha", lambda: LoRA(2, alpha=0.0), "above 0"),
    ("lora-scaling", lambda: LoRA(2, scaling="sqrt"), "'linear' or 'root'"),
    ("lora-start", lambda: LoRA(2, start="pissa"), "'zero' or 'svd'"),
    ("lora-axes", lambda: LoRA(2, axes=(0, 1)), r"takes Axes\(rows=inputs, cols=outputs\)"),
    ("svfit-nothing", lambda: SVFit(), "exactly one of rank and energy"),
    ("svfit-both", lambda: SVFit(2, energy=0.5), "exactly one of rank and energy"),
    ("svfit-energy", lambda: SVFit(energy=1.5), r"in \(0, 1\]"),
    (
        "adapters-sub",
        lambda: adapters.sub({"w": None}, "w"),
        "nothing lies below 'w'; the paths are w",
    ),
    *(
        (
            f"{n}-without-pairs",
            lambda p=p: p.init(MODEL, adapt("head", Full())()),
            f"{n} perturbs pairs of LoRA, and this adapter has none",
        )
        for n, p in {"GGPO": adapters.GGPO(), "MGPO": adapters.MGPO()}.items()
    ),
]

MISUSE = [
    *ADAPTER_MISUSE,
    *bad_numbers(regularizer=GROUPS, strength=0.1, low_rank=oxs.LowRank(2)),
    *((f"between-{n}", between(foreign), FOREIGN) for n, foreign in TRANSFORMATIONS.items()),
    *((f"before-{n}", before_the_prox(foreign), FOREIGN) for n, foreign in TRANSFORMATIONS.items()),
    *((f"no-params-{n}", without_params(make), NO_PARAMS) for n, make in RECIPES.items()),
    (
        "apply_if_finite-around-one-element",
        lambda: step(
            oxs.dual_averaging(0.1),
            optax.apply_if_finite(oxs.adaptive_preconditioner(), 3),
            oxs.prox_step(),
        ),
        FOREIGN,
    ),
    (
        "apply_if_finite-around-the-first-element",
        lambda: step(optax.apply_if_finite(oxs.dual_averaging(0.1), 3), oxs.prox_step()),
        "apply_if_finite or other control flow around the whole recipe",
    ),
    ("chain-ends-before-prox_step", unfinished_chain, "close the chain with prox_step"),
    (
        "preconditioner-first",
        lambda: step(oxs.adaptive_preconditioner(), oxs.prox_step()),
        "adaptive_preconditioner takes the subproblems of dual_averaging, but got a plain update",
    ),
    (
        "adam_preconditioner-first",
        lambda: step(oxs.adam_preconditioner(), oxs.prox_step()),
        "adam_preconditioner takes the subproblems of .*, but got a plain update",
    ),
    (
        "preconditioner-after-sgd",
        lambda: step(optax.sgd(0.1), oxs.adaptive_preconditioner(), oxs.prox_step()),
        "put dual_averaging directly before it in the chain",
    ),
    (
        "cube-root-after-moving-average",
        lambda: step(oxs.moving_average(0.1), oxs.adaptive_preconditioner(), oxs.prox_step()),
        "use adam_preconditioner after it",
    ),
    (
        "two-first-elements",
        lambda: step(oxs.dual_averaging(0.1), oxs.dual_averaging(0.1), oxs.prox_step()),
        FOREIGN,
    ),
    (
        "prox_step-on-plain-updates-without-weight",
        lambda: step(optax.sgd(0.1), oxs.prox_step(GROUPS, 0.1)),
        "after a plain optax transformation needs weight=..., its learning rate",
    ),
    (
        "prox_step-with-superfluous-weight",
        lambda: step(oxs.dual_averaging(0.1), oxs.prox_step(GROUPS, 0.1, weight=0.1)),
        "leave it out",
    ),
    (
        "prox_step-weight-negative",
        lambda: oxs.prox_step(GROUPS, 0.1, weight=-0.1),
        "weight must be a finite number of at least 0",
    ),
    (
        "regularizer-without-strength",
        lambda: oxs.ramda(0.1, GROUPS),
        "got a regularizer but no strength: give strength=",
    ),
    *(
        (
            f"strength-without-regularizer-{n}-{i}",
            lambda make=make, none=none, x=x: make(0.1, none, x),
            "got strength=.* but no regularizer that it could be the strength of",
        )
        for n, make in RECIPES.items()
        for i, (none, x) in enumerate(
            [(None, 0.1), (oxs.rules(default=None), jnp.array(0.1)), (None, lambda count: count)]
        )
    ),
    (
        "strength-without-regularizer-injected",
        lambda: optax.inject_hyperparams(oxs.ramda)(0.1, strength=0.1).init(PARAMS),
        "got strength=.* but no regularizer that it could be the strength of",
    ),
    (
        "flattened",
        lambda: optax.flatten(oxs.prox_adam(0.1, GROUPS, 0.1)).init(PARAMS),
        "no leaf can take the regularizer .*; '': .* optax.flatten makes one vector of all leav",
    ),
    (
        "every-matrix-left-plain",
        lambda: oxs.ramda(0.1, oxs.rules(("kernel", None), default=GROUPS), 0.1).init(PARAMS),
        "no leaf can take the regularizer .*: the rules leave 'dense/kernel' and all other leave",
    ),
    (
        "shadowed-pattern",
        lambda: oxs.ramda(0.1, oxs.rules(("k", GROUPS), ("kernel", oxs.L1())), 0.1).init(PARAMS),
        "pattern 'kernel' gets no leaf, because earlier patterns match everything that it matches",
    ),
    (
        "regularizer-of-another-kind",
        lambda: oxs.ramda(0.1, "l1", 0.1).init(PARAMS),
        "takes a Regularizer such as L1",
    ),
    (
        "regularizer-class",
        lambda: oxs.ramda(0.1, oxs.L1, 0.1).init(PARAMS),
        "give an instance",
    ),
    (
        "dead-pattern",
        lambda: oxs.ramda(0.1, oxs.rules(("kernle", GROUPS), default=None), 0.1).init(PARAMS),
        "pattern 'kernle' matches no parameter path; the nearest paths are 'dense/kernel'",
    ),
    (
        "no-rule-for-a-leaf",
        lambda: oxs.ramda(0.1, oxs.rules(("kernel", GROUPS)), 0.1).init(PARAMS),
        "no pattern matches 'dense/bias' and there is no default",
    ),
    (
        "group-axis-out-of-range-by-pattern",
        lambda: oxs.ramda(0.1, oxs.rules(("kernel", oxs.GroupLasso(2)), default=None), 0.1).init(
            PARAMS
        ),
        "'dense/kernel' of shape .*axis 2 is out of range for a leaf of ndim 2",
    ),
    (
        "group-axis-out-of-range-everywhere",
        lambda: oxs.ramda(0.1, oxs.GroupLasso(5), 0.1).init(PARAMS),
        "no leaf can take the regularizer .*axis 5 is out of range",
    ),
    (
        "bias-as-groups",
        lambda: oxs.ramda(0.1, oxs.rules(("bias", oxs.GroupLasso(0)), default=None), 0.1).init(
            PARAMS
        ),
        "each entry would be a group of its own; use L1",
    ),
    ("group-axis-not-an-int", lambda: oxs.GroupLasso("rows"), "group_axis must be an int"),
    ("group-weight", lambda: oxs.GroupLasso(0, weight=0.0), "weight must be a finite number above"),
    ("box-upside-down", lambda: oxs.Box(1.0, -1.0), "Box needs low < high"),
    ("elastic-net", lambda: oxs.ElasticNet(l2=-1.0), "l2 must be a finite number of at least 0"),
    ("mcp-gamma", lambda: oxs.MCP(gamma=0.0), "gamma must be"),
    ("scad-a", lambda: oxs.SCAD(a=1.0), "a must be"),
    ("pg-iterations", lambda: oxs.ProximalGradient(max_iters=0), "max_iters must be"),
    ("pg-rtol", lambda: oxs.ProximalGradient(rtol=-1.0), "rtol must be at least 0"),
    ("als-rank", lambda: oxs.proximal.WeightedALS(max_rank=0), "max_rank must be"),
    (
        "als-for-groups",
        lambda: step(oxs.ramda(0.1, GROUPS, 0.1, solver=oxs.proximal.WeightedALS(2))),
        "WeightedALS solves for NuclearNorm, got GroupLasso; use Exact",
    ),
    ("milestones-unordered", lambda: oxs.restart_at(oxs.ramda(0.1), (5, 3)), "increasing whole"),
    ("milestones-zero", lambda: oxs.Stages((0,)), "increasing whole numbers of steps, at least 1"),
    ("gamma", lambda: oxs.Stages((5,), gamma=0.0), "gamma must be above 0 and at most 1"),
    ("stages-momentum", lambda: oxs.Stages((5,)).momentum(1.0), r"momentum must be in \[0, 1\)"),
    (
        "stages-too-short-for-momentum",
        lambda: oxs.ramda(0.1, GROUPS, 0.1, momentum=0.99, stages=oxs.Stages.equal(1000, 4)),
        "momentum 0.99 takes 10000 steps of the last stage .* and that has 250.*at most 0.93",
    ),
    ("stages-fewer-steps", lambda: oxs.Stages.equal(3, 4), "a step for each stage: got 3 steps"),
    ("stages-total", lambda: oxs.Stages((5,), total_steps=5), "total_steps must exceed the mile"),
    *(
        (
            f"stages-{n}-learning-rate",
            lambda make=make: make(-0.1, stages=oxs.Stages((5,))),
            "learning_rate must be a finite number of at least 0",
        )
        for n, make in {"ramda": oxs.ramda, "rmda": oxs.rmda}.items()
    ),
    *(
        (
            f"stages-{n}-number",
            lambda make=make: make(0.1, stages=5),
            r"stages must be Stages\.equal",
        )
        for n, make in {"ramda": oxs.ramda, "rmda": oxs.rmda}.items()
    ),
    ("stages-rule", lambda: oxs.Stages((5,)).momentum(0.9, rule="x"), "rule must be"),
    (
        "point-without-regularizer",
        lambda: oxs.prox_point(oxs.ramda(0.1).init(PARAMS)),
        r"needs the regularizer .* the recipe was built with: prox_point\(state, regularizer\)",
    ),
    (
        "no-point",
        lambda: oxs.prox_point(oxs.prox_adam(0.1, GROUPS, 0.1).init(PARAMS), GROUPS),
        "the state holds no prox point: .* their parameters are the prox point",
    ),
    *((f"other-tree-{n}", other_tree(make, GRADIENTS), MISSING) for n, make in RECIPES.items()),
    *((f"other-shape-{n}", other_tree(make, NARROW), NARROWER) for n, make in RECIPES.items()),
    (
        "updates-of-another-tree-than-params",
        other_tree(
            lambda *_: optax.chain(optax.sgd(0.1), oxs.prox_step(GROUPS, 0.1, weight=0.1)),
            GRADIENTS,
        ),
        "prox_step was given another tree than that of the parameters: 'dense/bias' is missing",
    ),
    (
        "primal_averaging-other-tree",
        other_tree(lambda rate, *_: oxs.mirror_madgrad(rate), GRADIENTS),
        MISSING,
    ),
]


@pytest.mark.parametrize(
    ("thunk", "message"), [line[1:] for line in MISUSE], ids=[line[0] for line in MISUSE]
)
def test_misuse(thunk, message):
    with pytest.raises((ValueError, TypeError), match="(?s)" + message):
        thunk()


@pytest.mark.parametrize("element", ["merge", "attach"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_in_half_precision_warn_once_a_call(name, element):
    params = {"w": jnp.ones((6, 4), jnp.bfloat16), "v": jnp.ones((6, 4), jnp.bfloat16)}
    adapter = jax.eval_shape(lambda: adapters.init(jax.random.key(0), params, ADAPTERS[name]))
    message = f"adapters.{element} rounds the sum to bfloat16 in 'v' and 1 more weights.*float32"
    with pytest.warns(UserWarning, match=message) as seen:
        jax.eval_shape(getattr(adapters, element), params, adapter)
    assert len(seen) == 1


def test_unfinished_chain_under_jit():
    tx = oxs.dual_averaging(0.1)
    with pytest.raises((ValueError, TypeError), match="close the chain with prox_step"):
        jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("strength", [0.0, optax.constant_schedule(0.0)])
def test_a_strength_of_zero_needs_no_regularizer(strength):
    step(oxs.ramda(0.1, None, strength))


def test_a_vector_may_be_all_there_is():
    """As it came, or as `optax.flatten` made it: penalties on entries take it."""
    step(oxs.prox_adam(0.1, oxs.L1(), 0.1), params=jnp.ones(5))
    step(optax.flatten(oxs.prox_adam(0.1, oxs.L1(), 0.1)))


def test_ids_are_unique():
    assert len({line[0] for line in MISUSE}) == len(MISUSE)


@pytest.mark.parametrize(
    "fine",
    [
        pytest.param(optax.identity(), id="identity"),
        pytest.param(optax.masked(oxs.adaptive_preconditioner(), True), id="masked element"),
    ],
)
def test_what_touches_no_leaf_is_allowed(fine):
    step(oxs.dual_averaging(0.1), fine, oxs.prox_step(GROUPS, 0.1))
