"""What Prometheus asks for at /metrics: requests, seconds, batches, what waits, and the process itself."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from d4c_onnx.serving.batcher import OnBatch

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Meters:
    """One server's; two in one process do not share them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        own = self._registry
        self._requests = Counter("d4c_requests", "Requests answered.", ["path", "status"], registry=own)
        self._seconds = Histogram(
            "d4c_request_seconds", "From a request's head to its answer.", ["path"], registry=own, buckets=_SECONDS
        )
        self._items = Histogram(
            "d4c_batch_items",
            "Images or texts of a batch.",
            ["bundle", "encoder"],
            registry=own,
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )
        self._encoder = Histogram(
            "d4c_encoder_seconds", "A batch's run.", ["bundle", "encoder"], registry=own, buckets=_SECONDS
        )
        self._waiting = Gauge("d4c_waiting_items", "Before an encoder.", ["bundle", "encoder"], registry=own)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request was."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def on_batch(self, bundle: str, encoder: str) -> OnBatch:
        """What an encoder's batcher tells."""

        def count(items: int, seconds: float) -> None:
            self._items.labels(bundle, encoder).observe(items)
            self._encoder.labels(bundle, encoder).observe(seconds)

        return count

    def watch(self, bundle: str, encoder: str, waiting: Callable[[], int]) -> None:
        """Ask for what waits before an encoder whenever Prometheus does."""
        self._waiting.labels(bundle, encoder).set_function(waiting)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
