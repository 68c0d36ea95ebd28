"""The published trajectories of MADGRAD, which is RAMDA without a regularizer."""

import optax
import pytest
from golden_files import load, names
from replays.running import assert_run

import optax_structured as oxs


def madgrad(h):
    # MADGRAD adds eps to its learning rate, and RAMDA wants an eps above 0.
    rate, decay = h["lr"] + h["eps"], h["weight_decay"]
    plain = oxs.ramda(rate, momentum=h["momentum"], eps=max(h["eps"], 1e-60))
    if h.get("decouple_decay", False):
        return optax.chain(plain, optax.add_decayed_weights(-rate * decay))
    return optax.chain(optax.add_decayed_weights(decay), plain)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", names("madgrad-"))
def test_madgrad(name):
    golden = load(name)
    h = golden.settings()
    tx = madgrad(h)
    h.check_all_read()
    assert_run(golden, tx, same_zeros=True)
