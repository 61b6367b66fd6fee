"""What a benchmark case is, and how cases are selected.

A case is data: which benchmark runs, with which parameters, compared with what, how often. Benchmarks are functions
`prepare(case, assets) -> Benchmark` in `speed/`; `worker` runs one in a process of its own, `runner` runs many.

Names are GROUP/METHOD-PARAMETERS, and `--only` takes patterns of them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import InputError
from ..runtime.options import EngineOptions

GROUPS = {
    "machine": "the copy bandwidth and matrix rate of this machine, which bound all of the others",
    "ablation": "one translation at 256 px, from eager PyTorch to the fastest bundle, with the quality of each step",
    "resolution": "one translation at 512, 768 and 1024 px: time and memory",
    "warp": "the correspondence warp alone",
    "strides": "one translation with a correspondence at a quarter, half and full resolution",
    "training": "one training step",
    "estimate": "the estimated memory of a training step, and the largest batch in 8, 12 and 24 GiB",
    "throughput": "translations in batches of 1, 4 and 16",
    "serving": "the HTTP service under load, every answer checked, with the shipped model",
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

    Attributes:
        benchmark: "module:function" that prepares it, relative to this package.
        measures: One line for people.
        parameters: For the benchmark, JSON.
        gate: None for a case that others are compared with, and for facts that are not timed.
        reference: The case whose picture this one's is compared with.
        repeats: Timed runs; none starts later than `seconds` after the first.
        limit: Seconds until the process is ended.
        warmup: Whether a first run goes untimed. Without it the first run is timed too, for what takes minutes.
        memory: Bytes that the method needs at least; a case that cannot fit is not started.
        requires: Packages, "cuda", "bfloat16", "c++" (a compiler), "onnxruntime-gpu", "compute-sanitizer", "tests" (of
            a checkout), "model", "naive" (its single graph) or "bundle".
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

    @property
    def group(self) -> str:
        """The part of the name before the slash; also the results file's name."""
        return self.name.partition("/")[0]


class Sample(NamedTuple):
    """What one run returns: the result that is checked, and the milliseconds of its parts where it knows them."""

    result: Any
    parts: Mapping[str, float] = {}


class Benchmark(NamedTuple):
    """A prepared case.

    Attributes:
        run: What is timed; None where there are `facts` alone.
        check: Quality of a result, cheap in memory, for the gate.
        score: More of it, computed after the timing.
        baseline: Other work, timed turn by turn with `run` for a ratio.
        facts: What is reported as it is.
    """

    run: Callable[[], Sample] | None
    check: Callable[[Any], dict[str, float]] = lambda result: {}
    score: Callable[[Any], dict[str, float]] = lambda result: {}
    baseline: Callable[[], Any] | None = None
    facts: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Assets:
    """What cases run on.

    Attributes:
        model: A model file.
        config: Its configuration as JSON.
        naive: The single graph of it that `speed/naive.py` exports.
        bundles: Bundles by name; "model" is that of the model file.
        references: A folder for the pictures that others are compared with.
        threads: 1 to 256; None for one a core.
    """

    model: str = ""
    config: str = ""
    naive: str = ""
    bundles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    references: str = ""
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        EngineOptions(num_threads=self.threads)  # checks them


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process of its own runs: it gets this as JSON. Not `timed`: the case is run once and checked."""

    case: Case
    assets: Assets
    timed: bool = True


def select(cases: Sequence[Case], groups: Sequence[str] = (), only: Sequence[str] = ()) -> list[Case]:
    """The cases that are wanted.

    Args:
        cases: Where to choose from.
        groups: Names in `GROUPS`; all by default.
        only: Patterns of names, as in "warp/numba-*"; all by default.

    Returns:
        The cases in their order.

    Raises:
        InputError: A group or pattern selects nothing.
    """
    for group in groups:
        if group not in GROUPS:
            raise InputError(f"unknown group {group!r}; expected some of {', '.join(GROUPS)}")
    members = [case for case in cases if not groups or case.group in groups]
    if not only:
        return members
    for pattern in only:
        if not fnmatch.filter([case.name for case in members], pattern):
            raise InputError(f"no case matches {pattern!r}; `python -m flashcocos.benchmarks list` names them")
    return [case for case in members if any(fnmatch.fnmatch(case.name, pattern) for pattern in only)]
