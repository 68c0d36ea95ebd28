"""What the curvature says: products, spectra, stability, and steps that use it."""

from optax_structured.curvature.density import Density, SpectrumSummary, smooth, summarize
from optax_structured.curvature.dual_gauss_newton import (
    DualGaussNewtonState,
    dual_solution,
    mean_square,
    scale_by_dual_gauss_newton,
)
from optax_structured.curvature.empirical_fisher import EmpiricalFisher, empirical_fisher_ihvp
from optax_structured.curvature.lanczos import lanczos, quadrature
from optax_structured.curvature.masking import mask_modules
from optax_structured.curvature.mfac import MfacState, mfac, scale_by_mfac
from optax_structured.curvature.modules import (
    ModularState,
    modular_adaptive,
    select_modules,
    temporal_stop,
)
from optax_structured.curvature.products import ggn_vp, hvp, output_kernel, per_example
from optax_structured.curvature.smoothness import GnsState, gns_radius_update, scale_by_gns
from optax_structured.curvature.spectrum import hessian_density, layer_masks, spectral_density
from optax_structured.curvature.stability import (
    StabilityReport,
    hutchinson,
    max_stable_learning_rate,
    second_moment_radius,
    softmax_root,
    stability_report,
)
from optax_structured.curvature.tangent_kernel import mntk_eigenvalues

__all__ = [
    "Density",
    "DualGaussNewtonState",
    "EmpiricalFisher",
    "GnsState",
    "MfacState",
    "ModularState",
    "SpectrumSummary",
    "StabilityReport",
    "dual_solution",
    "empirical_fisher_ihvp",
    "ggn_vp",
    "gns_radius_update",
    "hessian_density",
    "hutchinson",
    "hvp",
    "lanczos",
    "layer_masks",
    "mask_modules",
    "max_stable_learning_rate",
    "mean_square",
    "mfac",
    "mntk_eigenvalues",
    "modular_adaptive",
    "output_kernel",
    "per_example",
    "quadrature",
    "scale_by_dual_gauss_newton",
    "scale_by_gns",
    "scale_by_mfac",
    "second_moment_radius",
    "select_modules",
    "smooth",
    "softmax_root",
    "spectral_density",
    "stability_report",
    "summarize",
    "temporal_stop",
]
