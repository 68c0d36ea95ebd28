"""The `plan` command: bytes before anything is allocated, in total and on each device."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import optax_structured as oxs
from optax_structured import planning
from optax_structured.cli import app
from optax_structured.memory import PLAIN_LEAVES
from optax_structured.planning import collectives, tpu


def invoke(*arguments):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", *map(str, arguments)])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_the_published_case():
    code, said = invoke("llama-7b", "--recipe", "galore", "--rank", 1024, "--mesh", "fsdp=8")
    assert code == 0, said
    assert "llama-7b: 6,738,415,616 parameters in 291 leaves" in said
    assert "26.9537 GB → 9.40" in said  # at two bytes a number, as published tables count
    # float32: in total, and an eighth on each of the devices.
    assert "weights 26.9537 GB 26.9537 GB" in said and "weights 3.3692 GB 3.3692 GB" in said
    assert re.search(r"optimizer state 53\.9073 GB 18\.\d+ GB 65\.1%", said)
    assert re.search(r"optimizer state 6\.7384 GB 2\.\d+ GB", said)
    assert "On each of 8 devices" in said
    assert "Activations and the temporaries of a step are not counted" in said
    assert re.search(r"layers/\{0\.\.31\}/mlp/gate/kernel \(32 leaves\) 4096×11008 1024 ", said)


def test_each_device_holds_its_share():
    for stacked in (False, True):
        params = planning.named_model("llama-60m", jnp.float32, stacked=stacked)
        structure = planning.low_rank_rules(oxs.LowRank(128), params)
        made = planning.make_plan("llama-60m", params, "galore", structure, {"fsdp": 8})
        assert made.per_device["weights"] == made.before.weight_bytes / 8
        assert made.per_device["after"] <= 1.05 * made.after.state_bytes / 8
        alone = planning.make_plan("llama-60m", params, "galore", structure, {})
        assert alone.per_device["after"] == alone.after.state_bytes


@pytest.mark.slow
@pytest.mark.parametrize("bits, width, block", [(8, 1 + 4 / 256, 256), (4, 1 / 2 + 4 / 128, 128)])
def test_moments_in_codes(bits, width, block):
    code, said = invoke("llama-60m", "--recipe", "adamw", "--state-bits", bits)
    assert code == 0, said
    assert f"adamw, {bits}-bit state" in said and f"scale for each {block} of them" in said
    small = 17 * 512  # norms, in float32
    size = 2 * width * (58_073_600 - small) + 8 * small + 4
    assert f"0.4646 GB {size / 1e6:,.3f} MB" in said or f"0.4646 GB {size / 1e9:,.4f} GB" in said


def test_bits_of_every_recipe():
    shapes = {"kernel": (256, 512), "embed": (512, 256)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    structure = planning.low_rank_rules(oxs.LowRank(64), params)
    for recipe in planning.RECIPES:
        made = {
            bits: planning.make_plan("tiny", params, recipe, structure, {}, bits)
            for bits in (None, 32, 8, 4)
        }
        sizes = {bits: plan.after.state_bytes for bits, plan in made.items()}
        assert sizes[4] < sizes[8] < sizes[32]
        assert sizes[None] == sizes[8 if recipe == "q_galore" else 32]
        assert all(plan.per_device["after"] == plan.after.state_bytes for plan in made.values())


def test_q_galore_holds_weights_in_one_byte():
    code, said = invoke("llama-7b", "--recipe", "q_galore", "--stacked")
    assert code == 0, said
    projected, rest = 6_476_005_376, 262_410_240
    held = (1 + 5 / 256) * projected + 4 * rest
    assert f"weights 26.9537 GB {held / 1e9:.4f} GB" in said
    assert "q_galore, 8-bit state" in said and "as quantize_weights holds them" in said
    params = planning.named_model("llama-60m", jnp.float32, stacked=True)
    structure = planning.low_rank_rules(oxs.LowRank(128), params)
    table = oxs.rules((PLAIN_LEAVES, None), default=oxs.Affine())
    weights = jax.eval_shape(lambda x: oxs.weights.quantize_weights(x, table), params)
    made = planning.make_plan("llama-60m", params, "q_galore", structure, {})
    assert made.weight_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
    assert made.per_device["weights"] == made.weight_bytes


def test_blocks_that_lie_across_devices_are_shared_out_too():
    """Of (768, 768), eight devices hold (768, 96) each, and 96 rows of its codes."""
    params = planning.named_model("llama-130m", jnp.float32, stacked=True)
    structure = planning.low_rank_rules(oxs.LowRank(256), params)
    alone = planning.make_plan("llama-130m", params, "galore", structure, {}, 8)
    made = planning.make_plan("llama-130m", params, "galore", structure, {"fsdp": 8}, 8)
    assert (alone.moments.block, made.moments.block) == (256, 256)
    assert alone.after.state_bytes == made.after.state_bytes
    assert made.per_device["after"] <= 1.05 * made.after.state_bytes / 8


PROGRAM = """
%body (p: f32[]) -> f32[] {
  %g = f32[4,8]{1,0} all-gather(%x), dimensions={0}
}
%refit (p: f32[]) -> f32[] {
  %r = (f32[2,2]{1,0}, s32[]) all-reduce-start(%x), to_apply=%sum
}
%keep (p: f32[]) -> f32[] {
  %k = f32[] copy(%x)
}
%four (p: f32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={op_name="lt"}
}
ENTRY %main (p: f32[]) -> f32[] {
  %w = f32[] while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = f32[] while(%x), condition=%four, body=%body
  %b = f32[] conditional(%p, %x, %x), branch_computations={%keep, %refit}, metadata={op_name="b"}
  %p = bf16[16]{0} collective-permute(%x), source_target_pairs={{0,1}}
}
"""


def test_traffic_counts_the_turns_of_loops_and_refits_apart():
    always, at_most = collectives.traffic(PROGRAM)
    assert always == {"all-gather": (3 + 4) * 128, "collective-permute": 32}
    assert at_most == {**always, "all-reduce": 2 * (16 + 4)}


def test_chips(monkeypatch):
    monkeypatch.setattr(tpu, "is_here", lambda: False)
    options = ("--stacked", "--rank", 1024, "--chip", "v5e")
    code, said = invoke("llama-7b", *options, "--mesh", "fsdp=256")
    assert code == 0, said
    assert "of the 16.0000 GB of a v5e: it fits" in said
    assert "pip install 'optax-structured[tpu-compile]'" in said
    code, said = invoke("llama-7b", *options, "--mesh", "fsdp=4")
    assert code == 0 and "it does not fit" in said, said
    assert "these fit: --recipe adamw --state-bits 8, " not in said
    assert "--recipe q_galore --state-bits 8, " in said
    code, said = invoke("llama-60m", "--chip", "v9")
    assert code == 2 and "no such chip; there are v5e, v5p, v6e" in said


@pytest.mark.slow
@pytest.mark.skipif(not tpu.is_here(), reason=tpu.MISSING)
def test_the_compiled_step_of_a_plan():
    options = ("--stacked", "--rank", 128, "--chip", "v5e", "--mesh", "fsdp=4")
    code, said = invoke("llama-60m", *options)
    assert code == 0 and "The compiled step of the optimizer (libtpu" in said, said


def test_shapes_from_json(tmp_path):
    path = tmp_path / "shapes.json"
    shapes = {"block/kernel": [64, 32], "bias": {"shape": [32], "dtype": "bfloat16"}}
    path.write_text(json.dumps(shapes))
    params = planning.read_params(path, "float16")
    assert {k: (v.shape, v.dtype.name) for k, v in params.items()} == {
        "block/kernel": ((64, 32), "float16"),
        "bias": ((32,), "bfloat16"),
    }
    code, said = invoke("--params-json", path, "--rank", 4)
    assert code == 0, said
    assert "shapes: 2,080 parameters in 2 leaves" in said
    assert "block/kernel 64×32 4 " in said
    code, said = invoke("--params-json", path, "--rank", 4, "--plain", "block")
    assert code == 2 and "the rules leave 'block/kernel' and all other leaves plain" in said


def test_a_rank_that_saves_nothing_speaks(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"narrow/kernel": [512, 10], "wide/kernel": [512, 512]}))
    code, said = invoke("--params-json", path)
    assert code == 0, said
    assert "wide/kernel 512×512 128 " in said
    assert "narrow/kernel stays plain: rank 10 of the matrix (512, 10) takes 10,340 numbers" in said
    assert "saved -" not in said
    for options in (("--params-json", path), ("llama-60m",)):
        code, said = invoke(*options, "--rank", 5000)
        assert code == 2
        assert "no leaf can be projected" in said and "plain Adam" in said


def test_error_feedback_that_saves_nothing_speaks():
    """Its buffer is as long as the leaf: with more than half the rank, more than plain Adam."""
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    for rank, says in ((64, False), (300, True)):
        structure = planning.low_rank_rules(oxs.LowRank(rank), params)
        made = planning.make_plan("tiny", params, "dct_adamw", structure, {})
        assert (made.after.state_bytes > made.before.state_bytes) == says
        assert [note[:17] for note in made.after.notes] == ["kernel takes 569,"] * says


def test_attention_heads_are_told_by_their_names(tmp_path):
    """Query, key and value (in, heads, size) beside out (heads, size, in), stacked or not."""
    attention = {part: [512, 8, 64] for part in ("query", "key", "value")} | {"out": [8, 64, 512]}
    for stack in ([], [6]):
        shapes = {f"attention/{part}/kernel": stack + x for part, x in attention.items()}
        path = tmp_path / "shapes.json"
        path.write_text(json.dumps({**shapes, "attention/query/bias": [*stack, 8, 64]}))
        params = planning.read_params(path, "float32")
        structure = planning.low_rank_rules(oxs.LowRank(128), params)
        for item in structure.assign(params):
            if item.path in shapes:
                assert item.value.axes.matrix_shape(item.leaf.shape) == (*stack, 512, 512)
        code, said = invoke("--params-json", path)
        assert code == 0, said
        assert re.search(r"optimizer state 8?\d+.*? 62\.\d%", said), said
    dense = {f"layers/attention/{part}/kernel": [32, 64, 64] for part in attention}
    path.write_text(json.dumps(dense))  # a stack of dense kernels with the same names
    params = planning.read_params(path, "float32")
    assert planning.low_rank_rules(oxs.LowRank(16), params) == oxs.rules(default=oxs.LowRank(16))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", "one entry per parameter"),
        ('{"a": "b"}', "'a' must be a shape such as [512, 512]"),
        ('{"a": {"dtype": "float32"}}', "'a' must be a shape"),
        ('{"a": {"shape": [2], "dtype": "no"}}', "'a' must be a shape"),
    ],
)
def test_bad_shape_files_are_explained(tmp_path, content, message):
    path = tmp_path / "shapes.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        planning.read_params(path, "float32")


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "give one of llama-60m"),
        (("llama-2b",), "no model 'llama-2b'; there are llama-60m"),
        (
            ("llama-60m", "--recipe", "adam"),
            "no recipe 'adam'; choose one of adamw, diffgrad, galore",
        ),
        (("llama-60m", "--mesh", "8"), "--mesh takes NAME=SIZE"),
        (("llama-60m", "--dtype", "f99"), "--dtype f99: no such dtype"),
        (("llama-60m", "--state-bits", "16"), "state_bits must be one of 32, 8, 4, got 16"),
        (("llama-60m", "--rank", "0"), "rank must be at least 1"),
        (("--params-json", "nowhere.json"), "nowhere.json: no such file"),
    ],
)
def test_mistakes_are_sentences(options, message):
    code, said = invoke(*options)
    assert code == 2
    assert message in said


def test_leaves_are_spread_over_as_many_devices_as_divide_them():
    leaves = {"wide": (8, 64), "stack": (32, 4, 6), "odd": (3, 5), "gain": ()}
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in leaves.items()}
    placed = planning.place(params, {"fsdp": 4, "tensor": 2})
    local = {name: x.sharding.shard_shape(x.shape) for name, x in placed.items()}
    assert local == {"wide": (8, 8), "stack": (32, 1, 3), "odd": (3, 5), "gain": ()}


@pytest.mark.parametrize("columns", [60, 80])
def test_names_are_whole_on_narrow_screens(columns):
    runner = CliRunner(env={"COLUMNS": str(columns)})
    said = runner.invoke(app, ["plan", "llama-60m", "--mesh", "fsdp=8"]).output
    names = ("embed/embedding", "layers/{0..7}/attention/query/kernel", "shared by all leaves")
    for name in names:
        assert any(line.startswith(name) for line in said.splitlines()), name
    assert max(map(len, said.splitlines())) <= columns


def test_leaves_of_different_shapes_have_different_names(tmp_path):
    path = tmp_path / "shapes.json"
    path.write_text('{"Dense_0/kernel": [512, 256], "Dense_1/kernel": [256, 128]}')
    _, said = invoke("--params-json", path, "--rank", 16)
    assert "Dense_0/kernel 512×256 16" in said and "Dense_1/kernel 256×128 16" in said


@pytest.mark.slow
def test_the_largest_rank_that_fits_a_budget(tmp_path):
    shapes = {"wide/kernel": (256, 512), "square/kernel": (128, 128), "bias": (512,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def structure(rank):
        return planning.low_rank_rules(oxs.LowRank(rank), params)

    def plan(rank, mesh, recipe):
        return planning.make_plan("", params, recipe, structure(rank), mesh)

    # The last rank that pays for a leaf; with error feedback, for all of them together.
    for mesh, recipe, last in (
        ({}, "galore", 204),
        ({"fsdp": 8}, "galore", 204),
        ({}, "ldadam", 102),
    ):
        each = plan(50, mesh, recipe).per_device
        budget = sum(each[part] for part in ("gradients", "weights", "after"))
        for size, rank in ((budget, 50), (budget - 1, 49), (10 * budget, last)):
            assert planning.largest_rank(params, recipe, structure, mesh, size) == rank
    assert plan(102, {}, "ldadam").after.state_bytes <= each["before"]
    assert plan(103, {}, "ldadam").after.state_bytes > each["before"]
    with pytest.raises(ValueError, match="rank 1 needs 0.00.* GB on the fullest device"):
        planning.largest_rank(params, "galore", structure, {}, 10**6)
    code, said = invoke("llama-60m", "--budget", 1, "--rank", 4)
    assert code == 2 and "give --rank or --budget" in said
    for recipe in ("adamw", "apollo_mini"):
        code, said = invoke("llama-60m", "--budget", 1, "--recipe", recipe)
        assert code == 2 and f"{recipe} has no rank to choose" in said
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(shapes))
    code, said = invoke("--params-json", path, "--budget", 0.0016)
    assert code == 0, said
    assert "The largest rank that fits into 0.0016 GB is" in said
