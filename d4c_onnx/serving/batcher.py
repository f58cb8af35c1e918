"""Items that arrive together go through an encoder together.

While a batch runs others arrive and become the next one, so that batches are as large as the load makes them. An idle
encoder waits a moment for company. The queue is bounded: who finds it full is told at once, and may come again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

OnBatch = Callable[[int, float], object]


class Busy(Exception):
    """More waits than may wait."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a request's items.

    Attributes:
        vectors: float32 [N, D].
        milliseconds: that the encoder took for the batches which they were part of; waiting is not counted.
    """

    vectors: np.ndarray
    milliseconds: float


@dataclass(frozen=True, slots=True)
class _Answer:
    vector: np.ndarray
    batch: int
    milliseconds: float


class Batcher:
    """A queue before one encoder. Everything but the encoder itself happens in the event loop's thread."""

    def __init__(
        self,
        encode: Callable[[list[Any]], np.ndarray],
        executor: Executor,
        *,
        most: int,
        window_seconds: float,
        waiting: int,
        on_batch: OnBatch = lambda items, seconds: None,
    ) -> None:
        """A batcher that does nothing before `run` is awaited.

        Args:
            encode: items to float32 [N, D]; called in the executor.
            most: items of a batch.
            window_seconds: how long an idle encoder waits for company.
            waiting: items that may wait.
            on_batch: told how many items were encoded, and in how many seconds.
        """
        self._encode, self._executor, self._on_batch = encode, executor, on_batch
        self._most, self._window, self._limit = most, window_seconds, waiting
        self._queue: deque[tuple[Any, asyncio.Future[_Answer]]] = deque()
        self._arrived = asyncio.Event()
        self._number = 0

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return len(self._queue)

    async def __call__(self, items: Sequence[Any]) -> Encoded:
        """Vectors of a request's items, in their order.

        Raises:
            Busy: the queue has no room for them.
            Exception: the encoder's, for one of them.
        """
        if len(self._queue) + len(items) > self._limit:
            raise Busy
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._queue.extend(zip(items, futures, strict=True))
        self._arrived.set()
        answers = await asyncio.gather(*futures)
        batches = {answer.batch: answer.milliseconds for answer in answers}
        return Encoded(np.stack([answer.vector for answer in answers]), sum(batches.values()))

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            if not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
                await self._company()
            batch = self._next()
            if batch:
                await self._answer(batch)

    async def _company(self) -> None:
        """Wait a moment for a full batch."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._window):
                while len(self._queue) < self._most:
                    self._arrived.clear()
                    await self._arrived.wait()

    def _next(self) -> list[tuple[Any, asyncio.Future[_Answer]]]:
        """The next batch, without those whose requests were given up."""
        batch: list[tuple[Any, asyncio.Future[_Answer]]] = []
        while self._queue and len(batch) < self._most:
            item, future = self._queue.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _answer(self, batch: list[tuple[Any, asyncio.Future[_Answer]]]) -> None:
        """Encode a batch; where that fails, each item by itself, so that one of them spoils no other's answer."""
        items = [item for item, _ in batch]
        begun = time.perf_counter()
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(self._executor, self._encode, items)
        except Exception as error:
            if len(batch) > 1:
                for pair in batch:
                    await self._answer([pair])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        seconds = time.perf_counter() - begun
        self._on_batch(len(batch), seconds)
        self._number += 1
        for vector, (_, future) in zip(vectors, batch, strict=True):
            if not future.done():
                future.set_result(_Answer(vector, self._number, seconds * 1000))
