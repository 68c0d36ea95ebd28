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


def invoke(*arguments):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", *map(str, arguments)])
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def test_the_published_case():
    code, said = invoke("llama-7b", "--recipe", "galore", "--rank", 1024, "--mesh", "fsdp=8")
    assert code == 0, said
    assert "llama-7b: 6,738,415,616 parameters in 291 leaves" in said
    assert "26.9537 GB → 9.40" in said  # at two bytes a number, as published tables count
    # float32: in total, and an eighth on each of the devices.
    assert re.search(r"weights 26\.9537 GB 26\.9537 GB 3\.3692 GB 3\.3692 GB", said)
    assert re.search(r"optimizer state 53\.9073 GB 18\.\d+ GB 65\.1% 6\.7384 GB 2\.\d+ GB", said)
    assert re.search(r"layers/\*/mlp/gate/kernel 32 4096×11008 1024 ", said)


def test_each_device_holds_its_share():
    for stacked in (False, True):
        params = planning.named_model("llama-1b", jnp.float32, stacked=stacked)
        structure = planning.low_rank_rules(oxs.LowRank(512), params)
        made = planning.make_plan("llama-1b", params, "galore", structure, {"fsdp": 8})
        assert made.per_device["weights"] == made.before.weight_bytes / 8
        assert made.per_device["after"] <= 1.05 * made.after.state_bytes / 8
        alone = planning.make_plan("llama-1b", params, "galore", structure, {})
        assert alone.per_device["after"] == alone.after.state_bytes


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
    assert "block/kernel 1 64×32 4 " in said
    code, said = invoke("--params-json", path, "--rank", 4, "--plain", "block")
    assert "no leaf" in said or code == 0


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", "one entry a parameter"),
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
        (("llama-60m", "--recipe", "adam"), "no recipe 'adam'; choose one of adamw, galore"),
        (("llama-60m", "--mesh", "8"), "--mesh takes NAME=SIZE"),
        (("llama-60m", "--dtype", "f99"), "--dtype f99: no such dtype"),
        (("llama-60m", "--rank", "0"), "rank must be at least 1"),
        (("--params-json", "nowhere.json"), "No such file"),
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
