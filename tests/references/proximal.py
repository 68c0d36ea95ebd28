"""The proximal methods in NumPy, a leaf at a time, as their equations are written.

As the low-rank ones: settings, parameters and gradients of a leaf, to its parameters after each
step and what a file records. Leaves of two and of four axes are regularised; groups are columns.
"""

import numpy as np


def regularised(w):
    return w.ndim in (2, 4)


def grouped(w):
    """(entries, groups): the axis of groups is the second."""
    return np.moveaxis(w, 1, 0).reshape(w.shape[1], -1).T


def ungrouped(columns, shape):
    return np.moveaxis(columns.T.reshape(shape[1], shape[0], *shape[2:]), 0, 1)


def group_root(b, metric, thresholds):
    """The minimiser of each column, by bisection of its norm."""
    norms = np.linalg.norm(b, axis=0)
    alive = norms > thresholds
    low, high = np.zeros_like(norms), np.linalg.norm(b / metric, axis=0)
    for _ in range(200):
        middle = (low + high) / 2
        too_small = np.sum((b / (middle * metric + thresholds)) ** 2, axis=0) > 1
        low, high = np.where(too_small, middle, low), np.where(too_small, high, middle)
    safe = np.where(high > 0, high, 1.0)
    return np.where(alive, b / (metric + thresholds / safe), 0.0)


def group_lasso(x, metric, tau, solve=group_root):
    columns, m = grouped(x), grouped(np.broadcast_to(metric, x.shape))
    weight = tau * np.sqrt(len(columns))
    return ungrouped(solve(m * columns, m, np.full(m.shape[1], weight)), x.shape)


def group_mcp(x, metric, eta, threshold, gamma):
    """In its convex range."""
    columns, m = grouped(x), grouped(metric)
    limit = threshold * np.sqrt(len(columns))
    assert np.all(m > eta / gamma)
    inside = group_root(m * columns, m - eta / gamma, np.full(m.shape[1], eta * limit))
    far = np.linalg.norm(columns, axis=0) > gamma * limit
    return ungrouped(np.where(far, columns, inside), x.shape)


def soft(x, threshold):
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0)


def prox(kind, x, metric, tau):
    if kind.startswith("l1 ") or kind == "l1":
        return soft(x, tau / metric)
    if kind == "l0":
        return np.where(metric * x**2 / 2 > tau, x, 0.0)
    assert kind in ("group_lasso", "l1_l2")
    return group_lasso(x, metric, tau)


def proximal_gradient(v, metric, w0, tau, warm, max_iters, rtol):
    """The authors' inexact solver, on one leaf."""
    v, p, w0, z = map(grouped, (v, metric, w0, warm))
    thresholds = np.full(v.shape[1], tau * np.sqrt(len(v)))
    kept = np.linalg.norm(p * w0 - v, axis=0) > thresholds
    w = np.zeros_like(z)
    if np.any(kept):
        v, p, w0, z, t = v[:, kept], p[:, kept], w0[:, kept], z[:, kept], thresholds[kept]
        eta, last = 1 / p.max(axis=0), np.inf
        for i in range(max_iters):
            z = z - eta * (v + p * (z - w0))
            norms = np.linalg.norm(z, axis=0)
            z = z * np.maximum(0, 1 - eta * t / np.where(norms > 0, norms, 1))
            q = np.sum((z - w0) * v) + 0.5 * np.sum(p * (z - w0) ** 2)
            q += np.sum(t * np.linalg.norm(z, axis=0))
            if i >= 1 and (last - q) / (abs(q) + 1) < rtol:
                break
            last = q
        w[:, kept] = z
    return w


def stages(h, steps, *, dual_averaging):
    """By step: rate, weight of the new point, epsilon, and whether a stage begins."""
    lr, c, eps = h["lr"], h.get("momentum"), h.get("epsilon")
    ends = [epoch * h["steps_per_epoch"] for epoch in h.get("milestones_epochs", [])]
    start = ends[-1] if ends else steps
    if h.get("momentum_growth_start") == "early":
        start -= h["steps_per_epoch"]
    for t in range(steps):
        if t in ends:
            lr, eps = h["gamma"] * lr, h["gamma"] * eps if dual_averaging and eps else eps
        grown = min(c * np.sqrt(max(t - start + 1, 1)), 1.0) if dual_averaging else c
        yield lr, grown, eps, t in ends


def dual_averaging(h, w, grads, *, adaptive):
    anchor, v, u, alpha, count = w, 0.0, 0.0, 0.0, 0
    params, states = [], []
    for g, (lr, c, eps, begins) in zip(
        grads, stages(h, len(grads), dual_averaging=True), strict=True
    ):
        if begins:
            anchor, v, u, alpha, count = w, 0.0, 0.0, 0.0, 0
        count += 1
        s = lr * np.sqrt(count)
        alpha, v, u = alpha + s, v + s * g, u + s * g**2
        metric = np.cbrt(u) + eps if adaptive else np.sqrt(count) * np.ones_like(w)
        point, state = anchor - v / metric, {}
        if regularised(w):
            tau = alpha * h["lambda_"]
            if "max_iters" in h:
                limits = h["max_iters"], h["rtol"]
                point = ungrouped(proximal_gradient(v, metric, anchor, tau, w, *limits), w.shape)
            else:
                point = prox(h["regularizer"], point, metric, tau)
            state = {"w_hat": point}
        w = (1 - c) * w + c * point
        params.append(w)
        states.append(state)
    return params, states


def ramda(h, w, grads):
    return dual_averaging(h, w, grads, adaptive=True)


def rmda(h, w, grads):
    return dual_averaging(h, w, grads, adaptive=False)


def prox_sgd(h, w, grads):
    v, params = 0.0, []
    schedule = stages(h, len(grads), dual_averaging=False)
    for g, (lr, c, _, _) in zip(grads, schedule, strict=True):
        v = (1 - c) * v + c * g
        w = w - lr * v
        w = prox(h["regularizer"], w, 1.0, lr * h["lambda_"]) if regularised(w) else w
        params.append(w)
    return params, [{}] * len(grads)


def prox_sgd_relaxed(h, w, grads):
    v, r, params = 0.0, 0.0, []
    for t, g in enumerate(grads, start=1):
        rho = h["rho"] / (t + h["step_offset"]) ** h["rho_decay"]
        step = h["epsilon"] / (t + h["step_offset"]) ** h["epsilon_decay"]
        v, r = (1 - rho) * v + rho * g, h["beta"] * r + (1 - h["beta"]) * g**2
        tau = np.sqrt(r / (1 - h["beta"] ** (t + 1))) + h["delta"]
        point = soft(w - v / tau, h["mu"] / tau)
        if "clip_bounds" in h:
            point = np.clip(point, *h["clip_bounds"])
        w = w + step * (point - w)
        params.append(w)
    return params, [{}] * len(grads)


def prox_adamw(h, w, grads):
    (b1, b2), m, v, largest, params = h["betas"], 0.0, 0.0, 0.0, []
    schedule = stages(h, len(grads), dual_averaging=False)
    for t, (g, (lr, _, eps, _)) in enumerate(zip(grads, schedule, strict=True), start=1):
        w = (1 - lr * h["weight_decay"]) * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        largest = np.maximum(largest, v)
        metric = np.sqrt(largest if h.get("amsgrad") else v) / np.sqrt(1 - b2**t) + eps
        linear, tau = lr * m / (1 - b1**t), lr * h.get("lambda_", h.get("penalty"))
        if not regularised(w):
            w = w - linear / metric
        elif "max_iters" in h:
            limits = h["max_iters"], h["rtol"]
            w = ungrouped(proximal_gradient(linear, metric, w, tau, w, *limits), w.shape)
        else:
            w = prox(h["regularizer"], w - linear / metric, metric, tau)
        params.append(w)
    return params, [{}] * len(grads)


def prox_ssi(h, w, grads):
    (b1, b2), m, v, lr, params = h["betas"], 0.0, 0.0, h["lr"], []
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        metric = np.sqrt(v) + h["epsilon"]
        correction = np.sqrt(1 - b2**t) / (1 - b1**t) if h["correct_bias"] else 1.0
        w = w - lr * correction * m / metric
        w = w - lr * h["weight_decay"] * w
        if regularised(w) and h["penalty"] == "group_mcp":
            w = group_mcp(w, metric, lr, h["lambda_"], h["gamma"])
        elif regularised(w):
            w = prox(h["penalty"], w, metric, lr * h["lambda_"])
        params.append(w)
    return params, [{}] * len(grads)
