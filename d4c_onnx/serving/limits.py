"""How much one request may ask for, and how long anything may take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """All bounds of a server.

    Attributes:
        body_bytes: of one request's body.
        bodies_bytes: of all bodies that are in memory at one time.
        pixels: of an image, as it is stored; it is not decoded before they are counted.
        images: of one request.
        texts: of one request; for labels in templates, of all prompts.
        letters: of one text.
        batch: images or texts that go through an encoder together.
        window_seconds: how long an idle encoder waits for company.
        waiting: images or texts that may wait for an encoder.
        connections: that are open at one time.
        arrive_seconds: in which a request's head, and then its body, must be here.
        idle_seconds: that a connection without a request stays open.
        answer_seconds: in which it must have been answered.
    """

    body_bytes: int = 16 * 2**20
    bodies_bytes: int = 256 * 2**20
    pixels: int = 2**25
    images: int = 16
    texts: int = 256
    letters: int = 2000
    batch: int = 16
    window_seconds: float = 0.002
    waiting: int = 512
    connections: int = 256
    arrive_seconds: float = 20.0
    idle_seconds: float = 15.0
    answer_seconds: float = 60.0
