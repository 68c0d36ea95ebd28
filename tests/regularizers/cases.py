"""The table of regularizers that the property tests run over, each on a (rows, columns) leaf."""

import numpy as np

from optax_structured import regularizers as r

COLUMNS = {"group_axis": 1}

NORMS = [
    r.L1(),
    r.GroupLasso(**COLUMNS),
    r.GroupLasso(**COLUMNS, weight=0.5),
    r.SparseGroupLasso(**COLUMNS, l1_ratio=0.3),
]
NON_NEGATIVE = [r.NonNegative(), r.NonNegativeGroupLasso(**COLUMNS)]
CONVEX = [*NORMS, r.ElasticNet(l2=0.7), r.Box(-0.6, 0.9), *NON_NEGATIVE]
ENTRYWISE_FOLDED = [r.L0(), r.LHalf(), r.LTwoThirds(), r.MCP(0.5, 3.0), r.SCAD(0.5, 3.7)]
GROUPED_FOLDED = [r.GroupL0(**COLUMNS), r.GroupMCP(**COLUMNS, threshold=0.5, gamma=3.0)]
FOLDED = ENTRYWISE_FOLDED + GROUPED_FOLDED
SPARSE = CONVEX + FOLDED  # zero is where they lead
PENALTIES = [reg for reg in SPARSE if not reg.constraint]
COUPLED = [r.TotalVariation(axis=0), r.Simplex(**COLUMNS, total=2.0)]
CONVEX = CONVEX + COUPLED
EVERY = [*SPARSE, *COUPLED, r.DistanceToSign(), r.DistanceToSign(keep_zeros=True)]


def problem(seed, rows=6, columns=9, spread=2.0, dtype=np.float64):
    """A point, a metric over `spread` decades, with a dead entry and a dead column."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(rows, columns)) * 10 ** rng.uniform(-1, 1, (1, columns))
    u[0, 0], u[:, 1] = 0.0, 0.0
    metric = 10 ** rng.uniform(-spread / 2, spread / 2, (rows, columns))
    return u.astype(dtype), metric.astype(dtype)
