"""The low-rank methods in NumPy, a leaf at a time, as their equations are written.

Each takes the settings of a golden file, the shape and the gradients (steps, ...) of one leaf, and
gives its parameters after each step, and what a file records of its state.
"""

import numpy as np


def projected(w):
    return w.ndim == 2


class Basis:
    """The leading singular vectors of a gradient, on one side or on both."""

    def __init__(self, h, shape):
        m, n = shape
        small = "right" if m >= n else "left"
        large = "left" if m >= n else "right"
        kind = h.get("proj_type", "std")
        self.side = {"std": small, "reverse_std": large}.get(kind, kind)
        self.rank, self.left, self.right = min(h["rank"], m, n), None, None
        self.raw = h.get("raw_signs", False)

    def fit(self, g):
        u, _, vt = np.linalg.svd(g, full_matrices=False)
        u, v = u[:, : self.rank], vt[: self.rank].T
        for vectors in (u, v):
            largest = vectors[np.argmax(np.abs(vectors), axis=0), np.arange(self.rank)]
            vectors *= np.sign(largest) * (-1 if self.raw else 1)
        self.left = u if self.side in ("left", "full") else None
        self.right = v.T if self.side in ("right", "full") else None

    def down(self, g):
        g = g if self.left is None else self.left.T @ g
        return g if self.right is None else g @ self.right.T

    def back(self, r):
        r = r if self.left is None else self.left @ r
        return r if self.right is None else r @ self.right

    def record(self):
        if self.side == "full":
            return {"projector_left": self.left, "projector_right": self.right}
        return {"projector": self.left if self.side == "left" else self.right}


class Adam:
    def __init__(self, h):
        (self.b1, self.b2), self.eps, self.corrected = (
            h["betas"],
            h["eps"],
            h.get("correct_bias", 1),
        )
        self.m = self.v = 0.0
        self.t = 0

    def __call__(self, r):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * r
        self.v = self.b2 * self.v + (1 - self.b2) * r**2
        return self.m / (np.sqrt(self.v) + self.eps)

    @property
    def correction(self):
        root = np.sqrt(1 - self.b2**self.t)
        return root / (1 - self.b1**self.t) if self.corrected else 1.0


class RMSProp:
    correction = 1.0

    def __init__(self, h):
        self.h, self.v, self.mean, self.buffer = h, 0.0, 0.0, 0.0

    def __call__(self, r):
        b = self.h["beta"]
        self.v = b * self.v + (1 - b) * r**2
        self.mean = b * self.mean + (1 - b) * r
        variance = self.v - self.mean**2 if self.h["centered"] else self.v
        self.buffer = self.h["momentum"] * self.buffer + r / (np.sqrt(variance) + self.h["eps"])
        return self.buffer


def galore(h, w, grads, inner=Adam, scale="scale", residual=None):
    optimizer, basis = inner(h), Basis(h, w.shape) if projected(w) else None
    rates = h.get("lr_per_step") or [h["lr"]] * len(grads)
    params, states = [], []
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True)):
        if basis is None:
            update, state = optimizer(g), {}
        else:
            if t % h["update_proj_gap"] == 0:
                basis.fit(g)
            r = basis.down(g)
            n = optimizer(r)
            update, state = h[scale] * basis.back(n), basis.record()
            if inner is Adam and not residual:
                state |= {"mu": optimizer.m, "nu": optimizer.v}
            if residual:
                left_over, norm = residual(r, n, g - h[scale] * basis.back(r), basis.side)
                update, state = update + left_over, state | {"limiter_norm": norm}
        w = w - lr * optimizer.correction * update
        w = w - lr * h.get("weight_decay", 0.0) * w
        params.append(w)
        states.append(state)
    return params, states


def with_raw_signs(h, w, grads):
    return galore(h | {"raw_signs": True}, w, grads)


def fira(h, w, grads, inner=Adam):
    gamma, last = h["limiter_gamma"], None

    def residual(r, n, left_over, side):
        nonlocal last
        axis = 0 if side == "left" else 1
        norms = [np.linalg.norm(x, axis=axis, keepdims=True) for x in (n, r)]
        s = norms[0] / (norms[1] + 1e-8) * left_over
        size = np.linalg.norm(s)
        limit = 1.0 if last is None else max(size / (last + 1e-8), gamma) / gamma
        last = size / limit
        return s / limit, last

    return galore(h, w, grads, inner, "alpha", residual)


def galore_rmsprop(h, w, grads):
    return galore(h, w, grads, RMSProp)


def fira_rmsprop(h, w, grads):
    return fira(h, w, grads, RMSProp)


def adafactor(h, w, grads):
    basis = Basis(h, w.shape) if projected(w) else None
    row = col = full = m = 0.0
    params, states = [], []
    for t, g in enumerate(grads):
        s = t + 1
        lr = h["lr"]
        if h["relative_step"]:
            lr = min(1e-6 * s if h["warmup_init"] else 1e-2, 1 / np.sqrt(s))
        if h["scale_parameter"]:
            lr = lr * max(h["eps"][1], np.sqrt(np.mean(w**2)))
        if basis is not None and t % h["update_proj_gap"] == 0:
            basis.fit(g)
        r = g if basis is None else basis.down(g)
        b2, squares = 1 - s ** h["decay_rate"], r**2 + h["eps"][0]
        if r.ndim == 2:
            row = b2 * row + (1 - b2) * squares.mean(-1)
            col = b2 * col + (1 - b2) * squares.mean(-2)
            u = r / np.sqrt((row / row.mean())[:, None] * col[None, :])
        else:
            full = b2 * full + (1 - b2) * squares
            u = r / np.sqrt(full)
        u = lr * u / max(1.0, np.sqrt(np.mean(u**2)) / h["clip_threshold"])
        if h["beta1"] is not None:
            u = m = h["beta1"] * m + (1 - h["beta1"]) * u
        u = u if basis is None else h["scale"] * basis.back(u)
        w = w - h["weight_decay"] * lr * w
        w = w - u
        params.append(w)
        states.append({} if basis is None else basis.record())
    return params, states


def grad_norm_lorp(h, w, grads):
    """As released: a step of the magnitudes lasts until the next gradient."""
    length = lambda x: np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    v, basis = w, Basis(h, w.shape) if projected(w) else None
    direction, magnitude, params, states = Adam(h), Adam(h), [], []
    decay = 1 - h["lr"] * h["weight_decay"]
    for t, g in enumerate(grads):
        size = length(v)
        along = np.sum(g * v / size, -1, keepdims=True)
        if basis is not None and t % h["update_proj_gap"] == 0:
            basis.fit(g)
        n = direction(g if basis is None else basis.down(g))
        back = n if basis is None else h["scale"] * basis.back(n)
        v = decay * (v - h["lr"] * direction.correction * back)
        step = magnitude(along)
        size = decay * (size - h["lr"] * magnitude.correction * step)
        params.append(size * v / length(v))
        states.append({"v": v, "g": size} | ({} if basis is None else basis.record()))
    return params, states


def weight_norm(h, w, grads):
    """As meant: the chain rule of g v/||v||, measured with ||v|| = g, of the projected leaves."""
    if not projected(w):
        return galore(h, w, grads)
    basis, direction, magnitude, params, states = Basis(h, w.shape), Adam(h), Adam(h), [], []
    for t, g in enumerate(grads):
        size = np.linalg.norm(w, axis=-1, keepdims=True)
        along = np.sum(g * w / size, -1, keepdims=True)
        across = g - along * w / size
        if t % h["update_proj_gap"] == 0:
            basis.fit(across)
        n, step = direction(basis.down(across)), magnitude(along)
        v = w - h["lr"] * direction.correction * h["scale"] * basis.back(n)
        size = size - h["lr"] * magnitude.correction * step
        size = size * (1 - h["lr"] * h["weight_decay"])
        w = size * v / np.linalg.norm(v, axis=-1, keepdims=True)
        params.append(w)
        states.append(basis.record())
    return params, states


def ldadamw(h, w, grads):
    (b1, b2), rho = h["betas"], h["rho"]
    left = w.ndim < 2 or w.shape[0] <= w.shape[1]
    p, error, m, v, params, states = None, 0.0, 0.0, 0.0, [], []
    for t, g in enumerate(grads, start=1):
        a, state = g + error, {}
        if projected(w):
            turn = (lambda x: x) if left else (lambda x: x.T)
            a, old, before = turn(a), p, m
            if t == 1:
                p = np.linalg.svd(a)[0][:, : h["rank"]]
            else:
                target = rho * old @ m / (1 - b1 ** (t - 1)) + (1 - rho) * a
                if h["proj_method"] == "svd":
                    p = np.linalg.svd(target)[0][:, : h["rank"]]
                else:
                    p = np.linalg.qr(target @ (target.T @ old))[0]
                c = p.T @ old
                first, second = 1 - b1 ** (t - 1), 1 - b2 ** (t - 1)
                mean, square = m / first, v / second
                moved = c @ mean
                square = np.abs((c * c) @ (square - mean**2) + moved**2)
                m, v = first * moved, second * square
            low = p.T @ a
            if h["error_feedback"]:
                gone = 0.0 if old is None else old @ before - p @ m
                error = turn(a - p @ low + b1 / (1 - b1) * gone)
                state["error"] = error
            state["projection_matrix"] = p @ p.T
        else:
            low = a
        m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
        n = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + h["eps"])
        w = w * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * (turn(p @ n) if projected(w) else n)
        params.append(w)
        states.append(state)
    return params, states
