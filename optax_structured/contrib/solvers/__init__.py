"""Solvers for problems of one kind each: transport, linear systems, convex networks, completion."""

from optax_structured.contrib.solvers.conjugate_directions import (
    ConjugateDirections,
    conjugate_directions,
)
from optax_structured.contrib.solvers.convex_relu import (
    ConvexReLU,
    activation_patterns,
    convex_relu,
    convex_relu_objective,
    recover_network,
)
from optax_structured.contrib.solvers.matrix_completion import (
    MatrixCompletion,
    alternating_least_squares,
)
from optax_structured.contrib.solvers.particle_flow import (
    Particles,
    particle_gradient_flow,
    prox_product_of_norms,
)
from optax_structured.contrib.solvers.sinkhorn_newton import TransportPlan, sinkhorn_newton

__all__ = [
    "ConjugateDirections",
    "ConvexReLU",
    "MatrixCompletion",
    "Particles",
    "TransportPlan",
    "activation_patterns",
    "alternating_least_squares",
    "conjugate_directions",
    "convex_relu",
    "convex_relu_objective",
    "particle_gradient_flow",
    "prox_product_of_norms",
    "recover_network",
    "sinkhorn_newton",
]
