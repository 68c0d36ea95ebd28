"""How far to step: line search, schedules found from a run, batch sizes, training in stages."""

from optax_structured.step_sizes.adagrad_norm import AdagradNormState, scale_by_adagrad_norm
from optax_structured.step_sizes.batch_scaling import (
    CriticalBatch,
    fit_critical_batch,
    minibatch_eigenvalue,
    scale_by_batch_size,
    scale_decay,
    scale_learning_rate,
)
from optax_structured.step_sizes.batch_size import BatchSizeController
from optax_structured.step_sizes.geometric import decaying_normalized_step
from optax_structured.step_sizes.gradient_noise import (
    NoiseStats,
    gradient_noise_stats,
    microbatch_noise_stats,
    pooled_variance,
    suggest_batch,
)
from optax_structured.step_sizes.line_search import PonosState, scale_by_ponos
from optax_structured.step_sizes.polyak import polyak_initial_step, zhang_hager_reference
from optax_structured.step_sizes.ponos import ponos
from optax_structured.step_sizes.refinement import (
    RecordNormsState,
    interpolated_schedule,
    last_iterate_bound,
    record_norms,
    recorded_norms,
    refined_schedule,
)
from optax_structured.step_sizes.stages import Stages

__all__ = [
    "AdagradNormState",
    "BatchSizeController",
    "CriticalBatch",
    "NoiseStats",
    "PonosState",
    "RecordNormsState",
    "Stages",
    "decaying_normalized_step",
    "fit_critical_batch",
    "gradient_noise_stats",
    "interpolated_schedule",
    "last_iterate_bound",
    "microbatch_noise_stats",
    "minibatch_eigenvalue",
    "polyak_initial_step",
    "ponos",
    "pooled_variance",
    "record_norms",
    "recorded_norms",
    "refined_schedule",
    "scale_by_adagrad_norm",
    "scale_by_batch_size",
    "scale_by_ponos",
    "scale_decay",
    "scale_learning_rate",
    "suggest_batch",
    "zhang_hager_reference",
]
