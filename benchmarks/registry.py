"""What can be measured: the type of a case, and every case by group.

A case is data: which benchmark runs, on what parameters, compared with what, how often. Benchmarks are functions
`prepare(case, assets) -> Benchmark` of this package; `worker` runs one in a process of its own, `runner` many.

Names are GROUP/METHOD-PARAMETERS, patterns of which `--only` takes. `published` marks the cases whose numbers the
README shows; together they take about 25 minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..config import ModelConfig
from ..errors import InputError

GROUPS = {
    "machine": "the copy bandwidth and matrix rate of this machine, which bound all of the others",
    "ablation": "one translation at 256 px, from eager PyTorch to the fastest bundle, with the quality of each step",
    "resolution": "one translation at 512, 768 and 1024 px: time and memory",
    "warp": "the correspondence warp alone",
    "training": "one training step",
    "plan": "the memory of a training step, and the largest batch in 8, 12 and 24 GiB, planned without running it",
    "throughput": "translations in batches of 1, 4 and 16",
    "startup": "process start to first picture, and what has to be installed",
}
CHANNELS = 256  # of the published networks' features


@dataclasses.dataclass(frozen=True)
class Gate:
    """What a result must reach to be timed: the benchmark's `measure` at least, or else at most, `bound`."""

    measure: str
    bound: float
    at_least: bool = True

    def passes(self, quality: Mapping[str, float]) -> bool:
        """Whether `quality` reaches the bound; NaN does not."""
        value = quality[self.measure]
        return value >= self.bound if self.at_least else value <= self.bound


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a results file.

    benchmark: "module:function" that prepares it. measures: one line for people. parameters: for the benchmark, JSON.
    gate: None for a case that others are compared with and for facts that are not timed.
    reference: the case whose picture this one's is compared with.
    repeats: timed runs, of which none starts later than `seconds` after the first; limit: seconds until it is ended.
    warmup: whether a first run goes untimed; without it the first run is timed too, for what takes minutes.
    memory: bytes that the method holds at once at the least; a case that cannot fit is not started.
    requires: packages, "cuda", "bfloat16", "c++" (a compiler), "model", "naive" (its single graph) or "bundle".
    """

    name: str
    benchmark: str
    measures: str
    parameters: Mapping[str, Any]
    gate: Gate | None = None
    reference: str = ""
    repeats: int = 5
    seconds: float = 20.0
    limit: float = 900.0
    warmup: bool = True
    memory: int = 0
    requires: tuple[str, ...] = ()
    published: bool = False

    @property
    def group(self) -> str:
        """The part of the name before the slash; also the results file's name."""
        return self.name.partition("/")[0]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Case:
        """The inverse of `dataclasses.asdict`, after a trip through JSON."""
        gate = Gate(**fields["gate"]) if fields["gate"] else None
        return cls(**{**fields, "gate": gate, "requires": tuple(fields["requires"])})


class Sample(NamedTuple):
    """What one run gives: the result that is checked, and milliseconds of its parts where it knows them."""

    result: Any
    parts: Mapping[str, float] = {}


class Benchmark(NamedTuple):
    """A prepared case.

    run: what is timed, None where `facts` are all there is. check: quality of a result, cheap in memory, for the gate.
    score: more of it, computed after the timing. baseline: other work to time turn by turn with `run`, for a ratio.
    """

    run: Callable[[], Sample] | None
    check: Callable[[Any], dict[str, float]] = lambda result: {}
    score: Callable[[Any], dict[str, float]] = lambda result: {}
    baseline: Callable[[], Any] | None = None
    facts: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Assets:
    """What cases run on. model: a model file, and config its configuration as JSON; naive: the single graph of it that
    `naive.py` exports; bundles: by name, "model" being that of the model file; references: a folder for the pictures
    that others are compared with. threads: None for one a core.
    """

    model: str = ""
    config: str = ""
    naive: str = ""
    bundles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    references: str = ""
    device: str = "cpu"
    threads: int | None = None


def select(
    cases: Sequence[Case], groups: Sequence[str] = (), only: Sequence[str] = (), *, every: bool = False
) -> list[Case]:
    """The cases of `groups` whose names match a pattern of `only`; without patterns, the published ones or `every` one.

    Raises `InputError` for a group or pattern that selects nothing.
    """
    for group in groups:
        if group not in GROUPS:
            raise InputError(f"unknown group {group!r}; expected some of {', '.join(GROUPS)}")
    chosen = [case for case in cases if not groups or case.group in groups]
    if only:
        for pattern in only:
            if not fnmatch.filter([case.name for case in chosen], pattern):
                raise InputError(f"no case matches {pattern!r}; `python -m flashcocos.benchmarks list` names them")
        return [case for case in chosen if any(fnmatch.fnmatch(case.name, pattern) for pattern in only)]
    return [case for case in chosen if every or case.published]


def all_cases(device: str = "cpu", extra_bundles: Sequence[str] = (), config: ModelConfig | None = None) -> list[Case]:
    """Every case for `device`, "cpu" or "cuda"; `extra_bundles` are names of further bundles, steps of the ablation.

    config: of the model, whose matrices the memory of a case depends on; the published ade20k network's by default.
    """
    from . import cases as catalog

    chosen = config or ModelConfig.preset("ade20k")
    return [case for make in catalog.CASE_FACTORIES for case in make(device, extra_bundles, chosen)]
