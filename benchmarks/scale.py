"""A service as a queue, simulated: how long requests wait at one device, and how many devices a load takes.

Requests come at random, independent of each other. Each goes to the device with the fewest requests, waits there for
its turn, and is refused where the queue is full, as `flashcocos serve` refuses it. A device works on one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np

from ..errors import BackendError, InputError
from .tables import table

RESERVE = 0.1  # of all devices: some fail, and at full load a queue grows for as long as it is watched
LOADS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.2)  # shares of what one device can do
MOST_DEVICES = 2_000


def simulate(
    seconds: Sequence[float],
    rate: float,
    *,
    devices: int = 1,
    queue: int = 32,
    requests: int = 20_000,
    seed: int = 0,
) -> dict[str, float]:
    """Simulate a service under a steady load.

    Args:
        seconds: That a device takes for a request; each request draws one of them.
        rate: Requests a second.
        devices: How many there are.
        queue: Most requests that wait at a device.
        requests: To simulate.
        seed: Of the random numbers.

    Returns:
        mean_ms, p50_ms, p95_ms and p99_ms of the answered requests from start to end, and the share that was refused.

    Raises:
        InputError: A number is out of range.
        BackendError: simpy is missing.
    """
    if not seconds or min(seconds) <= 0 or not 0 < rate < math.inf:
        raise InputError(f"seconds and rate: expected positive numbers, got {list(seconds)} and {rate:g}")
    if not 1 <= devices <= MOST_DEVICES:
        raise InputError(f"devices: expected 1 to {MOST_DEVICES}, got {devices}")
    rng = np.random.default_rng(seed)
    starts = np.cumsum(rng.exponential(1 / rate, requests))
    works = rng.choice(np.asarray(seconds), requests)
    return _answered(list(zip(starts.tolist(), works.tolist(), strict=True)), devices, queue)


def replay(work: Sequence[tuple[float, float]], *, extra: float = 0.0) -> dict[str, float]:
    """Simulate the requests that one device has answered.

    Args:
        work: Of each request, when it began, in seconds of any clock, and the seconds that the device worked on it.
        extra: Seconds of each request outside of the device and the queue.

    Returns:
        As `simulate`.

    Raises:
        InputError: There is no request.
        BackendError: simpy is missing.
    """
    if not work:
        raise InputError("work: expected requests that were answered, got none")
    ordered = sorted(work)
    return _answered([(start - ordered[0][0], seconds) for start, seconds in ordered], 1, extra=extra)


def _answered(
    work: Sequence[tuple[float, float]], devices: int, queue: int = 32, extra: float = 0.0
) -> dict[str, float]:
    try:
        import simpy
    except ImportError as error:
        raise BackendError(f"the simulation needs simpy ({error}); pip install 'flashcocos[bench]'") from error
    environment = simpy.Environment()
    pool = [simpy.Resource(environment) for _ in range(devices)]
    took: list[float] = []
    refused = 0

    def request(seconds: float) -> Generator[simpy.Event, None, None]:
        nonlocal refused
        device = min(pool, key=lambda one: one.count + len(one.queue))
        if len(device.queue) >= queue:
            refused += 1
            return
        start = environment.now
        with device.request() as turn:
            yield turn
            yield environment.timeout(seconds)
        took.append(environment.now - start + extra)

    def arrivals() -> Generator[simpy.Event, None, None]:
        for start, seconds in work:
            yield environment.timeout(max(0.0, start - environment.now))
            environment.process(request(seconds))

    environment.process(arrivals())
    environment.run()
    quantiles = {f"p{share}_ms": 1e3 * float(np.quantile(took, share / 100)) for share in (50, 95, 99)}
    return {"mean_ms": 1e3 * float(np.mean(took)), **quantiles, "refused": refused / len(work)}


def devices_for(seconds: Sequence[float], rate: float, p99: float) -> int:
    """The fewest devices, to a hundredth, that refuse none of `rate` requests a second and answer 99 of 100 in `p99` s.

    A tenth of them is kept in reserve. Arguments as for `simulate`. Raises `InputError` where one request alone takes
    longer, or where more than `MOST_DEVICES` are needed.
    """
    if max(seconds) > p99:
        raise InputError(f"p99: {p99:g} s is less than the {max(seconds):g} s that one request takes")
    few = max(1, math.ceil(rate * float(np.mean(seconds)) / (1 - RESERVE)))
    for devices in range(few, MOST_DEVICES + 1, max(1, few // 100)):
        found = simulate(seconds, rate, devices=devices, requests=max(20_000, 50 * devices))
        if not found["refused"] and found["p99_ms"] <= 1e3 * p99:
            return devices
    raise InputError(f"rate: {rate:g} requests a second take more than {MOST_DEVICES} devices")


def report(milliseconds: Sequence[float], rate: float, p99: float) -> str:
    """Markdown: one device under rising loads, and the devices for `rate` requests a second within `p99` seconds."""
    seconds = [ms / 1e3 for ms in milliseconds]
    lines = []
    for load in LOADS:
        found = simulate(seconds, load / float(np.mean(seconds)))
        lines.append([f"{load:.0%}", f"{load / float(np.mean(seconds)):.3g}"])
        lines[-1] += [f"{found[f'p{share}_ms']:.0f}" for share in (50, 95, 99)] + [f"{found['refused']:.1%}"]
    head = ["load", "requests a second", "p50, ms", "p95, ms", "p99, ms", "refused"]
    count = devices_for(seconds, rate, p99)
    return f"{table(head, lines)}\n\n{rate:g} requests a second, 99 of 100 within {p99:g} s: {count} devices"
