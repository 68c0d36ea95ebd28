"""WeLore: a rank for each weight matrix, from the tail of its spectrum."""

import bisect
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_structured.trees import Axes, Rules, rules
from optax_structured.trees.checks import check_choice
from optax_structured.trees.tables import aligned, kinds
from optax_structured.weights.spectra import Criterion, considered, scores, singular_values

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
    shape: tuple[int, ...]  # of the leaf
    axes: Axes  # its matrix view
    matrix_shape: tuple[int, ...]  # (*batch, m, n)
    kept: int  # singular values above the threshold; the largest number in a stack
    rank: int | None  # of its factors; None where it stays dense


@dataclasses.dataclass(frozen=True)
class WelorePlan(Mapping[str, int | None]):
    """A mapping `{path: rank of the factors, or None where the matrix stays dense}`.

    Built by `welore_plan`; leaves that it did not consider are not in it. Prints as a table.

    Args:
      threshold: on the normalised singular values.
      entries: one for each leaf that was considered.

    Example:
      >>> import jax.numpy as jnp, optax_structured as oxs
      >>> params = {"mlp": jnp.diag(jnp.array([1.0, 0.0, 0.0]))}
      >>> plan = oxs.weights.welore_plan(params, threshold=0.5)
      >>> plan["mlp"], plan.entries[0].matrix_shape
      (1, (3, 3))
      >>> print(plan)
      path  shape   matrices  kept    rank
      mlp   (3, 3)  (3, 3)    1 of 3  1
      threshold 0.5: 66.7% of all singular values are below, 66.7% are removed

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
        """Rules of `LowRank` specs with ranks in proportion to those of the plan.

        Args:
          spec: a `LowRank`; its rank is the average over all matrices of the plan, so the memory
            of a recipe is about that of `spec` itself. Leaves outside the plan stay plain, and
            so do those for which that rank would take more state than plain Adam.
        """
        mean = sum(e.kept * _count(e) for e in self.entries) / sum(map(_count, self.entries))

        def scaled(entry: WelorePlanEntry) -> Any:
            rank = max(1, min(round(spec.rank * entry.kept / mean), *entry.matrix_shape[-2:]))
            whole = dataclasses.replace(spec, axes=entry.axes, rank=rank)
            try:
                whole.check(entry.shape)
            except ValueError:
                return None
            return whole

        return rules(*((f"^{re.escape(e.path)}$", scaled(e)) for e in self.entries), default=None)

    def table(self) -> str:
        """Plain text: the ranks, one row for leaves that differ in numbers only, and their sum."""
        rows = [("path", "shape", "matrices", "kept", "rank")]
        alike = lambda e: (e.shape, e.axes, e.kept, e.rank)  # noqa: E731
        for name, entries in kinds(self.entries, alike):
            e, (*batch, m, n) = entries[0], entries[0].matrix_shape
            view = f"{math.prod(batch)} of ({m}, {n})" if batch else f"({m}, {n})"
            kept = f"{e.kept} of {min(m, n)}"
            rows.append(
                (name, str(e.shape), view, kept, "dense" if e.rank is None else str(e.rank))
            )
        below, removed = self.attempted_reduction, self.effective_reduction
        summary = f"{below:.1%} of all singular values are below, {removed:.1%} are removed"
        return f"{aligned(rows)}\nthreshold {self.threshold:.4g}: {summary}"

    def __repr__(self) -> str:
        return self.table()

    def _reduction(self, entries: Any) -> float:
        removed = sum((min(e.matrix_shape[-2:]) - e.kept) * _count(e) for e in entries)
        return removed / sum(min(e.matrix_shape[-2:]) * _count(e) for e in self.entries)


def welore_plan(
    params: Any,
    where: Rules | Axes | None = None,
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
      where: the leaves to consider, and their matrix view: `rules` of `Axes` or None, such as
        `presets.axes(model)`; published runs leave embedding and head out. By default every leaf
        with two axes; one with more may be a stack of matrices (`Axes()`), attention heads or a
        convolution, so that it has to be said. A stack gets one rank, the largest of its matrices.
      target: share of all singular values to remove, in (0, 1); published 0.1 to 0.7.
      threshold: :math:`\tau` itself, instead of a target; published ones for LLaMA-2 are in
        `LLAMA_2_THRESHOLDS`. For "energy" it is the relative error in the
        Frobenius norm.
      effective: the target counts only what is removed from matrices that are factorised.
      min_ratio: factorise instead where the share of removed values is above this; published
        0.4999 for fine-tuning, 0 for compression alone.
      criterion: `"range"` as published, which one outlying singular value can mislead, `"energy"`
        or `"median"`.
      spectra: what `oxs.weights.singular_values(params, where)` returned, to plan
        several times.

    Returns:
      A `WelorePlan`.

    Raises:
      ValueError: not exactly one of target and threshold, a target that no threshold reaches,
        nothing to plan for, or a leaf of more than two axes without `where`.

    Equals truncation at a relative error for `criterion="energy"`.

    Example:
      >>> import numpy as np, optax_structured as oxs
      >>> s = np.array([1.0, 0.9, 0.1, 0.05, 0.02, 0.01])
      >>> plan = oxs.weights.welore_plan({"mlp": np.diag(s), "attention": np.eye(6)}, target=0.3)
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
    check_choice("criterion", criterion, Criterion)
    values = singular_values(params, where) if spectra is None else spectra
    views = [(path, spec, jnp.shape(leaf)) for path, spec, leaf in considered(params, where)]
    of_leaf = {path: scores(values[path], criterion) for path, _, _ in views}

    def plan(tau: float) -> WelorePlan:
        def entry(path: str, axes: Axes, shape: tuple[int, ...]) -> WelorePlanEntry:
            kept = max(1, int(np.max(np.sum(of_leaf[path] >= tau, axis=-1))))
            *_, m, n = matrix_shape = axes.matrix_shape(shape)
            if min_ratio is None:
                factorised = kept * (m + n) < m * n
            else:
                factorised = 1 - kept / min(m, n) > min_ratio
            return WelorePlanEntry(
                path, shape, axes, matrix_shape, kept, kept if factorised else None
            )

        return WelorePlan(float(tau), tuple(entry(*view) for view in views))

    if target is None:
        return plan(threshold)  # type: ignore[arg-type]

    def reached(tau: float) -> float:
        candidate = plan(tau)
        return candidate.effective_reduction if effective else candidate.attempted_reduction

    # Reductions change at the scores only, and never fall as the threshold rises.
    steps = np.unique(np.concatenate([z.ravel() for z in of_leaf.values()]))
    steps = np.append(steps, np.nextafter(steps[-1], np.inf))
    if reached(steps[-1]) < target:
        raise ValueError(
            f"no threshold reaches target={target!r}: the largest reduction is "
            f"{reached(steps[-1]):.3f}, as each matrix keeps a rank of at least 1; lower the target"
        )
    first = bisect.bisect_left(steps, target, key=reached)
    return plan(min(steps[max(first - 1, 0) : first + 1], key=lambda x: abs(reached(x) - target)))


def _count(entry: WelorePlanEntry) -> int:
    return math.prod(entry.matrix_shape[:-2])
