"""Recipes after which nothing may follow in a chain: the mark they end with, and its check."""

from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.ad_checkpoint import checkpoint_name

from optax_structured.transforms import skip_nonfinite
from optax_structured.trees import named_leaves
from optax_structured.xla import jaxprs as core

_MARK = "optax_structured: last"
# What lies between a recipe and the update of wrappers that only skip, wait, or cast.
_HARMLESS = {"broadcast_in_dim", "convert_element_type", "copy", "select_n", "sharding_constraint"}


def closed(recipe: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`skip_nonfinite` of a recipe, whose updates bear a name in the program at no cost."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = recipe.update(updates, state, params, **extra)
        return jax.tree.map(lambda u: checkpoint_name(u, _MARK), updates), state

    return skip_nonfinite(optax.GradientTransformationExtraArgs(recipe.init, update))


def closed_chain(
    *elements: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` of a recipe after which nothing may follow."""
    return closed(optax.chain(*elements))


def check_nothing_follows(optimizer: optax.GradientTransformation, params: Any) -> None:
    """Raises ValueError if anything acts on the updates of a recipe that must come last.

    After `ramda`, `rmda`, `prox_sgd`, `prox_adam`, `prox_ssi`, `grad_norm_lorp` and `q_galore` an
    update is the way to weights with exact zeros, of given norms or on a grid; scaled, decayed or
    clipped it leads elsewhere. An update is an array like any other, so a chain cannot see what
    follows it. This reads it off the program of one step, which is traced, not run. Wrappers that
    skip or wait (`apply_if_finite`, `MultiSteps`, `masked`, `partition`) are no mistake.

    Args:
      optimizer: what is trained with.
      params: concrete or abstract parameters.

    Returns:
      Nothing.

    Raises:
      ValueError: something follows, or there is no such recipe in `optimizer`: of a chain that was
        put together from elements it cannot be told what belongs to it.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structured as oxs
      >>> recipe = oxs.ramda(0.1, oxs.L1(), 1e-3)
      >>> check_nothing_follows(optax.chain(optax.clip(1.0), recipe), jnp.ones(3))
      >>> check_nothing_follows(optax.chain(recipe, optax.scale(0.5)), jnp.ones(3))
      Traceback (most recent call last):
        ...
      ValueError: 'mul' acts on the updates of a recipe after which nothing may follow...
    """
    state = jax.eval_shape(optimizer.init, params)
    program = jax.make_jaxpr(optimizer.update)(params, state, params)
    count = len(named_leaves(params))
    ends = [*_ends(program.jaxpr, program.jaxpr.outvars[:count])]
    emitted, arrived = _marks(program.jaxpr), sum(_MARK in of_leaf for of_leaf in ends)
    if emitted == 0:
        raise ValueError(
            "no recipe after which nothing may follow is in this optimizer; of elements put "
            "together by hand (prox_step and others) the order is in the chain itself"
        )
    if arrived < emitted:
        others = ", ".join(map(repr, sorted(set().union(*ends) - {_MARK})))
        raise ValueError(
            f"{others} acts on the updates of a recipe after which nothing may follow: put what "
            "acts on gradients before it, use its own arguments (momentum, weight_decay, "
            "schedules), or leave it out"
        )


def _ends(program: Any, variables: Any, given: Any = ()) -> Iterator[set[str]]:
    """For each variable, what it comes from: the mark, or the operations on what bears one."""
    makers = {out: eqn for eqn in program.eqns for out in eqn.outvars}
    after = set(given)  # what depends on an update that bears the mark
    for eqn in program.eqns:
        bears = eqn.params.get("name") == _MARK or any(map(_marks, _inner(eqn)))
        if bears or any(not isinstance(x, core.Literal) and x in after for x in eqn.invars):
            after.update(eqn.outvars)

    def end(variable: Any) -> set[str]:
        eqn = None if isinstance(variable, core.Literal) else makers.get(variable)
        if eqn is None:
            return set()
        name = eqn.primitive.name
        if name == "name" and eqn.params["name"] == _MARK:
            return {_MARK}
        if inner := _inner(eqn):
            at, moved = eqn.outvars.index(variable), variable in after
            looks = [_ends(p, [p.outvars[at]], p.invars if moved else ()) for p in inner]
            return set().union(*(e for look in looks for e in look))
        if name in _HARMLESS:
            read = eqn.invars[name == "select_n" :]  # not the condition
        elif name == "mul" and any(map(is_truth, eqn.invars)):  # how MultiSteps waits
            read = [x for x in eqn.invars if not is_truth(x)]
        else:
            return {name} if variable in after else set()
        return set().union(*map(end, read))

    def is_truth(variable: Any) -> bool:
        eqn = None if isinstance(variable, core.Literal) else makers.get(variable)
        cast = eqn is not None and eqn.primitive.name == "convert_element_type"
        return cast and eqn.invars[0].aval.dtype == bool  # type: ignore[union-attr]

    return map(end, variables)


def _marks(program: Any) -> int:
    """How many updates bear the mark, in the program and those inside it."""
    own = sum(eqn.params.get("name") == _MARK for eqn in program.eqns)
    return own + sum(_marks(part) for eqn in program.eqns for part in _inner(eqn))


def _inner(eqn: Any) -> list[Any]:
    """The programs that an equation calls: one, or the branches of a conditional."""
    found: list[Any] = []
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, core.ClosedJaxpr):
                found.append(x.jaxpr)
            elif isinstance(x, core.Jaxpr):
                found.append(x)
    return [part for part in found if len(part.outvars) == len(eqn.outvars)]
