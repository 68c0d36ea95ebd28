"""`optax-structured compact`: the network of a run without what is dead in it."""

import jax
import numpy as np
import pytest
from cli_runs import IMAGES, invoke


@pytest.mark.slow
def test_a_run_on_images(tmp_path):
    run = tmp_path / "run"
    options = [*IMAGES[:2], "--epochs", 1, "--batch-size", 128, "--recipe", "ramda"]
    code, said = invoke("train", *options, "--out", run, "--compact")
    assert code == 0, said
    assert "compact: parameters" in said
    assert (run / "compact/layers.png").exists()
    program = jax.export.deserialize(bytearray((run / "compact/program.stablehlo").read_bytes()))
    arrays = [*np.load(run / "compact/params.npz").values()]
    images = program.in_avals[-1]
    logits = program.call(arrays, np.ones(images.shape, images.dtype))
    assert logits.shape == (128, 10)


def test_another_folder_is_a_sentence(tmp_path):
    code, said = invoke("compact", tmp_path)
    assert code == 2 and "is not a run folder" in said
