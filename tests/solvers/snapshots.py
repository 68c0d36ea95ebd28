"""Subproblems with their solutions, and what the authors' solver makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN_DIR = Path(__file__).parent.parent / "golden"


def snapshots(name):
    """One pytest parameter a case: its `meta` and its arrays, in float64."""
    data = np.load(GOLDEN_DIR / f"subproblem-{name}.npz")
    cases = json.loads(str(data["meta"]))["cases"]
    arrays = [
        {k.split("/")[1]: data[k].astype(np.float64) for k in data if k.startswith(case["key"])}
        for case in cases
    ]
    return [
        pytest.param(case | found | {"b": found["P"] * found["W0"] - found["V"]}, id=case["name"])
        for case, found in zip(cases, arrays, strict=True)
        if "W0" in found
    ]


def arguments(case):
    """What a solver is given."""
    return case["V"], case["P"], case["W0"], case["tau"], case["warm"]


def quadratic(b, metric, w):
    return np.sum(0.5 * metric * w * w - b * w)
