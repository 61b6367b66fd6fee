"""`Batcher`: the one queue in front of a device. It bounds what waits, joins items of one shape, and drops the dead.

Everything but the work itself happens on the event loop, so that there are no locks. A request is admitted by its
headers alone (`admit`), and queues its work once its body is there (`Ticket.run`).
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .errors import ApiError

_SMOOTHING = 0.2  # weight of the newest batch in the expected seconds per megapixel
_STUCK = 10  # times the expected time
Work = Callable[[Hashable, Sequence[Any]], Sequence[Any]]


@dataclasses.dataclass(eq=False)
class _Item:
    ticket: Ticket
    key: Hashable
    payload: Any
    result: asyncio.Future[Any]
    since: float


class Batcher:
    """A bounded queue and the threads that work on it.

    Args:
        work: called in a thread with a key and the payloads of a batch, all queued with that key; returns their
            results.
        batch: most items of a batch.
        workers: batches at once.
        queue: most tickets that wait.
        max_bytes: most bytes of all tickets.
        share: most waiting tickets of one owner.
        patience: seconds that a batch may take, however small.
        on_batch: called with the size of each batch and the seconds that its oldest item waited.
    """

    def __init__(
        self,
        work: Work,
        *,
        batch: int = 1,
        workers: int = 1,
        queue: int = 32,
        max_bytes: int = 256 << 20,
        share: int | None = None,
        patience: float = 60.0,
        on_batch: Callable[[int, float], None] = lambda size, waited: None,
    ) -> None:
        self._work, self._on_batch = work, on_batch
        self._batch, self._workers, self._queue, self._patience = batch, workers, queue, patience
        self._max_bytes, self._share = max_bytes, queue if share is None else share
        self._threads = ThreadPoolExecutor(workers, "flashcocos-engine")
        self._items: collections.deque[_Item] = collections.deque()
        self._tickets: set[Ticket] = set()
        self._running: dict[asyncio.Task[None], tuple[float, float]] = {}  # start and expected seconds
        self._rate: float | None = None  # expected seconds per megapixel
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = self.broken = False

    @property
    def waiting(self) -> int:
        """Tickets whose work has not begun."""
        return sum(ticket.waits for ticket in self._tickets)

    @property
    def bytes(self) -> int:
        """Bytes of all tickets."""
        return sum(ticket.nbytes for ticket in self._tickets)

    @property
    def tickets(self) -> int:
        """Requests that are in here."""
        return len(self._tickets)

    def expected_wait(self) -> float:
        """Seconds until what is asked for now would begin."""
        load = sum(ticket.megapixels for ticket in self._tickets)
        return load * (self._rate or 0.0) / self._workers

    def admit(self, owner: str, nbytes: int, megapixels: float, seconds: float) -> Ticket:
        """A place for a request.

        Args:
            owner: whose share it takes.
            nbytes: of its body, as it states or at most.
            megapixels: of the work, 0 for none.
            seconds: in which it wants its answer.

        Returns:
            A ticket, to use as a context manager.

        Raises:
            ApiError: 429 or 503, with the time after which to ask again.
        """
        wait = self.expected_wait()
        again = max(1.0, wait)
        if self.broken:
            raise ApiError(503, "engine_failed", "the engine is stuck; the service restarts", 10)
        if self.draining:
            raise ApiError(503, "draining", "the service is shutting down; ask another, or again later", 5)
        if self.waiting >= self._queue:
            raise ApiError(429, "queue_full", f"{self._queue} requests wait already; ask again later", again)
        if self.bytes + nbytes > self._max_bytes:
            raise ApiError(
                429, "queue_full", f"requests of {self._max_bytes} bytes are in work; ask again later", again
            )
        if sum(ticket.waits and ticket.owner == owner for ticket in self._tickets) >= self._share:
            raise ApiError(429, "share_full", f"{self._share} requests of this token wait already", again)
        if wait > seconds:
            raise ApiError(429, "too_busy", f"an answer would take {wait:.0f} s, longer than {seconds:.0f} s", wait)
        return Ticket(self, owner, nbytes, megapixels, time.monotonic() + seconds)

    def is_stuck(self) -> bool:
        """Whether a batch takes ten times what is expected of it."""
        now = time.monotonic()
        return any(now - start > max(self._patience, _STUCK * expected) for start, expected in self._running.values())

    async def drain(self) -> None:
        """Refuse new requests, and wait for those that are in here."""
        self.draining = True
        await self._idle.wait()

    def close(self) -> None:
        """Let the threads end once their work is done."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _enter(self, ticket: Ticket) -> None:
        self._tickets.add(ticket)
        self._idle.clear()

    def _leave(self, ticket: Ticket) -> None:
        self._tickets.discard(ticket)
        if not self._tickets:
            self._idle.set()

    async def _queued(self, ticket: Ticket, key: Hashable, payload: Any) -> Any:
        ticket.waits = True
        item = _Item(ticket, key, payload, asyncio.get_running_loop().create_future(), time.monotonic())
        self._items.append(item)
        self._start()
        return await item.result

    def _start(self) -> None:
        """Give free workers what waits."""
        while len(self._running) < self._workers and (batch := self._take()):
            megapixels, now = sum(item.ticket.megapixels for item in batch), time.monotonic()
            for item in batch:
                item.ticket.waits, item.ticket.waited = False, now - item.since
            task = asyncio.get_running_loop().create_task(self._run(batch, megapixels))
            self._running[task] = now, megapixels * (self._rate or 0.0)

    def _take(self) -> list[_Item]:
        """The oldest living item and younger ones of its key, off the queue; dead ones go too."""
        alive = [item for item in self._items if not item.result.done()]
        batch = [item for item in alive if item.key == alive[0].key][: self._batch]
        self._items = collections.deque(item for item in alive if item not in batch)
        return batch

    async def _run(self, batch: list[_Item], megapixels: float) -> None:
        start = time.monotonic()
        self._on_batch(len(batch), batch[0].ticket.waited)
        try:
            await self._call(batch)
        finally:
            if megapixels:
                rate = (time.monotonic() - start) / megapixels
                self._rate = rate if self._rate is None else self._rate + _SMOOTHING * (rate - self._rate)
            self._running = {task: times for task, times in self._running.items() if task is not asyncio.current_task()}
            self._start()

    async def _call(self, batch: list[_Item]) -> None:
        """Work on a batch; where it fails, on each of its items alone, so that one bad item harms no other."""
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(
                self._threads, self._work, batch[0].key, [item.payload for item in batch]
            )
        except Exception as error:
            if len(batch) > 1:
                for item in batch:
                    if not item.result.done():
                        await self._call([item])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        for item, result in zip(batch, results, strict=True):
            if not item.result.done():
                item.result.set_result(result)


class Ticket:
    """The place of one request, from its headers to its answer."""

    def __init__(self, batcher: Batcher, owner: str, nbytes: int, megapixels: float, deadline: float) -> None:
        self._batcher = batcher
        self.owner, self.nbytes, self.megapixels, self.deadline = owner, nbytes, megapixels, deadline
        self.waits, self.waited = True, 0.0
        batcher._enter(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self._batcher._leave(self)

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def set_bytes(self, nbytes: int) -> None:
        """State what the request really holds; `ApiError` where that is too much."""
        if self._batcher.bytes - self.nbytes + nbytes > self._batcher._max_bytes:
            raise ApiError(429, "queue_full", "too many bytes are in work; ask again later", 1)
        self.nbytes = nbytes

    async def run(self, key: Hashable, payload: Any) -> Any:
        """The result of the work on `payload`; whoever stops waiting cancels this, which takes it off the queue."""
        return await self._batcher._queued(self, key, payload)
