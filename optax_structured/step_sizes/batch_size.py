"""A controller that turns suggested batch sizes into powers of two of a microbatch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BatchSizeController:
    """Batch sizes that grow by powers of two, so that few programs are compiled.

    The batch is `microbatch * devices * every` examples and only `every`, a power of two, changes:
    the compiled shapes stay, and `accumulate(inner, every)` goes on from the state of another
    `every`. A run compiles at most log2(maximum / (microbatch * devices)) + 1 programs.

    Args:
      microbatch: examples on one device at a time, at least 1.
      maximum: cap of the batch size, at least `microbatch * devices`.
      devices: how many of them take a microbatch at the same time.
      interval: steps between two tests.
      growth: largest factor of growth in one test, at least 2, so that one outlier cannot
        send the batch to its maximum; None for no limit, as published.

    Raises:
      ValueError: a number out of these ranges.

    Example:
      >>> import optax_structured as oxs
      >>> control = oxs.step_sizes.BatchSizeController(microbatch=8, maximum=100)
      >>> batch = control.batch(8)
      >>> for suggested in (9, 40, 1000):
      ...     batch = control.grow(batch, suggested)
      ...     print(batch, control.every(batch))
      16 2
      32 4
      64 8

    References:
      Lau, Liu and Kolar, `AdAdaGrad <https://arxiv.org/abs/2402.11215>`_, 2024; it takes any size,
      without a limit to growth.
    """

    microbatch: int
    maximum: int
    devices: int = 1
    interval: int = 1
    growth: float | None = 2.0

    def __post_init__(self) -> None:
        for name in ("microbatch", "maximum", "devices", "interval"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
        if self.maximum < self.smallest:
            raise ValueError(
                f"maximum must hold a microbatch on each device, {self.smallest} examples, got "
                f"{self.maximum}"
            )
        if self.growth is not None and self.growth < 2:
            raise ValueError(f"growth must be at least 2 or None, got {self.growth!r}")

    @property
    def smallest(self) -> int:
        """The batch of one microbatch per device."""
        return self.microbatch * self.devices

    def due(self, step: int, batch: int) -> bool:
        """Whether to test after `step` steps: every `interval` of them, until the cap."""
        return step % self.interval == 0 and 2 * batch <= self.maximum

    def batch(self, examples: int) -> int:
        """The smallest batch of this controller with so many examples, or its largest."""
        size = self.smallest
        while size < examples and 2 * size <= self.maximum:
            size *= 2
        return size

    def grow(self, batch: int, suggested: int) -> int:
        """The next batch size after one of this controller; never smaller."""
        if self.growth is not None:
            suggested = min(int(suggested), int(batch * self.growth))
        grown = self.batch(int(suggested))
        while self.growth is not None and grown > batch * self.growth:
            grown //= 2
        return max(batch, grown)

    def every(self, batch: int) -> int:
        """Microbatches per step, for `accumulate(inner, every)`."""
        return batch // self.smallest
