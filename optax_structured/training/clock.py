"""The pace of a run."""

import time

import numpy as np

from optax_structured.training.folder import Row


class Clock:
    """The pace of the steps since the last evaluation."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._counts: list[int] = []

    def timing(self, count: int) -> "Clock":
        """Use as a context around a call of `count` steps."""
        self._counts.append(count)
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds.append(time.perf_counter() - self._start)

    def reading(self) -> Row:
        """Steps a second, refits included; the median call's milliseconds a step."""
        pace = np.divide(self._seconds, self._counts)
        return {
            "steps_per_second": round(sum(self._counts) / sum(self._seconds), 1),
            "step_ms": round(1e3 * float(np.median(pace)), 3),
        }
