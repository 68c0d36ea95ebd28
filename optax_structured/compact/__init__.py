"""From exact zeros and low rank to a smaller program that computes the same, on the jaxpr."""

from optax_structured.compact.compact import Compacted, compact
from optax_structured.compact.couplings import couplings
from optax_structured.compact.export import save
from optax_structured.compact.picture import draw
from optax_structured.compact.report import Layer, Report
from optax_structured.compact.stuck import Stuck

__all__ = ["Compacted", "Layer", "Report", "Stuck", "compact", "couplings", "draw", "save"]
