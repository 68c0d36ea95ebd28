"""Where parameters and states live on a mesh of devices, and products that keep them there."""

from optax_structured.meshes.shardings import choose_sides, state_shardings

__all__ = ["choose_sides", "state_shardings"]
