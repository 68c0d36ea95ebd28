"""Rounds of coded gradients with slow workers: which are waited for, and how long it all takes."""

import dataclasses
import math
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

Array: TypeAlias = np.ndarray


class Scheme(Protocol):
    """Who does what in which round, and which slow workers it can do without."""

    workers: int

    @property
    def load(self) -> float:
        """The share of the data that a worker processes in a round."""

    @property
    def delay(self) -> int:
        """Rounds after its own in which a job is still worked on."""

    @property
    def slots(self) -> int:
        """Tasks of a worker in one round, of different jobs."""

    def tasks(self, done: Array, jobs: int) -> Array:
        """(n, slots): what each does in the next round; NaN for nothing. `done`: (n, slots, r)."""

    def tolerates(self, done: Array, tasks: Array, late: Array) -> bool:
        """Whether the late workers, (n,), need not be waited for in the next round."""

    def decodable(self, done: Array, job: int) -> bool:
        """Whether what is done determines the gradient of the job."""


class Simulation(NamedTuple):
    """Result of `simulate`."""

    durations: Array  # (rounds,): time of each round
    done: Array  # (n, slots, rounds): the task that came in time, -1 for late, NaN for none
    waited: Array  # (rounds,) bool: whether all workers were waited for
    finished: Array  # (jobs,) int: the round after which a job is known


def simulate(scheme: Scheme, delays: ArrayLike, jobs: int, mu: float = 1.0) -> Simulation:
    r"""Runs jobs, the gradients of several models in turn, on workers that are slow at times.

    In each round the master waits :math:`(1 + \mu)` times as long as the fastest worker takes, and
    does without the others if the code can make up for them; otherwise it waits for all.

    Args:
      scheme: `CodedRounds`, `SelectiveRepeat` or `Multiplexed`.
      delays: (n, jobs + scheme.delay): the time of each worker in each round.
      jobs: how many.
      mu: above 0; published: 1.

    Returns:
      A `Simulation`; `durations.sum()` is the time of the run. Every job is known `scheme.delay`
      rounds after its own at the latest.

    Example:
      >>> import numpy as np
      >>> delays = np.ones((4, 3))
      >>> delays[2, 1] = 10.0
      >>> print(simulate(CodedRounds(4, 1), delays, jobs=3).durations)
      [1. 2. 1.]
      >>> print(simulate(CodedRounds(4, 0), delays, jobs=3).durations)
      [ 1. 10.  1.]
    """
    delays = np.asarray(delays, float)
    rounds = jobs + scheme.delay
    if delays.shape != (scheme.workers, rounds):
        raise ValueError(
            f"simulate: delays must have the shape (workers, jobs + delay) = "
            f"{(scheme.workers, rounds)}, got {delays.shape}"
        )
    if not mu > 0:
        raise ValueError(f"mu must be above 0, got {mu!r}")
    done = np.full((scheme.workers, scheme.slots, rounds), np.nan)
    durations, waited = np.zeros(rounds), np.zeros(rounds, bool)
    for r in range(rounds):
        tasks = scheme.tasks(done[:, :, :r], jobs)
        busy = ~np.isnan(tasks).all(1)
        if not busy.any():
            continue
        time = np.where(busy, delays[:, r], -np.inf)
        deadline = (1 + mu) * time[busy].min()
        late = time > deadline
        waited[r] = late.any() and not scheme.tolerates(done[:, :, :r], tasks, late)
        if waited[r]:
            late, deadline = np.zeros_like(late), np.inf
        durations[r] = min(deadline, time.max())
        done[:, :, r] = np.where(late[:, None], -1, tasks)
    finished = np.full(jobs, -1)
    for job in range(jobs):
        for r in range(job, min(job + scheme.delay + 1, rounds)):
            if scheme.decodable(done[:, :, : r + 1], job):
                finished[job] = r
                break
    return Simulation(durations, done, waited, finished)


@dataclasses.dataclass(frozen=True)
class CodedRounds:
    """A `gradient_code` in every round by itself; with no stragglers, plain data parallelism.

    Args:
      workers: n.
      stragglers: s, how many are not waited for.
      strict: fewer than s, as the published simulator has it.

    >>> CodedRounds(256, 15).load
    0.0625
    """

    workers: int
    stragglers: int
    strict: bool = False

    @property
    def load(self) -> float:
        return (self.stragglers + 1) / self.workers

    @property
    def delay(self) -> int:
        return 0

    @property
    def slots(self) -> int:
        return 1

    def tasks(self, done: Array, jobs: int) -> Array:
        return np.full((self.workers, 1), float(done.shape[2]))

    def tolerates(self, done: Array, tasks: Array, late: Array) -> bool:
        return bool(late.sum() <= self.stragglers - self.strict)

    def decodable(self, done: Array, job: int) -> bool:
        return bool((done[:, 0] == job).sum() >= self.workers - self.stragglers)


@dataclasses.dataclass(frozen=True)
class SelectiveRepeat:
    """Sequential code that repeats what too many have missed, `burst` rounds later (SR-SGC).

    Args:
      workers: n.
      burst: B, rounds from the first to the last in which a worker may be slow in a window.
      window: W, rounds, a multiple of `burst` plus 1.
      spread: how many different workers may be slow in a window.

    >>> SelectiveRepeat(256, burst=2, window=3, spread=23).load
    0.05078125
    """

    workers: int
    burst: int
    window: int
    spread: int

    def __post_init__(self) -> None:
        _check_model(self)
        if (self.window - 1) % self.burst:
            raise ValueError(
                f"SelectiveRepeat: window must be a multiple of burst = {self.burst} plus 1, got "
                f"{self.window}"
            )

    @property
    def stragglers(self) -> int:
        """s of the `gradient_code`."""
        return math.ceil(self.burst * self.spread / (self.window - 1 + self.burst))

    @property
    def load(self) -> float:
        return (self.stragglers + 1) / self.workers

    @property
    def delay(self) -> int:
        return self.burst

    @property
    def slots(self) -> int:
        return 1

    def tasks(self, done: Array, jobs: int) -> Array:
        r = done.shape[2]
        tasks = np.full((self.workers, 1), float(r) if r < jobs else np.nan)
        if r >= self.burst:
            missing = np.flatnonzero(done[:, 0, r - self.burst] != r - self.burst)
            again = max(len(missing) - self.stragglers, 0)
            tasks[missing[:again]] = r - self.burst
        return tasks

    def tolerates(self, done: Array, tasks: Array, late: Array) -> bool:
        before, slow = done[:, 0], done[:, 0] == -1
        # A round that delivered its own job needs no repeat, and is not counted.
        own = (before == np.arange(before.shape[1])) | slow
        counted = slow & ~(own.all(0) & (slow.sum(0) <= self.stragglers))
        return _fits(self, np.c_[counted, late])

    def decodable(self, done: Array, job: int) -> bool:
        return bool((done[:, 0] == job).any(1).sum() >= self.workers - self.stragglers)


@dataclasses.dataclass(frozen=True)
class Multiplexed:
    """Sequential code that mostly processes data once, and codes the small rest (M-SGC).

    Args:
      workers: n.
      burst: B; see `SelectiveRepeat`.
      window: W, from burst + 1.
      spread: how many different workers may be slow in a window, up to n.

    >>> round(Multiplexed(256, burst=1, window=2, spread=27).load, 5)
    0.00754
    """

    workers: int
    burst: int
    window: int
    spread: int

    def __post_init__(self) -> None:
        _check_model(self)

    @property
    def load(self) -> float:
        tasks, own = self.slots, self.window - 1
        if self.spread == self.workers:
            return tasks / (self.workers * own)
        share = self.spread + 1
        return share * tasks / (self.workers * (self.burst + own * share))

    @property
    def slots(self) -> int:
        return self.window - 1 + self.burst

    @property
    def delay(self) -> int:
        return self.slots - 1

    def tasks(self, done: Array, jobs: int) -> Array:
        """0: a chunk of the worker's own, the first that is missing; k: the coded group k - 1."""
        r, own = done.shape[2], self.window - 1
        tasks = np.zeros((self.workers, self.slots))
        for slot in range(self.slots):
            if r - slot < 0:
                tasks[:, slot] = np.nan
            elif slot >= own:
                complete = self._own_chunks(done, r - slot) >= own
                tasks[:, slot] = np.where(complete, slot - own + 1, 0)
        return tasks

    def _own_chunks(self, done: Array, job: int) -> Array:
        """(n,): how many chunks of its own each worker has delivered for a job."""
        slots = range(min(self.slots, done.shape[2] - job))
        return np.sum([done[:, slot, job + slot] == 0 for slot in slots], 0)

    def tolerates(self, done: Array, tasks: Array, late: Array) -> bool:
        return _fits(self, np.c_[(done == -1).any(1), late])

    def decodable(self, done: Array, job: int) -> bool:
        own, last = self.window - 1, done.shape[2] - 1
        if np.any(self._own_chunks(done, job) < own):
            return False
        if self.spread == self.workers:
            return True
        return all(
            job + slot <= last
            and (done[:, slot, job + slot] == slot - own + 1).sum() >= self.workers - self.spread
            for slot in range(own, self.slots)
        )


def _check_model(scheme: SelectiveRepeat | Multiplexed) -> None:
    if not (0 < scheme.burst < scheme.window and 0 <= scheme.spread <= scheme.workers):
        raise ValueError(
            f"{scheme}: 1 <= burst < window and 0 <= spread <= workers are what a bursty model is"
        )


def _fits(scheme: SelectiveRepeat | Multiplexed, slow: Array) -> bool:
    """Whether the last of the rounds, (n, rounds), keeps to the model of bursts."""
    recent, now = slow[:, -scheme.window :], slow[:, -1]
    before = slow[:, max(slow.shape[1] - scheme.window, 0) : max(slow.shape[1] - scheme.burst, 0)]
    return bool(recent.any(1).sum() <= scheme.spread and not (now & before.any(1)).any())
