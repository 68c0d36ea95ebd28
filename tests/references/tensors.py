"""GaLore of tensors, whatever the factors are: those of a file are taken as they are recorded."""

import numpy as np
from references.low_rank import Adam


def tucker(h, w, grads):
    """Adam on the core of leaves with more than two axes."""
    optimizer, tensor, params, states = Adam(h), w.ndim > 2, [], []
    rng = np.random.default_rng(w.ndim)
    for t, g in enumerate(grads):
        if tensor and t % h["update_proj_gap"] == 0:
            sizes = zip(w.shape, h["rank"], strict=True)
            factors = [np.linalg.qr(rng.normal(size=size))[0] for size in sizes]
        update = optimizer(times(g, [f.T for f in factors]) if tensor else g)
        update = h["scale"] * times(update, factors) if tensor else update
        w = w - h["lr"] * optimizer.correction * update
        w = w - h["lr"] * h["weight_decay"] * w
        params.append(w)
        states.append({f"factor{i}": f for i, f in enumerate(factors)} if tensor else {})
    return params, states


def times(tensor, matrices):
    for axis, matrix in enumerate(matrices):
        tensor = np.moveaxis(np.tensordot(matrix, tensor, (1, axis)), 0, axis)
    return tensor
