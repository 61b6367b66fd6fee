"""The queue in front of the engine: what is joined, what is dropped, what is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from flashcocos.serve.batcher import Batcher
from flashcocos.serve.errors import ApiError


class Clock:
    """The batcher's clock, which stands still until a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr("flashcocos.serve.batcher.time", SimpleNamespace(monotonic=lambda: self.seconds))


class Worker:
    """Work that waits for `gate`, notes each call, and doubles numbers; "bad" in a batch fails all of it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls: list[tuple[Hashable, list[Any]]] = []

    def __call__(self, key: Hashable, payloads: Sequence[Any]) -> list[Any]:
        assert self.gate.wait(10)
        self.calls.append((key, list(payloads)))
        if "bad" in payloads:
            raise ValueError("bad")
        return [2 * payload for payload in payloads]


def with_batcher(scenario: Callable[[Batcher, Worker], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        worker = Worker()
        batcher = Batcher(worker, **options)
        try:
            await scenario(batcher, worker)
        finally:
            worker.gate.set()
            batcher.close()

    asyncio.run(run())


async def ask(batcher: Batcher, key: Hashable, payload: Any, *, owner: str = "", megapixels: float = 1.0) -> Any:
    with batcher.admit(owner, 1, megapixels, 30) as ticket:
        return await ticket.run(key, payload)


def start(*jobs: Awaitable[Any]) -> list[asyncio.Task[Any]]:
    return [asyncio.ensure_future(job) for job in jobs]


def test_what_waits_is_joined_by_key_and_in_order() -> None:
    async def scenario(batcher: Batcher, worker: Worker) -> None:
        tasks = start(*(ask(batcher, key, number) for number, key in enumerate("aababab")))
        await asyncio.sleep(0.01)
        worker.gate.set()
        assert await asyncio.gather(*tasks) == [2 * number for number in range(7)]
        # the first did not wait for company
        assert worker.calls == [("a", [0]), ("a", [1, 3, 5]), ("b", [2, 4, 6])]

    with_batcher(scenario, batch=3)


def test_a_batch_is_never_larger_than_asked() -> None:
    async def scenario(batcher: Batcher, worker: Worker) -> None:
        worker.gate.set()
        await asyncio.gather(*start(*(ask(batcher, "a", number) for number in range(9))))
        assert sorted(len(payloads) for _, payloads in worker.calls) == [1, 2, 2, 2, 2]

    with_batcher(scenario, batch=2)


def test_the_cancelled_never_run() -> None:
    async def scenario(batcher: Batcher, worker: Worker) -> None:
        running, dropped, kept = start(*(ask(batcher, "a", number) for number in range(3)))
        await asyncio.sleep(0.01)
        dropped.cancel()
        await asyncio.sleep(0)
        assert (batcher.tickets, batcher.waiting) == (2, 1)
        worker.gate.set()
        assert await asyncio.gather(running, kept) == [0, 4]
        assert worker.calls == [("a", [0]), ("a", [2])]

    with_batcher(scenario, batch=4)


def test_a_bad_item_fails_alone_and_the_others_run_once_more() -> None:
    async def scenario(batcher: Batcher, worker: Worker) -> None:
        tasks = start(*(ask(batcher, "a", payload) for payload in (1, 2, "bad", 3)))
        await asyncio.sleep(0.01)
        worker.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [results[0], results[1], results[3]] == [2, 4, 6]
        assert isinstance(results[2], ValueError)
        assert [payloads for _, payloads in worker.calls] == [[1], [2, "bad", 3], [2], ["bad"], [3]]

    with_batcher(scenario, batch=4)


def test_workers_run_batches_at_once() -> None:
    async def scenario(batcher: Batcher, worker: Worker) -> None:
        tasks = start(*(ask(batcher, "a", number) for number in range(3)))
        await asyncio.sleep(0.01)
        assert batcher.waiting == 1
        worker.gate.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4]

    with_batcher(scenario, workers=2)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def scenario(batcher: Batcher, worker: Worker) -> None:
        tasks = start(*(ask(batcher, "a", number) for number in range(3)))
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="2 requests wait already") as refusal:
            batcher.admit("", 1, 1.0, 30)
        assert (refusal.value.status, refusal.value.code) == (429, "queue_full")
        assert refusal.value.retry_after is not None
        assert refusal.value.retry_after >= 1
        worker.gate.set()
        await asyncio.gather(*tasks)
        with batcher.admit("", 1, 1.0, 30):
            pass
        assert batcher.tickets == 0

    with_batcher(scenario, queue=2)


def test_bytes_are_bounded() -> None:
    async def scenario(batcher: Batcher, worker: Worker) -> None:
        with batcher.admit("", 60, 0.0, 30) as ticket:
            with pytest.raises(ApiError, match="100 bytes are in work") as refusal:
                batcher.admit("", 41, 0.0, 30)
            assert refusal.value.status == 429
            ticket.set_bytes(100)
            with pytest.raises(ApiError, match="too many bytes"):
                ticket.set_bytes(101)
        assert batcher.bytes == 0

    with_batcher(scenario, max_bytes=100)


def test_one_owner_has_a_share() -> None:
    async def scenario(batcher: Batcher, worker: Worker) -> None:
        with batcher.admit("a", 1, 0.0, 30), batcher.admit("b", 1, 0.0, 30):
            with pytest.raises(ApiError, match="1 requests of this token wait") as refusal:
                batcher.admit("a", 1, 0.0, 30)
            assert (refusal.value.status, refusal.value.code) == (429, "share_full")

    with_batcher(scenario, share=1)


def test_the_predicted_wait_counts_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def scenario(batcher: Batcher, worker: Worker) -> None:
        worker.gate.set()
        assert batcher.expected_wait() == 0
        slow = worker.__call__

        def work(key: Hashable, payloads: Sequence[Any]) -> list[Any]:
            clock.seconds += 0.125
            return slow(key, payloads)

        batcher._work = work
        await ask(batcher, "a", 1, megapixels=0.5)  # 0.25 s a megapixel
        with batcher.admit("", 1, 10.0, 30):
            assert batcher.expected_wait() == 2.5
            with pytest.raises(ApiError, match="longer than 1 s") as refusal:
                batcher.admit("", 1, 1.0, 1)
            assert (refusal.value.status, refusal.value.code) == (429, "too_busy")
            assert refusal.value.retry_after == 2.5
        assert batcher.expected_wait() == 0

    with_batcher(scenario)


def test_draining_waits_for_what_is_in_and_refuses_the_rest() -> None:
    async def scenario(batcher: Batcher, worker: Worker) -> None:
        (task,) = start(ask(batcher, "a", 1))
        await asyncio.sleep(0.01)
        (drained,) = start(batcher.drain())
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="shutting down") as refusal:
            batcher.admit("", 1, 1.0, 30)
        assert (refusal.value.status, refusal.value.retry_after) == (503, 5)
        assert not drained.done()
        worker.gate.set()
        assert await task == 2
        await drained

    with_batcher(scenario)


def test_a_batch_that_never_ends_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def scenario(batcher: Batcher, worker: Worker) -> None:
        (task,) = start(ask(batcher, "a", 1))
        await asyncio.sleep(0)
        clock.seconds = 60.0
        assert not batcher.is_stuck()
        clock.seconds = 61.0
        assert batcher.is_stuck()
        worker.gate.set()
        await task
        assert not batcher.is_stuck()

    with_batcher(scenario, patience=60.0)
