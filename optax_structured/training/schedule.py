"""The schedule of the jobs that have no stages."""

import optax

_WARM_UP, _LAST_RATE = 0.1, 0.1


def shape_of_schedule(steps: int) -> optax.Schedule:
    """Up to 1 over the first tenth of the steps, then along a cosine to a tenth, and so on."""
    rise = max(1, round(_WARM_UP * steps))
    fall = optax.cosine_decay_schedule(1.0, max(1, steps - rise), alpha=_LAST_RATE)
    return optax.join_schedules([lambda count: (count + 1) / rise, fall], [rise])
