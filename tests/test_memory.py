"""Bytes of optimizer state: exact, at the right leaf, equal to the published formulas."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_structured as oxs
from optax_structured.memory import (
    LLAMA_MODELS,
    METHODS,
    PLAIN_LEAVES,
    Widths,
    llama,
    published_bytes,
    published_numbers,
)
from optax_structured.quantization import AffineCode
from optax_structured.trees import named_leaves

# GB at two bytes a number, as published tables count; "+rest" has Adam on what is not projected.
PUBLISHED = {
    #       weights   Adam     GaLore     GaLore   large side   APOLLO
    #                 states   matrices   +rest    +rest        +rest
    "60m": (0.1161, 0.2323, 0.0326, 0.1637, 0.1584, 0.1564),
    "130m": (0.2682, 0.5364, 0.1463, 0.3430, 0.3194, 0.3099),
    "350m": (0.7359, 1.4719, 0.3905, 0.6528, 0.5897, 0.5647),
    "1b": (2.6782, 5.3563, 1.5602, 2.0849, 1.8333, 1.7326),
    "7b": (13.4768, 26.9537, 8.3551, 9.4047, 8.0457, 7.5256),
}
# GB with moments in 8 bits, in blocks of 256; the basis in bfloat16, or in 4 bits in groups of 256
# with scale and zero in bfloat16. "+rest" has 8-bit Adam on what is not projected.
PUBLISHED_IN_CODES = {
    #      8-bit   8-bit   INT4
    #       Adam  GaLore   basis
    #              +rest   +rest
    "60m": (0.1180, 0.0868, 0.0813),
    "130m": (0.2724, 0.1904, 0.1659),
    "350m": (0.7474, 0.3749, 0.3095),
    "1b": (2.7200, 1.2322, 0.9707),
    "7b": (13.6874, 5.7007, 4.3061),
}
EIGHT, FOUR = 1 + 4 / 256, 1 / 2 + 4 / 128  # bytes of a moment
BASIS_IN_4_BITS = 1 / 2 + 5 / 256  # a float32 scale and a zero of one byte for 256 entries
PARAMETERS = {
    "60m": (58_073_600, 56),
    "130m": (134_105_856, 84),
    "350m": (367_969_280, 168),
    "1b": (1_339_082_752, 168),
    "7b": (6_738_415_616, 224),
}

every_codec = pytest.mark.parametrize(
    "codec, width",
    [(oxs.Dynamic(8, block=256), EIGHT), (oxs.Dynamic(4, block=128), FOUR)],
    ids=["8bit", "4bit"],
)
every_model = pytest.mark.parametrize("name", PUBLISHED)
layouts = pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])


def structure(rank, side="small", codec=None):
    spec = oxs.LowRank(rank, axes=oxs.Axes(side=side), codec=codec)
    return oxs.rules((PLAIN_LEAVES, None), default=spec)


def gigabytes(numbers):
    return round(2 * numbers / 1e9, 4)


def projected(numbers):
    return sum(n for path, n in numbers.items() if not re.search(PLAIN_LEAVES, path))


@every_model
def test_models_have_the_published_numbers_of_parameters(name):
    params, stacked = llama(name), llama(name, stacked=True)
    size, matrices = PARAMETERS[name]
    for tree in (params, stacked):
        assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == size
    found = [path for path, _ in named_leaves(params) if not re.search(PLAIN_LEAVES, path)]
    assert len(found) == matrices
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(llama(name, jnp.bfloat16)))


def test_models_have_no_other_names():
    with pytest.raises(ValueError, match="no model '2b'; there are 60m, 130m"):
        llama("2b")


@layouts
@every_model
def test_formulas_give_the_published_table(name, stacked):
    params, rank = llama(name, jnp.bfloat16, stacked=stacked), LLAMA_MODELS[name].rank
    galore = published_numbers("galore", structure(rank), params)
    numbers = (
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        sum(published_numbers("adamw", None, params).values()),
        projected(galore),
        sum(galore.values()),
        sum(published_numbers("galore", structure(rank, "large"), params).values()),
        sum(published_numbers("apollo", structure(rank), params).values()),
    )
    assert tuple(map(gigabytes, numbers)) == PUBLISHED[name]


@layouts
@every_model
def test_real_states_give_the_published_table(name, stacked):
    params, rank = llama(name, jnp.bfloat16, stacked=stacked), LLAMA_MODELS[name].rank
    adamw = oxs.memory_report(optax.adamw(1e-3), params, method="adamw")
    galore = oxs.memory_report(
        oxs.galore(1e-3, structure(rank)), params, structure(rank), method="galore"
    )
    large, apollo = (
        oxs.memory_report(tx, params)
        for tx in (oxs.galore(1e-3, structure(rank, "large")), oxs.apollo(1e-3, structure(rank)))
    )
    found = (
        galore.weight_bytes / 2,
        adamw.state_numbers,
        projected({leaf.path: leaf.state_numbers for leaf in galore.leaves}),
        galore.state_numbers,
        large.state_numbers,
        apollo.state_numbers,
    )
    assert tuple(map(gigabytes, found)) == PUBLISHED[name]
    assert adamw.state_bytes == 2 * adamw.formula_numbers + 4  # optax keeps moments in bfloat16
    # Ours are float32, whatever the parameters are.
    layers = LLAMA_MODELS[name].layers
    assert galore.state_bytes == 4 * galore.formula_numbers + 7 * layers + galore.shared_bytes
    assert oxs.state_bytes(oxs.galore(1e-3, structure(rank)), params) == galore.state_bytes


@layouts
@every_model
def test_formulas_give_the_published_table_in_codes(name, stacked):
    params, low_rank = llama(name, stacked=stacked), structure(LLAMA_MODELS[name].rank)
    found = (
        published_bytes("adamw", None, params, Widths(EIGHT)),
        published_bytes("galore", low_rank, params, Widths(EIGHT)),
        published_bytes("galore", low_rank, params, Widths(EIGHT, 1 / 2 + 4 / 256)),
    )
    gb = tuple(round(sum(of_leaf.values()) / 1e9, 4) for of_leaf in found)
    assert gb == PUBLISHED_IN_CODES[name]


@pytest.mark.slow
@every_codec
@every_model
def test_real_states_in_codes_are_the_formulas_to_the_byte(name, codec, width):
    """And one flag a matrix; moments of fewer than 4096 entries stay in float32."""
    params, rank = llama(name, stacked=True), LLAMA_MODELS[name].rank
    plain, packed = structure(rank), structure(rank, codec=oxs.Affine(4))
    for tx, method, spec, basis, basis_codes in (
        (optax.adamw(1e-3), "adamw", None, 4, 0),
        (oxs.galore(1e-3, plain), "galore", plain, 4, 0),
        (oxs.galore(1e-3, packed), "galore", packed, BASIS_IN_4_BITS, 1 / 2 + 1 / 256),
    ):
        report = oxs.memory_report(oxs.quantized(tx, codec), params, spec)
        held = published_bytes(method, spec, params, Widths(width, basis))
        codes = published_bytes(method, spec, params, Widths(codec.bits / 8, basis_codes))
        for leaf in report.leaves:
            size = math.prod(leaf.shape)
            small = size < 4096
            flags = leaf.shape[0] if leaf.spec else 0
            assert leaf.state_bytes == (8 * size if small else held[leaf.path] + flags)
            assert leaf.code_bytes == (0 if small else codes[leaf.path])
        assert report.shared_bytes <= 64
        assert report.code_bytes == sum(leaf.code_bytes for leaf in report.leaves)


@pytest.mark.slow
@every_codec
def test_arrays_in_codes_have_the_bytes_of_the_report(codec, width):
    """A block of 60M's width, for real: two bytes and eight a block, or one, an entry; INT4."""
    params = {"kernel": jnp.ones((512, 1376)), "odd": jnp.ones((67, 71)), "norm": jnp.ones(512)}
    adam = oxs.quantized(optax.adamw(1e-3), codec)
    real, report = adam.init(params), oxs.memory_report(adam, params)
    assert sum(x.nbytes for x in jax.tree.leaves(real)) == report.state_bytes
    kernel, norm, odd = report.leaves
    assert kernel.state_bytes == 2 * width * 512 * 1376 and norm.state_bytes == 2 * 4 * 512
    blocks = -(-67 * 71 // codec.block)  # no axis is a whole number of blocks; the last is partial
    codes = odd.state_bytes / 2 - 4 * blocks
    assert 67 * 71 * codec.bits / 8 <= codes <= blocks * codec.block * codec.bits / 8

    spec = oxs.rules(("kernel", oxs.LowRank(128, codec=oxs.Affine(4))), default=None)
    galore = oxs.quantized(oxs.galore(1e-3, spec), codec)
    real, report = galore.init(params), oxs.memory_report(galore, params, spec)
    assert sum(x.nbytes for x in jax.tree.leaves(real)) == report.state_bytes
    (basis,) = (x for x in jax.tree.leaves(real, is_leaf=is_basis) if is_basis(x))
    assert sum(x.nbytes for x in basis) == BASIS_IN_4_BITS * 512 * 128
    expected = BASIS_IN_4_BITS * 512 * 128 + 2 * width * 128 * 1376 + 1
    assert report.leaves[0].state_bytes == expected


@pytest.mark.slow
@every_codec
def test_a_60m_tree_in_codes_has_the_bytes_of_the_formula(codec, width):
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), llama("60m", stacked=True))
    entries = [x.size for x in jax.tree.leaves(params)]
    assert sum(entries) == PARAMETERS["60m"][0]
    adam = oxs.quantized(optax.adam(1e-3), codec)
    held = sum(x.nbytes for x in jax.tree.leaves(jax.jit(adam.init)(params)))
    assert held == oxs.state_bytes(adam, params)
    assert held == sum(2 * (width if n >= 4096 else 4) * n for n in entries) + 12  # and counters


def is_basis(node):
    return isinstance(node, AffineCode)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])


def small_models():
    nested = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}, "gain": jnp.ones(())}
    stacked = {"kernel": jnp.ones((3, 8, 6), jnp.bfloat16), "norm": jnp.ones((3, 8)), "hole": None}
    return {
        "nested": nested,
        "stacked": stacked,
        "nnx": nnx.state(Network(nnx.Rngs(0)), nnx.Param),
        "equinox": eqx.filter(eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0)), eqx.is_array),
    }


def transformations():
    spec = oxs.rules(default=oxs.LowRank(2))
    low_rank = "galore fira apollo apollo_mini dct_adamw trion ldadam grad_norm_lorp".split()
    return {
        "adamw": optax.adamw(1e-3),
        "sgd": optax.sgd(1e-3),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
        "contrib_galore": optax.contrib.galore(1e-3, rank=2),
        "multi_steps": optax.MultiSteps(optax.adam(1e-3), 2),
        "injected": optax.inject_hyperparams(optax.adam)(1e-3),
        "adam_8bit": oxs.quantized(optax.adam(1e-3), oxs.Dynamic(8, block=4), min_size=2),
        "galore_4bit": oxs.quantized(oxs.galore(1e-3, spec), oxs.Dynamic(4, block=4), min_size=2),
        "q_galore": oxs.q_galore(1e-3, spec, weights=None),
        "ramda": oxs.ramda(1e-2, oxs.GroupLasso(group_axis=-2), strength=1e-3),
        **{name: getattr(oxs, name)(1e-3, spec) for name in low_rank if hasattr(oxs, name)},
    }


every_transformation = pytest.mark.parametrize("name", transformations())


@pytest.mark.slow
@pytest.mark.parametrize("model", small_models())
@every_transformation
def test_bytes_are_those_of_the_real_state(name, model):
    if name == "contrib_galore" and model in ("stacked", "equinox"):
        pytest.skip("it refuses None in the place of a leaf")
    tx, params = transformations()[name], small_models()[model]
    real = jax.tree.leaves(jax.jit(tx.init)(params))
    report = oxs.memory_report(tx, params)
    assert oxs.state_bytes(tx, params) == report.state_bytes == sum(x.nbytes for x in real)
    assert report.state_numbers == sum(x.size for x in real)
    assert report.weight_bytes == sum(x.nbytes for x in jax.tree.leaves(params))
    assert report.gradient_bytes == report.weight_bytes
    assert report.code_bytes == sum(x.nbytes for x in real if x.dtype == jnp.uint8)
    assert (report.code_bytes > 0) == (name in ("adam_8bit", "galore_4bit", "q_galore"))
    assert [leaf.path for leaf in report.leaves] == [path for path, _ in named_leaves(params)]
    assert report.shared_bytes <= 64  # counters, hyperparameters: nothing that grows


def test_arrays_go_to_the_leaf_that_they_belong_to():
    params = {"a": {"kernel": jnp.ones((4, 3)), "count": jnp.ones(2)}, "kernel": jnp.ones(5)}
    moments = {"a/kernel": 12, "a/count": 2, "kernel": 5}
    labels = jax.tree.map(lambda _: "on", params)
    for tx in (
        optax.sgd(1e-3, momentum=0.9),
        optax.MultiSteps(optax.sgd(1e-3), 2),
        optax.partition({"on": optax.sgd(1e-3, momentum=0.9)}, labels),
    ):
        report = oxs.memory_report(tx, params)
        assert {leaf.path: leaf.state_numbers for leaf in report.leaves} == moments


def test_names_play_no_part():
    """Indices are those of a chain, too, and parameters may be called like fields and settings."""
    adam = optax.inject_hyperparams(optax.adam)(1e-3)
    for params in ([jnp.ones(3), jnp.ones(4)], {"b1": jnp.ones(3), "count": jnp.ones(4)}):
        first, second = oxs.memory_report(adam, params).leaves
        assert (first.state_numbers, second.state_numbers) == (6, 8)


def test_masked_leaves_hold_no_state():
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    tx = optax.masked(optax.adam(1e-3), {"kernel": True, "bias": False})
    bias, kernel = oxs.memory_report(tx, params).leaves
    assert (bias.state_numbers, kernel.state_numbers) == (0, 24)


def test_formulas_of_one_matrix():
    """The table of formulas, p = 12, q = 8, rank 2, in the order of its lines."""
    params = {"kernel": jax.ShapeDtypeStruct((5, 8, 12), jnp.float32)}
    expected = {
        "adamw": 2 * 12 * 8,
        "diffgrad": 3 * 12 * 8,
        "galore": 8 * 2 + 2 * 12 * 2,
        "q_galore": 8 * 2 + 2 * 12 * 2,
        "galore_two_sided": (12 + 8) * 2 + 2 * 2**2,
        "galore_adafactor": 8 * 2 + 12 + 2,
        "galore_adafactor_momentum": 8 * 2 + 12 + 2 + 12 * 2,
        "fira": 8 * 2 + 2 * 12 * 2 + 1,
        "apollo": 2 * 12 * 2 + 2,
        "apollo_mini": 2 * 12 + 2,
        "dct_adamw": 2 * 12 * 2 + 2 + 12 * 8,
        "trion": 2 + 12 * 8,
        "ldadam": 2 * 12 * 2 + 8 * 2 + 12 * 8,
        "grad_norm_lorp": 8 * 2 + 2 * 12 * 2 + 2 * 8,
        "grad_norm_lorp_lookahead": 8 * 2 + 2 * 12 * 2 + 12 * 8 + 3 * 8,
    }
    assert expected.keys() == METHODS.keys()
    for method, numbers in expected.items():
        assert published_numbers(method, oxs.LowRank(2), params) == {"kernel": 5 * numbers}
        # In bfloat16, and with the three kinds of numbers apart.
        assert published_bytes(method, oxs.LowRank(2), params) == {"kernel": 10 * numbers}
        kinds = (
            published_bytes(method, oxs.LowRank(2), params, Widths(*only))["kernel"]
            for only in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
        )
        assert sum(kinds) == 5 * numbers
    basis = published_bytes("galore", oxs.LowRank(2), params, Widths(0, 1, 0))
    assert basis == {"kernel": 5 * 8 * 2}


@pytest.mark.parametrize(
    "method, make",
    [
        ("galore", oxs.galore),
        ("fira", oxs.fira),
        ("apollo", oxs.apollo),
        ("dct_adamw", oxs.dct_adamw),
        ("trion", oxs.trion),
        ("ldadam", oxs.ldadam),
        ("grad_norm_lorp", oxs.grad_norm_lorp),
        ("galore_two_sided", oxs.galore),
    ],
)
@pytest.mark.parametrize("side", ["small", "large"])
def test_real_states_are_the_formulas_and_one_flag_a_matrix(method, make, side):
    """The flag says whether the matrix was fitted; it is a byte."""
    params = {
        "wide": jax.ShapeDtypeStruct((5, 8, 12), jnp.bfloat16),
        "tall": jax.ShapeDtypeStruct((12, 8), jnp.float32),
    }
    projector = oxs.projectors.TwoSided() if method == "galore_two_sided" else None
    spec = oxs.LowRank(2, axes=oxs.Axes(side=side), projector=projector)
    report = oxs.memory_report(make(1e-3, spec), params, spec, method=method)
    assert [leaf.state_numbers - leaf.formula_numbers for leaf in report.leaves] == [1, 5]
    assert [leaf.state_bytes - 4 * leaf.formula_numbers for leaf in report.leaves] == [1, 5]


def test_formulas_refuse_what_they_do_not_know():
    params = {"kernel": jnp.ones((4, 3))}
    with pytest.raises(
        ValueError, match="no formula for 'adam'; there are adamw, diffgrad, galore"
    ):
        published_numbers("adam", None, params)
    with pytest.raises(ValueError, match="no formula for 'adam'"):
        published_bytes("adam", None, params)
    with pytest.raises(ValueError, match="kernel: the formulas take one rank per matrix"):
        published_numbers("galore", oxs.LowRank((2, 1), projector=oxs.projectors.Tucker()), params)


def test_the_report_prints_as_a_table():
    params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
    spec = oxs.rules(("bias", None), default=oxs.LowRank(2))
    report = oxs.memory_report(oxs.galore(1e-3, spec), params, spec, method="galore")
    heading, bias, kernel, shared, total = str(report).splitlines()
    assert re.split(r"\s{2,}", heading)[-1] == "by formula"
    assert bias.split()[:4] == ["dense/bias", "(4,)", "float32", "bias"]
    assert re.split(r"\s{2,}", kernel)[3:6] == ["default", "2", "96"]
    assert kernel.split()[-1] == str(4 * 2 + 2 * 6 * 2)
    assert shared.startswith("shared")
    assert total.split()[3] == f"{report.state_bytes:,}" and total.split()[4] == "0"
    assert math.isclose(report.formula_numbers, 4 * 2 + 2 * 6 * 2 + 2 * 4)


def test_layers_that_repeat_are_one_row_and_their_bytes_are_added():
    params = {"layers": [{"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)} for _ in range(12)]}
    spec = oxs.rules(("bias", None), default=oxs.LowRank(4))
    report = oxs.memory_report(oxs.galore(1e-3, spec), params, spec, method="galore")
    _, bias, kernel, _, total = map(re.compile(r"\s{2,}").split, str(report).splitlines())
    assert bias[0] == "layers/{0..11}/bias (12 leaves)"
    assert kernel[:6] == [
        "layers/{0..11}/kernel (12 leaves)",
        "(64, 32)",
        "float32",
        "default",
        "4",
        f"{12 * 4 * 64 * 32:,}",
    ]
    assert kernel[-1] == f"{12 * 4 * (32 + 2 * 64):,}"
    assert total[-1] == f"{report.formula_numbers:,}"


def test_the_report_says_what_low_rank_does_not_serve():
    params = {"kernel": jnp.ones((64, 64)), "out": jnp.ones((64, 10)), "bias": jnp.ones(64)}
    spec = oxs.LowRank(40)
    galore = oxs.memory_report(oxs.galore(1e-3, spec), params, spec)
    assert galore.notes == (  # too small to be judged, not to be told
        "out takes 1,381 numbers of state, more than the 1,280 of plain Adam",
    )
    dct = oxs.memory_report(oxs.dct_adamw(1e-3, spec), params, spec)
    assert dct.notes[0].startswith("kernel takes 9,257 numbers of state, more than the 8,192 of pl")
    params = {**params, "out": jnp.ones((64, 20))}
    (note,) = oxs.memory_report(oxs.galore(1e-3, spec), params, spec).notes
    assert note.startswith("out stays plain: rank 20 of the matrix (64, 20) takes 2,960 numbers of")
    assert str(oxs.memory_report(oxs.galore(1e-3, spec), params, spec)).endswith(note)
