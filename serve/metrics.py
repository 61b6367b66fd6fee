"""What Prometheus reads at /metrics; docs/serving.md explains each."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one app."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"flashcocos_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"flashcocos_{name}", text, labels, registry=self._registry, buckets=buckets)

        self.requests = counter("requests", "Answers", "route", "code")
        self.request_seconds = histogram("request_seconds", "From headers to the end of the answer", "route")
        self.queue_wait_seconds = histogram("queue_wait_seconds", "That the oldest item of a batch waited")
        self.refused = counter("refused", "Requests that were not admitted", "reason")
        self.cancelled = counter("cancelled", "Requests that nobody waits for any more", "where")
        self.batch_items = histogram("batch_items", "Items of a batch", buckets=(1, 2, 4, 8, 16, 32, 64))
        self.stage_seconds = histogram("stage_seconds", "Share of an item in the time of a stage", "stage")
        self.lookups = counter("exemplar_lookups", "Exemplars that were asked for", "result")
        self.encode_seconds = histogram("exemplar_encode_seconds", "Encoding of an exemplar")

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a value that is read when it is asked for."""
        Gauge(f"flashcocos_{name}", text, registry=self._registry).set_function(value)

    def build_info(self, **labels: str) -> None:
        """Add the constant 1 with what runs here as labels."""
        Gauge("flashcocos_build_info", "What runs here", labels, registry=self._registry).labels(**labels).set(1)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
