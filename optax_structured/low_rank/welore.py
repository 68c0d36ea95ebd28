"""WeLore: a rank for each weight matrix, from the tail of its spectrum."""

import bisect
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from optax_structured.trees import Axes, Rules, named_leaves, resolve, rules

Criterion = Literal["range", "energy", "median"]

# Published thresholds of `criterion="range"` for LLaMA-2 7B and 13B, by attempted reduction.
LLAMA_2_THRESHOLDS = {
    0.1: 0.0225,
    0.2: 0.084,
    0.3: 0.115,
    0.4: 0.145,
    0.5: 0.175,
    0.6: 0.215,
    0.7: 0.26,
}


class WelorePlanEntry(NamedTuple):
    """What a plan says about one leaf."""

    path: str  # "/"-joined name of the leaf
    axes: Axes  # its matrix view
    matrix_shape: tuple[int, ...]  # (*batch, m, n)
    kept: int  # singular values above the threshold; the largest number in a stack
    rank: int | None  # of its factors; None where it stays dense


@dataclasses.dataclass(frozen=True)
class WelorePlan(Mapping[str, int | None]):
    """A mapping `{path: rank of the factors, or None where the matrix stays dense}`.

    Built by `welore_plan`; leaves that it did not consider are not in it.

    Args:
      threshold: on the normalised singular values.
      entries: one for each leaf that was considered.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> plan = oxs.welore_plan({"mlp": jnp.diag(jnp.array([1.0, 0.0, 0.0]))}, threshold=0.5)
      >>> plan["mlp"], plan.entries[0].matrix_shape
      (1, (3, 3))
    """

    threshold: float
    entries: tuple[WelorePlanEntry, ...]

    def __getitem__(self, path: str) -> int | None:
        return {entry.path: entry.rank for entry in self.entries}[path]

    def __iter__(self) -> Iterator[str]:
        return (entry.path for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def attempted_reduction(self) -> float:
        """Share of all ranks below the threshold."""
        return self._reduction(self.entries)

    @property
    def effective_reduction(self) -> float:
        """The same, counting only what is removed: the matrices that are factorised."""
        return self._reduction([entry for entry in self.entries if entry.rank is not None])

    def low_rank(self, spec: Any) -> Rules:
        """Rules of `LowRank`s with ranks in proportion to those of the plan.

        Args:
          spec: a `LowRank`; its rank is the average over all matrices of the plan, so the memory
            of a recipe is about that of `spec` itself. Leaves outside the plan stay plain.
        """
        mean = sum(e.kept * _count(e) for e in self.entries) / sum(map(_count, self.entries))

        def scaled(entry: WelorePlanEntry) -> int:
            return max(1, min(round(spec.rank * entry.kept / mean), *entry.matrix_shape[-2:]))

        return rules(
            *(
                (f"^{re.escape(e.path)}$", dataclasses.replace(spec, axes=e.axes, rank=scaled(e)))
                for e in self.entries
            ),
            default=None,
        )

    def _reduction(self, entries: Any) -> float:
        removed = sum((min(e.matrix_shape[-2:]) - e.kept) * _count(e) for e in entries)
        return removed / sum(min(e.matrix_shape[-2:]) * _count(e) for e in self.entries)


def welore_plan(
    params: Any,
    where: Rules | Axes = Axes(),  # noqa: B008  (frozen)
    *,
    target: float | None = None,
    threshold: float | None = None,
    effective: bool = False,
    min_ratio: float | None = None,
    criterion: Criterion = "range",
    spectra: Mapping[str, np.ndarray] | None = None,
) -> WelorePlan:
    r"""Chooses a rank for each weight matrix by one threshold on all normalised spectra.

    With the singular values :math:`s_1 \ge \ldots \ge s_R` of a matrix,

    .. math::
        z_i = \frac{s_i - s_R}{s_1 - s_R} \;(\text{range}), \quad
        z_i = \sqrt{\textstyle\sum_{j \ge i} s_j^2 / \sum_j s_j^2} \;(\text{energy}), \quad
        z_i = s_i / \operatorname{median}(s) \;(\text{median}),

    and the kept rank is :math:`k = \max(1, R - \#\{i : z_i < \tau\})`. A matrix (m, n) is
    factorised if :math:`k (m + n) < m n`, else it stays dense. Runs on the host, in LAPACK.

    Args:
      params: concrete parameters.
      where: the leaves to consider, and their matrix view: `rules` of `Axes` or None. By default
        all with two axes or more, the last two being the matrix; published runs leave embedding
        and head out. A stack of matrices gets one rank, the largest that one of them asks for.
      target: share of all singular values to remove, in (0, 1); published 0.1 to 0.7.
      threshold: :math:`\tau` itself, instead of a target; see `LLAMA_2_THRESHOLDS`. For "energy"
        it is the relative error in the Frobenius norm.
      effective: the target counts only what is removed from matrices that are factorised.
      min_ratio: factorise instead where the share of removed values is above this; published
        0.4999 for fine-tuning, 0 for compression alone.
      criterion: `"range"` as published, which one outlying singular value can mislead, `"energy"`
        or `"median"`.
      spectra: what `singular_values(params, where)` returned, to plan several times.

    Returns:
      A `WelorePlan`.

    Raises:
      ValueError: not exactly one of target and threshold, a target that no threshold reaches, or
        nothing to plan for.

    Equals truncation at a relative error for `criterion="energy"`.

    Example:
      >>> import numpy as np, optax_structured as oxs
      >>> s = np.array([1.0, 0.9, 0.1, 0.05, 0.02, 0.01])
      >>> plan = oxs.welore_plan({"mlp": np.diag(s), "attention": np.eye(6)}, target=0.3)
      >>> dict(plan), plan.attempted_reduction
      ({'attention': None, 'mlp': 2}, 0.333...)

    References:
      Jaiswal et al., `From Low Rank Gradient Subspace Stabilization to Low-Rank Weights
      <https://arxiv.org/abs/2407.11239>`_, 2024. Its code fixes the thresholds, logs the attempted
      reduction, and tests the share of removed values, which saves memory in square matrices only.
    """
    if (target is None) == (threshold is None):
        raise ValueError("welore_plan needs either target=... or threshold=..., and not both")
    if target is not None and not 0 < target < 1:
        raise ValueError(
            f"target is the share of singular values to remove, in (0, 1); got {target!r}"
        )
    if criterion not in get_args(Criterion):
        raise ValueError(
            f"criterion must be one of {', '.join(get_args(Criterion))}, got {criterion!r}"
        )
    values = singular_values(params, where) if spectra is None else spectra
    views = [(path, spec, jnp.shape(leaf)) for path, spec, leaf in _considered(params, where)]
    scores = {path: _scores(values[path], criterion) for path, _, _ in views}

    def plan(tau: float) -> WelorePlan:
        def entry(path: str, axes: Axes, shape: tuple[int, ...]) -> WelorePlanEntry:
            kept = max(1, int(np.max(np.sum(scores[path] >= tau, axis=-1))))
            *_, m, n = matrix_shape = axes.matrix_shape(shape)
            if min_ratio is None:
                factorised = kept * (m + n) < m * n
            else:
                factorised = 1 - kept / min(m, n) > min_ratio
            return WelorePlanEntry(path, axes, matrix_shape, kept, kept if factorised else None)

        return WelorePlan(float(tau), tuple(entry(*view) for view in views))

    if target is None:
        return plan(threshold)  # type: ignore[arg-type]

    def reached(tau: float) -> float:
        candidate = plan(tau)
        return candidate.effective_reduction if effective else candidate.attempted_reduction

    # Reductions change at the scores only, and never fall as the threshold rises.
    steps = np.unique(np.concatenate([z.ravel() for z in scores.values()]))
    steps = np.append(steps, np.nextafter(steps[-1], np.inf))
    if reached(steps[-1]) < target:
        raise ValueError(
            f"no threshold reaches target={target!r}: the largest reduction is "
            f"{reached(steps[-1]):.3f}, as each matrix keeps a rank of at least 1; lower the target"
        )
    first = bisect.bisect_left(steps, target, key=reached)
    return plan(min(steps[max(first - 1, 0) : first + 1], key=lambda x: abs(reached(x) - target)))


def singular_values(
    params: Any,
    where: Rules | Axes = Axes(),  # noqa: B008  (frozen)
) -> dict[str, np.ndarray]:
    """The spectra behind a plan, to be computed once for several plans.

    Args:
      params: concrete parameters.
      where: as in `welore_plan`.

    Returns:
      `{path: (*batch, min(m, n)) array}`, descending, in the precision of the leaf, float32 at
      least.

    Raises:
      ValueError: abstract parameters, or no leaf to consider.

    Example:
      >>> import jax.numpy as jnp
      >>> print(singular_values({"w": jnp.diag(jnp.array([1.0, 3.0]))})["w"])
      [3. 1.]
    """
    considered = _considered(params, where)
    if not considered:
        raise ValueError(
            "welore: there is no matrix to plan for: no leaf has two axes or more, or `where` "
            "leaves all of them out"
        )
    return {
        path: np.linalg.svd(host_matrix(path, axes, leaf), compute_uv=False)
        for path, axes, leaf in considered
    }


def _considered(params: Any, where: Rules | Axes) -> list[tuple[str, Axes, Any]]:
    leaves, views = named_leaves(params), resolve(where, params)
    return [
        (path, view, leaf)
        for (path, leaf), view in zip(leaves, views, strict=True)
        if view is not None
    ]


def _scores(s: np.ndarray, criterion: Criterion) -> np.ndarray:
    """Descending scores in which one threshold is comparable between matrices of any scale."""
    s = s.astype(np.float64)
    if criterion == "range":
        above, width = s - s[..., -1:], s[..., :1] - s[..., -1:]
    elif criterion == "energy":
        above = np.sqrt(np.cumsum(np.square(s)[..., ::-1], axis=-1)[..., ::-1])
        width = above[..., :1]
    else:
        above, width = s, np.median(s, axis=-1, keepdims=True)
    # A flat spectrum has nothing to give up; a matrix of zeros has everything.
    flat = np.broadcast_to(s > 0, s.shape).astype(np.float64)
    return np.where(width > 0, above / np.where(width > 0, width, 1), flat)


def _count(entry: WelorePlanEntry) -> int:
    return math.prod(entry.matrix_shape[:-2])


def host_matrix(path: str, axes: Axes, leaf: Any) -> np.ndarray:
    """The matrix view of a leaf on the host, in a precision that LAPACK has."""
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise ValueError(
            f"welore decomposes the weights on the host, outside jit, but {path!r} has no values: "
            f"{leaf!r}"
        )
    matrix = axes.to_matrix(leaf)
    return np.asarray(matrix, np.promote_types(matrix.dtype, np.float32))
