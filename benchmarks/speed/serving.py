"""The HTTP service as a process on loopback, under load that checks every answer against the one expected."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import io
import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from ...bundle.default_model import PAIRS
from ...errors import BackendError
from ...runtime import Exemplar, Translator
from ..registry import Assets, Benchmark, Case

MIB = 2**20
STAGES = ("query", "warp", "synthesis")
_STARTS_WITHIN = 60.0  # seconds
_IDLE = 2.0  # seconds; the service ends a connection that was idle for 5


class Server:
    """`flashcocos serve` with `options`, as a process on a free port; started and ready when this returns.

    Attributes:
        url, port: where it listens.
        ready_s: seconds from the start of the process until it is ready.
        process: psutil's.
    """

    def __init__(self, *options: str) -> None:
        import psutil

        command = [sys.executable, "-m", f"{__name__.split('.')[0]}.cli", "serve", "--port", "0", *options]
        start = time.monotonic()
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not (found := re.search(r"(http://\S+):(\d+)$", line)):
            raise BackendError(f"the service does not start: {self._popen.communicate()[1].strip()}")
        self.url, self.port = found[0], int(found[2])
        while not self.is_ready():
            if time.monotonic() - start > _STARTS_WITHIN:
                raise BackendError("the service does not become ready")
            time.sleep(0.01)
        self.ready_s = time.monotonic() - start
        self.process = psutil.Process(self._popen.pid)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._popen.kill()
        self._popen.communicate()

    def is_ready(self) -> bool:
        """Whether /readyz says so."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                return True
        except (urllib.error.HTTPError, ConnectionError):
            return False

    def metric(self, name: str) -> float:
        """A value of /metrics, such as "queue_items"; the sum over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        return sum(float(value) for value in re.findall(rf"^flashcocos_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def resources(self) -> dict[str, float]:
        """Resident MiB, threads and open files."""
        return {
            "rss_mib": round(self.process.memory_info().rss / MIB, 1),
            "threads": self.process.num_threads(),
            "files": self.process.num_fds(),
        }

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._popen.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code."""
        return self._popen.wait(60)


@dataclasses.dataclass(frozen=True)
class Question:
    """A request, and the bytes that answer it."""

    path: str
    body: bytes
    answer: bytes


@dataclasses.dataclass
class Tally:
    """What came of many requests.

    Attributes:
        counts: by status ("wrong": 200 with another's bytes).
        took: milliseconds by status.
        outside: milliseconds of each answer outside of the model's stages.
        work: of each answer, when its request began, and the seconds that it had the engine.
        beside: milliseconds of each answer outside of the engine and its queue.
    """

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    took: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    outside: list[float] = dataclasses.field(default_factory=list)
    beside: list[float] = dataclasses.field(default_factory=list)
    work: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def quantile(self, status: str, share: float) -> float:
        """Of the milliseconds of the requests that ended with `status`."""
        return round(float(np.quantile(self.took[status], share)), 2) if self.took.get(status) else 0.0


class Connection:
    """One HTTP/1.1 connection, kept open, with as little between the clock and the socket as can be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer, self._used = reader, writer, time.perf_counter()

    @classmethod
    async def open(cls, port: int) -> Connection:
        """To the service on loopback."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, path: str, body: bytes) -> None:
        """Begin a POST."""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)

    async def receive(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = await self._reader.readexactly(int(headers["content-length"]))
        self._used = time.perf_counter()
        return int(lines[0].split()[1]), headers, body

    def is_fresh(self) -> bool:
        """Whether it was used so lately that the service still holds it."""
        return time.perf_counter() - self._used < _IDLE

    def close(self) -> None:
        """Drop the connection, whatever is under way."""
        self._writer.close()


class Load:
    """Requests to a service, on connections that are used again and closed in the end; a context manager."""

    def __init__(self, port: int, questions: Sequence[Question], *, exact: bool = True) -> None:
        self.tally = Tally()
        self._port, self._questions, self._exact, self._random = port, questions, exact, random.Random(0)
        self._free: list[Connection] = []

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def ask(self, abort_within: float | None = None) -> str:
        """Send one request and note what comes; or hang up at some time within so many seconds."""
        question = self._random.choice(self._questions)
        start = time.perf_counter()
        try:
            reusable = self._free and self._free[-1].is_fresh()  # the last is the one that was used last
            connection = self._free.pop() if reusable else await Connection.open(self._port)
            connection.send(question.path, question.body)
            if abort_within is not None:
                await asyncio.sleep(self._random.uniform(0, abort_within))
                connection.close()
                return self._note("aborted", start)
            status, headers, body = await connection.receive()
        except (OSError, asyncio.IncompleteReadError) as error:
            return self._note(type(error).__name__, start)
        if headers.get("connection") == "close":
            connection.close()
        else:
            self._free.append(connection)
        if status != 200:
            return self._note(str(status), start)
        took = 1e3 * (time.perf_counter() - start)
        parts = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", headers["server-timing"])}
        self.tally.outside.append(took - sum(parts[stage] for stage in STAGES))
        self.tally.work.append((start, parts["engine"] / 1e3))
        self.tally.beside.append(took - parts["queue"] - parts["engine"])
        return self._note("200" if self._is_right(body, question.answer) else "wrong", start)

    async def loop(self, clients: int, *, seconds: float = 1e9, count: int = sys.maxsize, **options: Any) -> float:
        """`clients` that each ask again as soon as they are answered; requests a second."""
        start, left, before = time.perf_counter(), iter(range(count)), self.tally.counts["200"]

        async def client() -> None:
            while time.perf_counter() - start < seconds and next(left, None) is not None:
                await self.ask(**options)

        await asyncio.gather(*(client() for _ in range(clients)))
        return (self.tally.counts["200"] - before) / (time.perf_counter() - start)

    async def flood(self, rate: float, seconds: float, *, at_random: bool = False) -> None:
        """Ask `rate` times a second, evenly or at random, whatever is answered, and wait for all answers."""
        start, tasks, next_at = time.perf_counter(), set(), 0.0
        for _ in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + next_at - time.perf_counter()))
            next_at += self._random.expovariate(rate) if at_random else 1 / rate
            tasks.add(task := asyncio.create_task(self.ask()))
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    def close(self) -> None:
        """Close the connections."""
        while self._free:
            self._free.pop().close()

    def _is_right(self, body: bytes, answer: bytes) -> bool:
        """Whether the bytes are equal or, unless `exact`, the pixels nearly so: sums of a batch round differently."""
        if self._exact or body == answer:
            return body == answer
        made, expected = (np.asarray(Image.open(io.BytesIO(png)), np.int16) for png in (body, answer))
        return made.shape == expected.shape and int(np.abs(made - expected).max()) <= 1

    def _note(self, outcome: str, start: float) -> str:
        self.tally.counts[outcome] += 1
        self.tally.took.setdefault(outcome, []).append(1e3 * (time.perf_counter() - start))
        return outcome


class Bare:
    """The shipped model without a service, `pairs` of its demo inputs, and the questions whose answers it knows."""

    def __init__(self, size: int, pairs: int) -> None:
        from ...serve import wire

        self.size, self._write = size, wire.write_png
        self.translator = Translator(device="cpu")
        folder = PAIRS.parent
        with PAIRS.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1 : 1 + pairs]
        self.labels = [folder / label for label, _, _ in rows]
        self.exemplars = [
            self.translator.encode_exemplar(folder / picture, folder / label) for _, picture, label in rows
        ]

    def questions(self, url: str) -> list[Question]:
        """Every demo label with every demo exemplar, of a service at `url`."""
        import msgspec

        with urllib.request.urlopen(f"{url}/v1/model") as answer:
            ids = [pair["exemplar"] for pair in msgspec.json.decode(answer.read())["demo"]]
        return [
            Question(
                f"/v1/exemplars/{key}/translate?size={self.size}",
                label.read_bytes(),
                self._write(self.translator.translate(label, exemplar, self.size).image),
            )
            for key, exemplar in zip(ids, self.exemplars, strict=False)
            for label in self.labels
        ]

    def rate(self, seconds: float, batch: int) -> float:
        """Translations a second, in lists of `batch`, for at least so many seconds."""
        pairs: list[tuple[Any, Exemplar]] = [(label, exemplar) for exemplar in self.exemplars for label in self.labels]
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            part = random.choices(pairs, k=batch)
            self.translator.translate([label for label, _ in part], [exemplar for _, exemplar in part], self.size)
            done += batch
        return done / (time.perf_counter() - start)


def prepare(case: Case, assets: Assets) -> Benchmark:
    """Facts of one kind of load; parameters: kind, size, batch, and what bounds it (count, seconds, rounds)."""
    parameters = dict(case.parameters)
    return Benchmark(None, facts=KINDS[parameters.pop("kind")](**parameters))


def overhead(*, size: int, count: int, pairs: int = 6) -> dict[str, float]:
    """Milliseconds of one request after the other, and of it outside of the model's stages."""
    bare = Bare(size, pairs)

    async def run(server: Server) -> Tally:
        async with Load(server.port, bare.questions(server.url)) as requests:
            await requests.loop(1, count=2 * pairs**2)  # encodes the exemplars
            requests.tally = Tally()
            await requests.loop(1, count=count)
            return requests.tally

    with Server() as server:
        tally = asyncio.run(run(server))
    return {
        "right": tally.counts["200"],
        "other": tally.counts.total() - tally.counts["200"],
        "request_p50_ms": tally.quantile("200", 0.5),
        "outside_p50_ms": round(float(np.quantile(tally.outside, 0.5)), 2),
        "outside_p95_ms": round(float(np.quantile(tally.outside, 0.95)), 2),
    }


def throughput(*, size: int, batch: int, clients: int, rounds: int, seconds: float, pairs: int = 6) -> dict[str, float]:
    """Translations a second of the service and of the bare `Translator`, turn by turn."""
    bare = Bare(size, pairs)
    served: list[float] = []
    alone: list[float] = []

    async def run(server: Server) -> Tally:
        async with Load(server.port, bare.questions(server.url), exact=batch == 1) as requests:
            await requests.loop(clients, count=2 * pairs**2)
            requests.tally = Tally()
            for _ in range(rounds):
                served.append(await requests.loop(clients, seconds=seconds))
                alone.append(bare.rate(seconds, batch))
            return requests.tally

    with Server("--batch", str(batch)) as server:
        tally = asyncio.run(run(server))
        items = server.metric("batch_items_sum") / server.metric("batch_items_count")
    return {
        "served_per_s": round(float(np.median(served)), 2),
        "bare_per_s": round(float(np.median(alone)), 2),
        "ratio": round(float(np.median(np.divide(served, alone))), 3),
        "items_a_batch": round(items, 2),
        "right": tally.counts["200"],
        "other": tally.counts.total() - tally.counts["200"],
    }


def overload(*, size: int, times: float, seconds: float, queue: int = 32, pairs: int = 6) -> dict[str, float]:
    """`times` as many requests as the service can do."""
    bare = Bare(size, pairs)
    memory: list[float] = []

    async def run(server: Server) -> Tally:
        async with Load(server.port, bare.questions(server.url)) as requests:
            await requests.loop(4, count=2 * pairs**2)
            rate = await requests.loop(4, seconds=min(5, seconds))
            memory.append(server.resources()["rss_mib"])
            requests.tally = Tally()
            await requests.flood(times * rate, seconds)
            memory.append(server.resources()["rss_mib"])
            return requests.tally

    with Server("--queue", str(queue)) as server:
        tally = asyncio.run(run(server))
    other = tally.counts.total() - tally.counts["200"] - tally.counts["429"]
    return {
        "asked": tally.counts.total(),
        "right": tally.counts["200"],
        "refused": tally.counts["429"],
        "other": other,
        "refused_p50_ms": tally.quantile("429", 0.5),
        "refused_p99_ms": tally.quantile("429", 0.99),
        "rss_growth": round(memory[1] / memory[0] - 1, 3),
    }


def arrivals(*, size: int, load_share: float, seconds: float, pairs: int = 6) -> dict[str, float]:
    """Requests at random times, `load_share` of what the service can do; and what `scale.replay` says of them.

    The simulation gets when each request came and how long it had the engine, and says how long all of them waited.
    """
    from ..scale import replay

    bare = Bare(size, pairs)

    async def run(server: Server) -> tuple[float, Tally]:
        async with Load(server.port, bare.questions(server.url)) as requests:
            await requests.loop(4, count=2 * pairs**2)
            rate = await requests.loop(4, seconds=min(10, seconds))
            requests.tally = Tally()
            await requests.flood(load_share * rate, seconds, at_random=True)
            return rate, requests.tally

    with Server() as server:
        rate, tally = asyncio.run(run(server))
    expected = replay(tally.work, extra=float(np.mean(tally.beside)) / 1e3)
    measured = {f"p{share}_ms": tally.quantile("200", share / 100) for share in (50, 95, 99)}
    return {
        "asked": tally.counts.total(),
        "right": tally.counts["200"],
        "other": tally.counts.total() - tally.counts["200"],
        "rate_per_s": round(load_share * rate, 2),
        **{
            name: value
            for share in measured
            for name, value in ((share, measured[share]), (f"simulated_{share}", round(expected[share], 2)))
        },
    }


def soak(*, size: int, count: int, clients: int, aborts: float, pairs: int = 6) -> dict[str, float]:
    """Many requests, a share `aborts` of which hang up within 0.2 s."""
    bare = Bare(size, pairs)
    seen: list[dict[str, float]] = []

    async def run(server: Server) -> Tally:
        async with Load(server.port, bare.questions(server.url)) as requests:
            await requests.loop(clients, count=count // 10)
            requests.tally = Tally()
            await _quiet(server, requests)
            seen.append(server.resources())
            part = int(count * aborts)
            await asyncio.gather(
                requests.loop(clients, count=count - part), requests.loop(clients, count=part, abort_within=0.2)
            )
            await _quiet(server, requests)
            seen.append(server.resources())
            return requests.tally

    with Server() as server:
        tally = asyncio.run(run(server))
        queue = server.metric("queue_items")
    before, after = seen
    known = tally.counts["200"] + tally.counts["aborted"] + tally.counts["429"]
    return {
        "asked": tally.counts.total(),
        "right": tally.counts["200"],
        "aborted": tally.counts["aborted"],
        "refused": tally.counts["429"],
        "other": tally.counts.total() - known,
        "queue": queue,
        "rss_growth": round(after["rss_mib"] / before["rss_mib"] - 1, 3),
        "more_threads": after["threads"] - before["threads"],
        "more_files": after["files"] - before["files"],
    }


def drain(*, size: int, clients: int, times: int, pairs: int = 6) -> dict[str, float]:
    """SIGTERM with `clients` requests in work, `times` times."""
    bare = Bare(size, pairs)
    totals: Counter[str] = Counter()
    took = []

    async def run(server: Server) -> Counter[str]:
        async with Load(server.port, bare.questions(server.url)) as requests:
            await requests.loop(clients, count=3 * clients)
            requests.tally = Tally()
            tasks = [asyncio.create_task(requests.ask()) for _ in range(clients)]
            while server.metric("inflight") < clients:
                await asyncio.sleep(0)
            server.terminate()
            await asyncio.gather(*tasks)
            return requests.tally.counts

    for _ in range(times):
        with Server() as server:
            counts = asyncio.run(run(server))
            start = time.perf_counter()
            counts[f"exit {server.wait()}"] += 1
            took.append(time.perf_counter() - start)
            totals += counts
    return {
        "accepted": clients * times,
        "right": totals["200"],
        "other": clients * times - totals["200"],
        "exits": times,
        "exits_0": totals["exit 0"],
        "exit_s": round(max(took), 2),
    }


def ready(*, times: int) -> dict[str, float]:
    """Seconds from the start of the process until it is ready."""
    seconds = []
    for _ in range(times):
        with Server() as server:
            seconds.append(server.ready_s)
    return {"ready_p50_s": round(float(np.median(seconds)), 2), "ready_max_s": round(max(seconds), 2)}


async def _quiet(server: Server, requests: Load) -> None:
    """Wait until the service has nothing to do, and the connections are gone."""
    requests.close()
    while server.metric("inflight"):
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)


KINDS: dict[str, Callable[..., dict[str, float]]] = {
    "overhead": overhead,
    "throughput": throughput,
    "overload": overload,
    "arrivals": arrivals,
    "soak": soak,
    "drain": drain,
    "ready": ready,
}
