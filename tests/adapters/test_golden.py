"""Published values and runs of the other adapters, replayed from what the files say."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import Golden, load, names
from references.exact_adam import scale_by_exact_adam
from tolerances import FLOAT32_COUNTERS, GOLDEN

from optax_structured import adapters
from optax_structured.adapters import (
    GGPO,
    MGPO,
    SNELL,
    Kernel,
    Pair,
    SparsityAllocator,
    Spectrum,
    SVFit,
    codebook_weight,
    constants,
    footprint_bits,
    merge,
    rebalance_factors,
)
from optax_structured.trees import Axes

TORCH = Axes(rows=-1, cols=-2)  # a weight is (outputs, inputs)


def assert_near(got, want, name, tolerance=GOLDEN, scale=0.0):
    want = np.asarray(want, np.float64)
    atol = tolerance * np.max(np.abs(want), initial=scale)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


def words(text):
    """The numbers that a piece of prose gives to names, such as "b1=.9"."""
    return {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]*\d(?:e-\d+)?)", text)}


def told(text, phrases):
    """What a table has for the one of its phrases that a text contains."""
    (value,) = [value for phrase, value in phrases.items() if phrase in text]
    return value


def optimizer(meta, lr):
    """Adam or SGD as the file says it."""
    kind = meta["optimizer"]
    if kind == "sgd":
        return optax.sgd(lr)
    if kind == "adam":
        adam = words(meta.get("adam", ""))
    else:
        adam = words(re.fullmatch(r"AdamW\(b1=mu,(.*)\)", kind)[1]) | {"b1": meta["mu"]}
        assert adam.pop("weight_decay", 0) == 0
    return optax.chain(scale_by_exact_adam(**adam), optax.scale(-lr))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("svfit-"))
def test_svfit(name):
    golden = load(name)
    meta, said = golden.meta, golden.settings()
    tx = optimizer(meta, said["lr"])
    said.check_all_read()

    def matrix(x):
        return jnp.asarray(golden.as_matrix(x, "w", "mn"))

    frozen = {leaf: matrix(golden.arrays[f"params0/{leaf}/w"]) for leaf in meta["leaves"]}
    first = {leaf: golden.arrays[f"params0/{leaf}/sigma"] for leaf in meta["leaves"]}
    adapter, known = {}, {}
    for leaf, sigma in first.items():
        own = adapters.init(jax.random.key(0), frozen[leaf], SVFit(len(sigma), axes=TORCH))
        adapter[leaf] = own[""]
    known = constants(frozen, adapter)
    for leaf, sigma in first.items():
        assert_near(known[leaf].values, sigma, f"first values of {leaf}")
        u, s, vt = known[leaf]
        residual = frozen[leaf] - TORCH.from_matrix((u * s) @ vt, frozen[leaf].shape)
        want = matrix(golden.arrays[f"state/residual/{leaf}"])
        assert_near(residual, want, f"residual of {leaf}", scale=sigma[0])
        kept, whole = np.sum(s**2), np.sum(np.asarray(frozen[leaf]) ** 2)
        assert_near(kept / whole, golden.arrays[f"state/energy/{leaf}"], f"energy of {leaf}")
    full = {leaf: matrix(g) for leaf, g in golden.leaves("full_grads").items()}

    def step(carry, g):
        adapter, state = carry
        _, pull = jax.vjp(lambda ad: merge(frozen, ad, known), adapter)
        (gradient,) = pull(g)
        updates, state = tx.update(gradient, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        return (adapter, state), (gradient, adapter, merge(frozen, adapter, known))

    _, (grads, run, merged) = jax.lax.scan(step, (adapter, tx.init(adapter)), full)
    for leaf, sigma in first.items():
        assert_near(grads[leaf].shift, golden.arrays[f"grads/{leaf}/sigma"], f"gradient of {leaf}")
        moved = sigma + run[leaf].shift
        assert_near(moved, golden.arrays[f"params/{leaf}/sigma"], f"values of {leaf}")
        assert_near(merged[leaf], matrix(golden.arrays[f"state/merged/{leaf}"]), leaf)


def pairs(golden, key):
    scale, alpha = golden.meta["scale"], golden.meta.get("alpha")

    def factor(leaf, name, axes):
        stored = golden.arrays[f"{key}/{leaf}/{name}"]
        return jnp.asarray(golden.as_matrix(stored, name, axes))

    def pair(leaf):
        a, b = factor(leaf, "a", "rn"), factor(leaf, "b", "mr")
        rank = a.shape[-2]
        scales = {"alpha/r": lambda: alpha / rank, "alpha/sqrt(r)": lambda: alpha / rank**0.5}
        return Pair(a, b, scales[scale]() if isinstance(scale, str) else scale, TORCH)

    return {leaf: pair(leaf) for leaf in golden.meta["leaves"]}


def inputs(golden, name, axes=None, like=None):
    """A stored input; as a matrix of these axes, named by the layout as `like` or itself."""
    found = golden.leaves(f"inputs/{name}")
    if axes:
        found = {leaf: golden.as_matrix(x, like or name, axes) for leaf, x in found.items()}
    return {leaf: jnp.asarray(x) for leaf, x in found.items()}


def frozen_of(golden):
    start = golden.start
    return {
        leaf: jnp.asarray(golden.as_matrix(start[f"{leaf}/w0"], "w0", "mn"))
        for leaf in golden.meta["leaves"]
    }


def check_run(golden, grads, run, tolerance=GOLDEN):
    for key, got in (("grads", grads), ("params", run)):
        for leaf, want in pairs(golden, key).items():
            assert_near(got[leaf].a, want.a, f"{key} of {leaf}/a", tolerance)
            assert_near(got[leaf].b, want.b, f"{key} of {leaf}/b", tolerance)


class StoredNoise(GGPO):
    """GGPO with the draws of a file instead of its own."""

    def with_noise(self, state, params, adapter, noise):
        drawn = {leaf: scale * noise[leaf] for leaf, scale in self.scales(state).items()}
        return adapters.perturbation.add_to_weights(params, drawn, adapter), drawn


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("lora_ggpo-"))
def test_ggpo(name):
    golden = load(name)
    meta, said = golden.meta, golden.settings()
    tx = optimizer(meta, said["lr"])
    frozen, adapter = frozen_of(golden), pairs(golden, "params0")
    perturbation = StoredNoise(said["sigma"], said["beta"], meta.get("combine", "sum"))
    said.pass_over("alpha", "scale")  # read by `pairs`
    said.check_all_read()
    state = perturbation.init(frozen, adapter)
    for leaf, want in golden.leaves("state/base_mean_row_norm").items():
        assert_near(np.squeeze(state.rows[leaf].base), want, f"mean norm of {leaf}", 1e-6)
    # The file has the mean of norms that were rounded to float32.
    stored = golden.leaves("state/base_mean_row_norm")
    rows = {
        leaf: row._replace(base=jnp.reshape(stored[leaf], (1, 1)))
        for leaf, row in state.rows.items()
    }
    state = state._replace(rows=rows)

    def loss(params, adapter, x, y):
        merged = merge(params, adapter)
        return {
            leaf: 0.5 * jnp.sum((x[leaf] @ w.T - y[leaf]) ** 2) / len(x[leaf])
            for leaf, w in merged.items()
        }

    def step(carry, batch):
        adapter, moments, state = carry
        x, y, noise = batch
        near, drawn = perturbation.with_noise(state, frozen, adapter, noise)

        def total(adapter):
            losses = loss(near, adapter, x, y)
            return sum(losses.values()), losses

        gradient, losses = jax.grad(total, has_aux=True)(adapter)
        state = perturbation.observe(state, adapter, gradient)
        updates, moments = tx.update(gradient, moments, adapter)
        adapter = optax.apply_updates(adapter, updates)
        return (adapter, moments, state), (gradient, adapter, drawn, losses, state.rows)

    batches = (inputs(golden, "x"), inputs(golden, "y"), inputs(golden, "noise", "mn"))
    start = (adapter, tx.init(adapter), state)
    _, (grads, run, drawn, losses, rows) = jax.lax.scan(step, start, batches)
    check_run(golden, grads, run, FLOAT32_COUNTERS)
    for leaf in meta["leaves"]:
        for key, got in (
            ("perturbation", drawn[leaf]),
            ("loss", losses[leaf]),
            ("grad_row_norm", rows[leaf].gradient),
            ("weight_row_norm", rows[leaf].weight),
        ):
            want = golden.arrays[f"state/{key}/{leaf}"]
            if key == "perturbation":
                want = golden.as_matrix(want, "noise", "mn")
            assert_near(got, want, f"{key} of {leaf}", FLOAT32_COUNTERS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("lora_mgpo-"))
def test_mgpo(name):
    golden = load(name)
    meta, said, variant = golden.meta, golden.settings(), golden.meta["variant"]
    tx = optimizer(meta, said["lr"])
    frozen, adapter = frozen_of(golden), pairs(golden, "params0")
    limit = re.search(r"clamped at ([\d.]+)", variant)
    perturbation = MGPO(
        said["rho"],
        said["mu"],
        said["beta"],
        sign=told(variant, {"plus sign": 1, "minus sign": -1}),
        space=told(variant, {"factor space": "factors", "weight space": "weights"}),
        norm=told(variant, {"global norms": "global", "per layer": "per_leaf"}),
        max_multiplier=float(limit[1]) if limit else None,
    )
    said.pass_over("alpha", "scale")  # read by `pairs`
    said.check_all_read()

    def loss(params, adapter, target):
        merged = merge(params, adapter)
        return sum(0.5 * jnp.sum((merged[leaf] - target[leaf]) ** 2) for leaf in merged)

    value_and_grad = adapters.perturbed_value_and_grad(loss, perturbation)

    def step(carry, target):
        adapter, moments, state = carry
        params, near = perturbation.apply(state, frozen, adapter)
        apart = (optax.tree.sub(params, frozen), optax.tree.sub(near, adapter))
        _, gradient, state = value_and_grad(state, frozen, adapter, target)
        updates, moments = tx.update(gradient, moments, adapter)
        adapter = optax.apply_updates(adapter, updates)
        return (adapter, moments, state), (gradient, adapter, apart, state.norm)

    start = (adapter, tx.init(adapter), perturbation.init(frozen, adapter))
    _, (grads, run, apart, norm) = jax.lax.scan(
        step, start, inputs(golden, "target", "mn", like="w0")
    )
    check_run(golden, grads, run)
    in_weights, in_factors = apart
    seen = 0
    for leaf in meta["leaves"]:
        found = {
            f"state/perturbation_w/{leaf}": (in_weights[leaf], "w0", "mn"),
            f"state/perturbation/{leaf}/a": (in_factors[leaf].a, "a", "rn"),
            f"state/perturbation/{leaf}/b": (in_factors[leaf].b, "b", "mr"),
        }
        assert_near(norm[leaf], golden.arrays[f"state/gbar/{leaf}"], f"mean norm of {leaf}")
        for key in found.keys() & golden.arrays:
            got, *said_of = found[key]
            assert_near(got, golden.as_matrix(golden.arrays[key], *said_of), key)
            seen += 1
    assert seen >= len(meta["leaves"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n for n in names("snell") if "cases" in load(n).meta])
def test_snell_merge(name):
    golden = load(name)

    def get(key, case):
        return jnp.asarray(golden.arrays[f"{key}/{case}"])

    for case, said in golden.meta["cases"].items():
        sparse = said["kind"] in ("SNELL", "SNELLA")
        mixed = said["kind"] in ("SNELLA", "MixK")
        signs = (-1.0) ** np.arange(said["heads"])
        np.testing.assert_allclose(get("inputs/coeff", case), 0.1 * signs)
        mixing = None
        if mixed:
            mixing = jnp.concatenate([get(f"inputs/{x}", case) for x in ("alpha", "gamma", "beta")])
        kernel = Kernel(get("inputs/in_factors", case), get("inputs/out_factors", case), mixing)
        sparsity = jnp.asarray(said["sparsity"], jnp.float64) if sparse else None
        assert_near(kernel.dense(), get("state/dense", case), f"D of {case}")
        update, pull = jax.vjp(lambda k, s=sparsity: k.update(s), kernel)
        assert_near(update, get("state/sparse", case), f"S of {case}")
        assert int(jnp.sum(update != 0)) == said["nonzero"]
        np.testing.assert_array_equal(update == 0, get("state/sparse", case) == 0)
        (gradient,) = pull(get("inputs/cotangent", case))
        assert_near(gradient.inputs, get(f"grads/{case}", "in_factors"), case)
        assert_near(gradient.outputs, get(f"grads/{case}", "out_factors"), case)
        if mixed:
            want = [get(f"grads/{case}", x) for x in ("alpha", "gamma", "beta")]
            assert_near(gradient.mixing, jnp.concatenate(want), f"mixing of {case}")
        soft = Kernel(kernel.inputs, kernel.outputs, mixing, rule="soft")
        at = jnp.asarray(said["sparsity"], jnp.float64)
        assert_near(soft.update(at), get("state/sparse_paper", case), f"paper's S of {case}")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [n for n in names("snell") if "epochs" in load(n).meta])
def test_snella_allocation(name):
    golden = load(name)
    meta = golden.meta
    layers = list(meta["layers"])
    allocator = SparsityAllocator(
        total=meta["epochs"],
        target=meta["target_sparsity"],
        initial=meta["initial_sparsity"],
        begin=meta["init_warmup"],
        end=meta["final_warmup"],
        interval=meta["interval"],
        b1=meta["beta1"],
        b2=meta["beta2"],
    )

    def kernels(key):
        parts = ("in_factors", "out_factors")
        return {
            layer: Kernel(*(jnp.asarray(golden.arrays[f"{key}/{layer}/{x}"]) for x in parts))
            for layer in layers
        }

    params, grads, each = kernels("params"), kernels("grads"), meta["iters_per_epoch"]

    def epoch(state, t):
        state = allocator.allocate(state, t)
        told = (state.sparsity, allocator.budget(state, t), allocator.shares(state))

        def one(i, state):
            at = lambda tree: jax.tree.map(lambda x: x[t * each + i], tree)  # noqa: E731
            return allocator.observe(state, at(params), at(grads))

        return jax.lax.fori_loop(0, each, one, state), told

    start = allocator.init(jax.tree.map(lambda x: x[0], params))
    state, told = jax.lax.scan(epoch, start, jnp.arange(meta["epochs"]))
    sparsity, (budget, due), shares = told
    np.testing.assert_array_equal(due, golden.arrays["state/applied"])
    np.testing.assert_allclose(budget, golden.arrays["state/budget"], rtol=0, atol=1)
    order = sorted(layers)  # that of the shares
    for layer in layers:
        said = meta["layers"][layer]
        units = len(layers) / (said["n_in"] * said["n_out"])  # what their loop rounds
        want = golden.arrays[f"state/sparsity/{layer}"]
        np.testing.assert_allclose(sparsity[layer], want, rtol=0, atol=units, err_msg=layer)
        known = golden.arrays["state/applied"]  # they keep the shares of the last allocation
        assert known.any()
        want = golden.arrays[f"state/score_share/{layer}"][known]
        assert_near(shares[known, order.index(layer)], want, f"share of {layer}")
        for j, part in enumerate(("in_factors", "out_factors")):
            score = state.scores[layer]
            for key, got in (("importance", score.size), ("uncertainty", score.spread)):
                want = golden.arrays.get(f"state/ema_{key}_final/{layer}/{part}")
                if want is not None:
                    assert_near(got[j], want, f"{key} of {layer}")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("jlcm-"))
def test_jlcm(name):
    golden = load(name)
    for case, said in golden.meta["cases"].items():
        get = {
            k: jnp.asarray(golden.arrays[f"inputs/{k}/{case}"])
            for k in ("w", "group", "codebook", "scale", "logits", "cotangent")
        }
        words = (get["scale"][:, None] * get["codebook"])[get["group"]]
        away = get["w"][..., None] - words[:, None, :]
        assert_near(-(away**2) / said["temperature"], get["logits"], f"logits of {case}")
        np.testing.assert_array_equal(
            np.argmax(get["logits"], -1), golden.arrays[f"state/index/{case}"]
        )
        bits = footprint_bits(said["m"], said["n"], said["K"], said["groups"])
        assert bits == said["footprint_bits"]
        for forward, backward in itertools.product(("soft", "hard"), ("default", "proximal")):

            def weight(*x, group=get["group"], backward=backward, forward=forward):
                return codebook_weight(*x, group, backward, forward, 0.0)

            w, pull = jax.vjp(weight, get["logits"], get["codebook"], get["scale"])
            assert_near(w, golden.arrays[f"state/{forward}/{case}"], f"{forward} of {case}")
            stored = (f"logits_{backward}_{forward}", f"codebook_{forward}", f"scale_{forward}")
            for gradient, key in zip(pull(get["cotangent"]), stored, strict=True):
                want = golden.arrays.get(f"grads/{case}/{key}")
                if want is not None:
                    assert_near(gradient, want, f"{key} of {case}")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("matrix_sensing-"))
def test_matrix_sensing(name):
    golden = load(name)
    said = golden.settings()
    a, y, m = (jnp.asarray(golden.arrays[x]) for x in ("A", "y", "M"))
    eta, beta, due = said["eta"], said["beta"], said["switch_step"]
    assert golden.arrays["F0"].shape[-1] == said["k"]
    assert np.linalg.matrix_rank(m) == said["r"]
    said.pass_over("alpha", "alpha_G")  # of the draw of the start
    said.check_all_read()

    def step(carry, t, switch):
        f, g = carry
        rebalanced = functools.partial(rebalance_factors, beta=beta)
        f, g = jax.lax.cond(t == switch, rebalanced, lambda f, g: (f, g), f, g)
        e = jnp.einsum("mij,m->ij", a, jnp.einsum("mij,ij->m", a, f @ g.T) - y)
        f, g = f - eta * e @ g, g - eta * e.T @ f
        return (f, g), (f @ g.T, jnp.linalg.norm(f @ g.T - m))

    start = (jnp.asarray(golden.arrays["F0"]), jnp.asarray(golden.arrays["G0"]))
    steps = jnp.arange(len(golden.arrays["err"]))
    for switch, key in ((due, "err"), (-1, "err_plain")):
        if key not in golden.arrays:
            continue
        _, (products, errors) = jax.lax.scan(lambda c, t, s=switch: step(c, t, s), start, steps)
        np.testing.assert_allclose(errors, golden.arrays[key], rtol=1e-7, atol=1e-12, err_msg=key)
        if key == "err":
            at = golden.arrays["product_steps"]
            assert_near(products[at], golden.arrays["product"], "product")


def test_layouts_are_those_that_a_file_names():
    golden = Golden("turned", {"layout": "a:(n,r) b:(T,m,r); w = both (k,n), given"}, {})
    x = np.arange(6.0).reshape(1, 2, 3)
    np.testing.assert_array_equal(golden.as_matrix(x, "a", "rn"), np.swapaxes(x, -1, -2))
    for name, axes in (("b", "mr"), ("noise", "mn")):
        assert golden.as_matrix(x, name, axes) is x
    with pytest.raises(ValueError, match=r"turned says w:\(k,n\), and its replay knows mn"):
        golden.as_matrix(x, "w", "mn")


def test_a_rank_that_is_not_divided_is_an_error():
    with pytest.raises(ValueError, match="2 does not divide 3"):
        SNELL(3)
    assert isinstance(Spectrum(jnp.zeros(2), (3, 3)), adapters.Node)
