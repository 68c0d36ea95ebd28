"""What files say about proximal runs: which leaves are regularised, how, and in which stages."""

import dataclasses
import re
from typing import Any

import numpy as np
from golden_files import Golden, Settings
from replays.running import by_name, rate
from tolerances import GOLDEN

import optax_structured as oxs

ENTRYWISE = {"l1": oxs.L1(), "l0": oxs.L0(), "l12": oxs.LHalf(), "l23": oxs.LTwoThirds()}
WARM_STARTS = {"current parameters": True, "parameters after weight decay": True}
# How files say which leaves are regularised: after words that begin such a clause.
_NDIMS = re.compile(
    r"(?:\bregularised leaves: |\bon )(?:every )?ndim[ -](\d(?:(?:, | and | or )\d)*)", re.I
)
_OTHERS = re.compile(r"\bregularised leaves: ndim != (\d)", re.I)
_ALL = re.compile(r"\belementwise, every leaf", re.I)
_GROUP = re.compile(r"\bone group per \w+ index \(axis (\d)\)", re.I)


def regularised(golden: Golden, kind: str) -> list[str]:
    """The leaves that a file calls regularised, in its prose or after the name of the penalty."""
    prose = f"{kind}\n{golden.prose}"
    ndims = {name: x.ndim for name, x in golden.start.items()}
    if found := _NDIMS.search(prose):
        wanted = set(map(int, re.findall(r"\d", found[1])))
        return [name for name, ndim in ndims.items() if ndim in wanted]
    if found := _OTHERS.search(prose):
        return [name for name, ndim in ndims.items() if ndim != int(found[1])]
    if _ALL.search(prose):
        return list(ndims)
    raise ValueError(f"{golden.name} does not say which leaves are regularised: {prose}")


def regularizer(golden: Golden, h: Settings, kind: str) -> oxs.trees.Rules:
    """The penalty of each regularised leaf; `kind` begins with its name."""

    def groups() -> int:
        if (found := _GROUP.search(golden.prose)) is None:
            raise ValueError(f"{golden.name} does not say what its groups are: {golden.prose}")
        return int(found[1])

    name = kind.split()[0]
    if name in ("group_lasso", "l1_l2"):
        penalty = oxs.GroupLasso(groups())
    elif name == "group_mcp":
        penalty = oxs.GroupMCP(groups(), threshold=h["lambda_"], gamma=h["gamma"])
    elif name == "nuclear":
        penalty = oxs.NuclearNorm()
    elif name in ENTRYWISE:
        penalty = ENTRYWISE[name]
    else:
        raise ValueError(f"{golden.name} has the regularizer {kind!r}, which no replay knows")
    return by_name(dict.fromkeys(regularised(golden, kind), penalty))


def solver(h: Settings) -> oxs.proximal.Solver:
    """The exact one, or the authors' where the file says how long it iterates."""
    if "max_iters" not in h:
        return oxs.Exact()
    h.one_of("warm_start", WARM_STARTS, default="current parameters")
    h.pass_over("screen", "step")  # in words
    return oxs.ProximalGradient(max_iters=h["max_iters"], rtol=h["rtol"])


@dataclasses.dataclass(frozen=True)
class Schedules:
    """Settings that stages change: numbers, or schedules."""

    learning_rate: Any
    momentum: Any  # what is kept, where files say what is new
    eps: Any
    milestones: tuple[int, ...]


def schedules(golden: Golden, h: Settings, *, dual_averaging: bool = False) -> Schedules:
    """At milestones all lower the learning rate; dual averaging, which restarts, does more."""
    lr = rate(golden, h)
    possible = [h.get("epsilon")]  # values of eps, the usual one first
    keep = 1 - h["momentum"] if "momentum" in h else None
    milestones: tuple[int, ...] = ()
    if "milestones_epochs" in h:
        per_epoch = h["steps_per_epoch"]
        stages = oxs.Stages([epoch * per_epoch for epoch in h["milestones_epochs"]], h["gamma"])
        milestones, lr = stages.milestones, stages.decay(lr)
        if dual_averaging:
            keep = growing(golden, h, stages, keep)
        if "epsilon" in h:
            possible.insert(0 if dual_averaging else 1, stages.decay(h["epsilon"]))
    recorded = [eps for eps in possible if agree(golden, "epsilon", eps)]
    if not (recorded and agree(golden, "lr", lr)):
        raise ValueError(f"{golden.name} records lr or epsilon as no published rule makes them")
    return Schedules(lr, keep, recorded[0], milestones)


def growing(golden: Golden, h: Settings, stages: oxs.Stages, keep: float) -> Any:
    """Momentum by the rule that the file names, or else by the one that its record follows."""
    early = stages.milestones[-1] - h["steps_per_epoch"]
    rules = {
        "last_stage": stages.momentum(keep),
        "early": stages.momentum(keep, growth_start=early),
        "per_stage": stages.momentum(keep, rule="per_stage"),
    }
    if named := {"momentum_rule", "momentum_growth_start"} & h.keys():
        return h.one_of(named.pop(), rules)
    for rule in rules.values():
        if agree(golden, "momentum", lambda t, rule=rule: 1 - rule(t)):
            return rule
    raise ValueError(f"{golden.name} records momentum as no published rule makes it")


def agree(golden: Golden, key: str, value: Any) -> bool:
    """Whether a number or schedule is what the file recorded at each step, if it did."""
    if (recorded := golden.arrays.get(f"state/{key}")) is None:
        return True
    ours = [value(t) if callable(value) else value for t in range(golden.meta["steps"])]
    return bool(np.allclose(ours, recorded, rtol=GOLDEN, atol=0))
