"""How close is close: every tolerance of the tests, by dtype, in one place."""

import jax.numpy as jnp
import numpy as np

# Closed forms and exact solvers: a few dozen roundings.
ROUNDING = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}

# The same trajectory in another order of operations: jit, vmap, sharding, another library.
REORDERED = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 4e-2, "float16": 4e-3}

# The published data are float64: exact operators, and the authors' inexact solver.
GOLDEN = 1e-9
GOLDEN_INEXACT = 1e-6

# How far published runs with a known slip are from the right ones, at most.
RELEASED_STOP = 0.3
SHIFTED_ARCCOS = 2e-3

# Float64 trajectories against optax, which takes roots and powers of its counters in float32.
FLOAT32_COUNTERS = 1e-7

# Limits that a parameter of 1e9 or more stands for.
LIMIT = 1e-8


def rounding(dtype: object) -> float:
    """Relative tolerance for a result of this dtype."""
    return ROUNDING[jnp.dtype(dtype).name]


def reordered(dtype: object) -> float:
    """Relative tolerance for a few optimizer steps in this dtype."""
    return REORDERED[jnp.dtype(dtype).name]


def assert_close(actual: object, expected: object, rtol: float) -> None:
    """Every entry within `rtol` of the largest expected one, and exactly the same zeros."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_array_equal(actual == 0, expected == 0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * scale)


# The nuclear norm in a metric is iterated to a certified accuracy, not to rounding.
CERTIFIED = {"float64": 1e-9, "float32": 2e-3, "bfloat16": 2e-2}
# A few sweeps of alternating least squares and one closing step.
FACTORED = 5e-2

# The exact group solve, relative to the norm of the group: times 1 / (1 - t/||b||), the
# distance from the threshold, which no summation in that precision can undo. By metric spread.
SECULAR = {
    ("float64", 1e8): 1e-12,
    ("float64", 1e16): 1e-12,
    ("float32", 1e2): 2e-6,
    ("float32", 1e8): 2e-6,
    ("float32", 1e16): 1e-4,
}
# KKT residual of a float32 group solve, relative to the linear term.
KKT = 1e-5

# Distance to stationarity of a convex optimum that is computed independently.
OPTIMUM = 1e-10

# Columns that a projector calls orthonormal, whatever the gradient: largest entry of |P'P - I|.
ORTHONORMAL = {"float64": 1e-12, "float32": 1e-5}
# Share of the energy of an SVD that a cheap fit has to capture.
CAPTURED = 0.99
# Sample moments of random matrices with some 1e5 entries.
SAMPLED = 2e-2

# Published 8-bit runs are float32: an entry between two codes may fall to either side.
FLIPPED_CODES = 0.01
# Along a published 8-bit run, as its file says: this times the learning rate.
GOLDEN_8BIT_RUN = 3e-4
# How far sampled means and variances may be from the right ones, in standard errors.
STANDARD_ERRORS = 4.0

# What was recorded in another precision is known to its rounding.
GOLDEN_BY_DTYPE = {"float64": GOLDEN, "float32": 1e-4, "int32": 0.0, "int64": 0.0}
# Of a convex problem trained with mini-batches, relative to the optimal value.
OBJECTIVE_GAP = 1e-4

# Mean errors of 32 linear models of 256 weights, against the limit of many weights.
LEARNING_CURVE = 0.06

# Closed loops of a line search, whose long steps amplify rounding.
LINE_SEARCH = 1e-8
# A flat optimum that the published solver stops near.
BOUND = 1e-6

# Inverse products with small damping, which cancel.
IHVP = 1e-6
# The form for the newest gradient, in float32 at a damping of 1e-5.
NEWEST_GRADIENT = 1e-4
# Normal equations of a few digits fewer.
GAUSS_NEWTON = 1e-7
# Monte Carlo traces of some thousand probes.
EIGENVALUES = 0.1
