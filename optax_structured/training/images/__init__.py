"""The first main job: classify real images with a network that ends up exactly structured."""
