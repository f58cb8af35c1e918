"""Items that arrive together go through the encoder together; a full queue says so; one bad item spoils no other."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest

from d4c_onnx.serving.batcher import Batcher, Busy, Encoded


class Encoder:
    """Doubles numbers, and remembers its batches; waits for `gate` where one is given."""

    def __init__(self, gate: Event | None = None) -> None:
        self.batches: list[list[float]] = []
        self.begun = Event()
        self._gate = gate

    def __call__(self, items: list[float]) -> np.ndarray:
        self.batches.append(list(items))
        self.begun.set()
        if self._gate is not None:
            assert self._gate.wait(30)
        if -1.0 in items:
            raise ValueError("a bad item")
        return np.array(items, np.float32)[:, None] * 2


def _batcher(encoder: Encoder, executor: ThreadPoolExecutor, **changed: float) -> Batcher:
    sizes = {"most": 4, "window_seconds": 0.0, "waiting": 8} | changed
    return Batcher(encoder, executor, **sizes)  # type: ignore[arg-type]


async def _with(batcher: Batcher, *requests: list[float]) -> list[Encoded]:
    """All requests at one moment."""
    task = asyncio.create_task(batcher.run())
    try:
        return await asyncio.gather(*(batcher(items) for items in requests), return_exceptions=True)
    finally:
        task.cancel()


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as threads:
        yield threads


def test_what_arrives_together_goes_together_and_comes_back_in_order(executor: ThreadPoolExecutor) -> None:
    encoder = Encoder()
    answers = asyncio.run(_with(_batcher(encoder, executor), [1.0], [2.0, 3.0], [4.0, 5.0, 6.0]))
    assert encoder.batches == [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0]]
    assert [answer.vectors[:, 0].tolist() for answer in answers] == [[2.0], [4.0, 6.0], [8.0, 10.0, 12.0]]


def test_what_arrives_while_a_batch_runs_becomes_the_next(executor: ThreadPoolExecutor) -> None:
    gate = Event()
    encoder = Encoder(gate)

    async def story() -> None:
        batcher = _batcher(encoder, executor)
        task = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher([1.0]))
        await asyncio.to_thread(encoder.begun.wait, 30)
        others = [asyncio.create_task(batcher([number])) for number in (2.0, 3.0, 4.0)]
        await asyncio.sleep(0)
        assert batcher.waiting == 3
        gate.set()
        await asyncio.gather(first, *others)
        task.cancel()

    asyncio.run(story())
    assert encoder.batches == [[1.0], [2.0, 3.0, 4.0]]


def test_an_idle_encoder_waits_for_company(executor: ThreadPoolExecutor) -> None:
    encoder = Encoder()

    async def story() -> None:
        batcher = _batcher(encoder, executor, window_seconds=5.0, most=2)
        task = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher([1.0]))
        await asyncio.sleep(0.01)
        assert encoder.batches == []
        await asyncio.gather(first, batcher([2.0]))
        task.cancel()

    begun = asyncio.run(_timed(story()))
    assert encoder.batches == [[1.0, 2.0]]
    assert begun < 5.0  # a full batch waits for nobody


async def _timed(work) -> float:
    begun = asyncio.get_running_loop().time()
    await work
    return asyncio.get_running_loop().time() - begun


def test_a_full_queue_says_so_and_the_others_are_served(executor: ThreadPoolExecutor) -> None:
    encoder = Encoder()
    first, second = asyncio.run(_with(_batcher(encoder, executor), [1.0] * 6, [2.0] * 3))
    assert first.vectors.shape == (6, 1)
    assert isinstance(second, Busy)


def test_a_bad_item_is_its_own_requests_fault(executor: ThreadPoolExecutor) -> None:
    encoder = Encoder()
    good, bad, other = asyncio.run(_with(_batcher(encoder, executor), [1.0], [-1.0], [3.0]))
    assert isinstance(bad, ValueError)
    assert good.vectors.tolist() == [[2.0]]
    assert other.vectors.tolist() == [[6.0]]


def test_what_nobody_waits_for_is_not_encoded(executor: ThreadPoolExecutor) -> None:
    encoder = Encoder()

    async def story() -> None:
        batcher = _batcher(encoder, executor)
        given_up = asyncio.create_task(batcher([1.0]))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        task = asyncio.create_task(batcher.run())
        await batcher([2.0])
        task.cancel()

    asyncio.run(story())
    assert encoder.batches == [[2.0]]


def test_milliseconds_are_those_of_its_batches(executor: ThreadPoolExecutor) -> None:
    told: list[float] = []
    encoder = Encoder()
    batcher = Batcher(
        encoder, executor, most=2, window_seconds=0.0, waiting=9, on_batch=lambda items, seconds: told.append(seconds)
    )
    [answer] = asyncio.run(_with(batcher, [1.0, 2.0, 3.0]))
    assert len(told) == 2
    assert answer.milliseconds == pytest.approx(1000 * sum(told))
