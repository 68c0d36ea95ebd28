"""The methods on a fixed cosine basis, as in `low_rank`."""

import numpy as np
from references.low_rank import Adam, projected


def dct(n):
    """C: rows are the DCT-II basis."""
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    c = np.sqrt(2 / n) * np.cos(np.pi * i * (2 * j + 1) / (2 * n))
    c[0] /= np.sqrt(2)
    return c


class Columns:
    """The r columns of an orthonormal basis in which a matrix is largest."""

    def __init__(self, q, right, rank, norm=1):
        self.q, self.right, self.rank, self.norm, self.chosen = q, right, rank, norm, None

    def select(self, a):
        s = a @ self.q if self.right else self.q.T @ a
        scores = np.linalg.norm(s, self.norm, axis=0 if self.right else 1)
        self.chosen = np.sort(np.argsort(-scores, kind="stable")[: self.rank])

    def down(self, a):
        p = self.q[:, self.chosen]
        return a @ p if self.right else p.T @ a

    def back(self, r):
        p = self.q[:, self.chosen]
        return r @ p.T if self.right else p @ r


def dct_adamw(h, w, grads):
    right = projected(w) and w.shape[0] >= w.shape[1]
    optimizer, error = Adam(h | {"correct_bias": True}), 0.0
    if projected(w):
        c = dct(min(w.shape))
        q = c if h["sim_type"] == "matmul" else c.T
        columns = Columns(q, right, min(h["rank"], len(q)), h["ell_norm"])
    params, states = [], []
    for t, g in enumerate(grads, start=1):
        w = w * (1 - h["lr"] * h["weight_decay"])
        state = {}
        a = g + error
        if projected(w):
            if t == 1 or t % h["update_proj_gap"] == 0:
                old = columns.chosen
                columns.select(a)
                if t > 1 and h["rotate_subspace"]:
                    turn = q[:, old].T @ q[:, columns.chosen]
                    m, v = optimizer.m, optimizer.v
                    optimizer.m = m @ turn if right else turn.T @ m
                    optimizer.v = np.abs(v @ turn if right else turn.T @ v)
            low = columns.down(a)
            if h["use_ef"]:
                error = a - columns.back(low)
                state["error_feedback"] = error
        else:
            low = a
        optimizer(low)
        b1, b2 = h["betas"]
        u = optimizer.m / (1 - b1**t) / (np.sqrt(optimizer.v / (1 - b2**t)) + h["eps"])
        w = w - h["lr"] * (columns.back(u) if projected(w) else u)
        if projected(w):
            chosen = columns.chosen.astype(np.int32)
            state |= {"indices_sorted": chosen, "mu_sorted": optimizer.m, "nu_sorted": optimizer.v}
        params.append(w)
        states.append(state)
    return params, states


def trion(h, w, grads):
    if not projected(w):
        adam = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "rank": 1, "update_proj_gap": 1}
        plain = h | adam | {"sim_type": "matmul", "use_ef": False, "rotate_subspace": True}
        return dct_adamw(plain, w, grads)
    rows, cols = w.shape
    right, c = rows >= cols, dct(min(w.shape))
    # D = C: its columns on the right, its rows on the left; DCT-II coefficients of either: C^T.
    q = c if right and not h["use_makhoul"] else c.T
    columns, momentum, params, states = Columns(q, right, h["rank"]), 0.0, [], []
    scale = {
        "kj": np.sqrt(max(1, rows / cols)),
        "kimi": 0.2 * np.sqrt(max(rows, cols)),
        "dion": np.sqrt(rows / cols),
        "none": 1.0,
    }[h["scaling_type"]]
    for g in grads:
        full = momentum + g
        columns.select(full)
        low = columns.down(full)
        momentum = full - (1 - h["mu"]) * columns.back(low)
        x = low.T if right else low  # (rank, length)
        x = x / (np.linalg.norm(x) + 1e-7)
        a, b, cc = h["ns_coefficients"]
        turned = x.shape[0] > x.shape[1]
        x = x.T if turned else x
        for _ in range(h["ns_steps"]):
            gram = x @ x.T
            x = a * x + (b * gram + cc * gram @ gram) @ x
        x = x.T if turned else x
        o = columns.back(x.T if right else x)
        w = w * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * scale * o
        params.append(w)
        chosen = columns.chosen.astype(np.int32)
        states.append({"momentum": momentum, "indices_sorted": chosen})
    return params, states
