"""From exact zeros and low rank to a smaller program that computes the same, on the jaxpr."""

from optax_structured.compact.compact import Compacted, compact
from optax_structured.compact.export import save
from optax_structured.compact.report import Layer, Report

__all__ = ["Compacted", "Layer", "Report", "compact", "save"]
