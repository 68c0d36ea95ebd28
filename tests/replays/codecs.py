"""Codes of fixed inputs: the dynamic code of 8-bit states, and groups of integers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import Golden
from tolerances import rounding

import optax_structured as oxs
from optax_structured.quantization import codebook
from optax_structured.quantization import rounding as at_random


def dynamic(golden: Golden) -> None:
    """Codebooks, codes and scales bit for bit."""
    for name, expected in golden.leaves("codebook").items():
        got = codebook(8, signed=name == "signed")
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), err_msg=name)
    for name, codes in golden.leaves("code").items():
        leaf, how = name.split("/")
        settings = re.fullmatch(r"(signed|unsigned)_b(\d+)(_keepsign)?", how)
        assert settings, f"{golden.name} has codes of an unknown kind: {name}"
        kind, block, keepsign = settings.groups()
        signed = kind == "signed"
        published = bool(keepsign) or not signed
        codec = oxs.Dynamic(block=int(block), signed=signed, published=published)
        encoded = codec.encode(jnp.asarray(golden.leaves("input")[leaf]))
        for got, key in ((encoded.codes, "code"), (encoded.absmax, "absmax")):
            np.testing.assert_array_equal(got, golden.leaves(key)[name], err_msg=name)
        np.testing.assert_array_equal(codec.decode(encoded), golden.leaves("deq")[name], name)
        assert codes.size


def affine(golden: Golden) -> None:
    """To the nearest, and with the recorded draws."""
    for name, codes in golden.leaves("code").items():
        codec, x = _affine(golden, name)
        encoded = codec.encode(x)
        _equal(encoded.zero, golden.leaves("zero")[name], name)
        if codec.bits == 8:
            _equal(encoded.codes, codes, name)
        _close(encoded.scale, golden.leaves("scale")[name], name)
        _close(codec.decode(encoded, x.shape), golden.leaves("deq")[name], name)
    for name, expected in golden.leaves("sr_deq").items():
        codec, x = _affine(golden, name)
        uniform = jnp.asarray(golden.leaves("uniform")[name.split("/")[0]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(at_random, "draws", lambda _, x, draw=uniform: draw.reshape(x.shape))
            encoded = codec.encode(x, key=jax.random.key(0))
        _close(codec.decode(encoded, x.shape), expected, name)


def _affine(golden: Golden, name: str) -> tuple[oxs.Affine, jax.Array]:
    leaf, how = name.split("/")
    settings = re.fullmatch(r"b(\d+)g(\d+)", how)
    assert settings, f"{golden.name} has codes of an unknown kind: {name}"
    bits, group = map(int, settings.groups())
    return oxs.Affine(bits, group, published=True), jnp.asarray(golden.leaves("input")[leaf])


def _equal(got: jax.Array, expected: np.ndarray, name: str) -> None:
    np.testing.assert_array_equal(got.ravel(), expected.ravel(), err_msg=name)


def _close(got: jax.Array, expected: np.ndarray, name: str) -> None:
    """XLA multiplies by the reciprocal of a constant, which moves the last bit of a step."""
    tolerance = rounding(expected.dtype)
    np.testing.assert_allclose(got.ravel(), expected.ravel(), rtol=tolerance, err_msg=name)
