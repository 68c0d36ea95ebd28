"""What all replays do: run the steps of a file, and compare with what it recorded."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_files import Golden, Settings
from tolerances import GOLDEN_BY_DTYPE

import optax_structured as oxs
from optax_structured.trees.paths import name_of_key, state_key

Look = Callable[[Any, Any], Mapping[str, Mapping[str, Any]]]


def trajectory(tx: optax.GradientTransformation, golden: Golden) -> Iterator[tuple[Any, Any]]:
    """State and parameters after each step."""
    current = {name: jnp.asarray(x) for name, x in golden.start.items()}
    state = tx.init(current)

    @jax.jit
    def step(grads, state, current):
        updates, state = tx.update(grads, state, current)
        return optax.apply_updates(current, updates), state

    for grads in golden.steps("grads"):
        current, state = step(grads, state, current)
        yield state, current


def assert_run(
    golden: Golden,
    tx: optax.GradientTransformation,
    look: Look = lambda state, params: {},
    *,
    target: str = "params",
    tolerance: float | None = None,
    same_zeros: bool = False,
) -> None:
    """The parameters after each step, and what `look` finds of the recorded state.

    `look(state, params)` gives `{name: {leaf: array}}` in the layout of the file; of what the file
    did not record it may give more.
    """
    expected = golden.steps(target)
    for t, (state, current) in enumerate(trajectory(tx, golden)):
        rows = [(target, leaf, current[leaf], x) for leaf, x in expected[t].items()]
        for name, leaves in look(state, current).items():
            recorded = golden.leaves(f"state/{name}")
            for leaf in leaves.keys() & recorded.keys():
                rows.append((f"state/{name}", leaf, leaves[leaf], recorded[leaf][t]))
        for key, leaf, got, x in rows:
            where = f"{golden.name}: {key}/{leaf} after step {t + 1}"
            got, x = np.asarray(got), np.asarray(x)
            assert got.shape == x.shape, where
            assert got.dtype == x.dtype or key != target, where
            # What is fed back may be rounding error alone.
            whole = golden.leaves("grads")[leaf] if key.startswith("state/error") else x
            atol = (tolerance or GOLDEN_BY_DTYPE[x.dtype.name]) * largest(whole)
            np.testing.assert_allclose(got, x, rtol=0, atol=atol, err_msg=where)
            if same_zeros:
                np.testing.assert_array_equal(got == 0, x == 0, err_msg=where)


def largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def rate(golden: Golden, h: Settings) -> Any:
    """The learning rate: a number, or a schedule where the file lists one a step."""
    if "lr_per_step" not in h:
        return h["lr"]
    h.pass_over("lr")
    per_step = np.asarray(h["lr_per_step"], np.float64)
    assert len(per_step) == golden.meta["steps"]
    return lambda count: jnp.asarray(per_step)[count]


def adam(h: Settings) -> dict[str, Any]:
    """The settings that all recipes with an Adam inside share."""
    b1, b2 = h["betas"]
    return {"b1": b1, "b2": b2, "eps": h["eps"]}


def by_name(specs: Mapping[str, Any]) -> Any:
    """`rules` that give each leaf its own, whatever its name may look like, and others nothing."""
    pairs = ((f"^{re.escape(path(name))}$", spec) for name, spec in specs.items())
    return oxs.rules(*pairs, default=None)


def path(leaf: str) -> str:
    """The path of a leaf, for which ":" is as good as "/"."""
    return name_of_key(state_key(leaf))


def held(golden: Golden, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """What a state holds by key, by leaf."""
    return {leaf: mapping[key] for leaf in golden.start if (key := state_key(leaf)) in mapping}


def find(state: Any, kind: type) -> Any:
    """The first state of this kind, wherever it is in a state."""
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return next(node for node in found if isinstance(node, kind))
