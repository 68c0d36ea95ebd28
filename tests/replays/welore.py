"""WeLore: ranks from spectra."""

import numpy as np
from golden_files import Golden
from replays.running import path
from tolerances import rounding

from optax_structured.weights import factorize, merge
from optax_structured.weights.welore import singular_values, welore_plan


def welore(golden: Golden) -> None:
    h = golden.settings()
    weights, summaries = golden.leaves("weights"), h["summary"]
    published = {"min_ratio": h["min_ratio"]}
    assert [s["threshold"] for s in summaries] == h["thresholds"]
    h.check_all_read()
    leaf_of = {path(leaf): leaf for leaf in weights}
    for name, s in singular_values(weights).items():
        expected = golden.arrays[f"singular_values/{leaf_of[name]}"]
        atol = rounding("float32") * np.max(expected)
        np.testing.assert_allclose(s, expected, rtol=0, atol=atol, err_msg=name)
    for summary in summaries:
        threshold = summary["threshold"]
        plan = welore_plan(weights, threshold=threshold, **published)
        factored = merge(factorize(weights, plan))
        assert {entry.path for entry in plan.entries} == leaf_of.keys()
        for entry in plan.entries:
            leaf = leaf_of[entry.path]
            key = f"{leaf}/t{threshold}"
            kept = max(golden.arrays[f"kept_rank/{key}"], 1)  # here one is always kept
            assert entry.kept == kept, key
            assert (entry.rank is not None) == golden.arrays[f"is_lrc/{key}"], key
            if entry.rank is not None:
                w, expected = factored[leaf], golden.arrays[f"compressed/{key}"]
                atol = rounding("float32") * np.linalg.norm(expected)
                np.testing.assert_allclose(w, expected, rtol=0, atol=atol, err_msg=key)
        for ours, theirs in (
            ("attempted_reduction", "attempted_reduction"),
            ("effective_reduction", "effective_reduction_lrc_only"),
        ):
            np.testing.assert_allclose(getattr(plan, ours), summary[theirs])
