"""The simulated queue against what queueing theory knows exactly."""

from __future__ import annotations

import numpy as np
import pytest

from flashcocos.benchmarks.__main__ import main
from flashcocos.benchmarks.scale import devices_for, replay, simulate
from flashcocos.errors import InputError

pytest.importorskip("simpy", reason="needs the extra bench")


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_waits_are_those_of_the_formula(load: float) -> None:
    # Pollaczek and Khinchine: mean wait of one device = rate E[S^2] / (2 (1 - load))
    work = [0.05, 0.05, 0.2]
    rate = load / np.mean(work)
    expected = np.mean(work) + rate * np.mean(np.square(work)) / (2 * (1 - load))
    means = [simulate(work, rate, queue=10**6, seed=seed)["mean_ms"] for seed in range(2)]
    assert np.mean(means) == pytest.approx(1e3 * expected, rel=0.07)  # at most 5 % apart in 12 other pairs of draws


def test_a_full_queue_refuses_what_is_too_much() -> None:
    found = simulate([0.1], 20.0, queue=4)
    assert found["refused"] == pytest.approx(0.5, abs=0.01)
    assert found["p99_ms"] <= 500.0 + 1e-6  # its own and four before it


def test_requests_that_were_seen_wait_for_each_other() -> None:
    found = replay([(10.3, 0.1), (10.0, 0.2), (10.1, 0.3)], extra=0.01)  # answered after 0.2, 0.4 and 0.3 s
    assert found["p50_ms"] == pytest.approx(310)
    assert found["mean_ms"] == pytest.approx(310)
    assert found["refused"] == 0
    with pytest.raises(InputError, match="got none"):
        replay([])


def test_two_devices_take_what_one_does_not() -> None:
    assert simulate([0.1], 15.0, queue=4)["refused"] > 0.2
    assert simulate([0.1], 15.0, queue=4, devices=2)["refused"] < 0.02


def test_devices_for_a_load() -> None:
    found = devices_for([0.1], 100.0, 0.5)
    assert 10 < found <= 12
    assert simulate([0.1], 100.0, devices=found)["p99_ms"] <= 500


@pytest.mark.parametrize(("seconds", "rate", "devices"), [([], 1, 1), ([0.0], 1, 1), ([1.0], 0, 1), ([1.0], 1, 0)])
def test_bad_numbers_are_refused(seconds: list[float], rate: float, devices: int) -> None:
    with pytest.raises(InputError, match="expected"):
        simulate(seconds, rate, devices=devices)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--ms", "80", "120", "--rate", "40", "--p99", "1"]) == 0
    out = capsys.readouterr().out
    assert "40 requests a second, 99 of 100 within 1 s: " in out
    assert out.count("\n| ") >= 6
    assert main(["scale", "--ms", "800", "--p99", "0.5"]) == 1
    assert "is less than the 0.8 s" in capsys.readouterr().err
