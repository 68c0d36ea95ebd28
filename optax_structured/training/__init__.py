"""Training a small network on real images with any recipe by name; needs the extra `train`."""
