"""Gradients between machines: sketched to fewer numbers, coded against slow workers."""

from optax_structured.contrib.communication.gradient_coding import GradientCode, gradient_code
from optax_structured.contrib.communication.sketching import (
    Sketch,
    SketchedUpdatesState,
    draw_sketch,
    sketch_of,
    sketched_updates,
)
from optax_structured.contrib.communication.stragglers import (
    CodedRounds,
    Multiplexed,
    SelectiveRepeat,
    Simulation,
    simulate,
)

__all__ = [
    "CodedRounds",
    "GradientCode",
    "Multiplexed",
    "SelectiveRepeat",
    "Simulation",
    "Sketch",
    "SketchedUpdatesState",
    "draw_sketch",
    "gradient_code",
    "simulate",
    "sketch_of",
    "sketched_updates",
]
