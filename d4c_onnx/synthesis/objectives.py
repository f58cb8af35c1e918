"""What an image must do. Objectives are values: built before a model is loaded, weighted with `*`, added with `+`.

    guidance("whole", 0.1) + 0.1 * total_variation()

Source: arXiv 2511.15411, PGSI and SCG; equations read from its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Seen:
    """What one forward pass gives the objectives.

    Attributes:
        pixels: rendered pixel_values [B, 3, H, W].
        embeds: unit vectors [B, D] by view: `whole`, `box`, `background`; only the views an objective asked for.
        texts: unit vectors [K, D], one per noun.
        targets: float32 [B, K], how much of each noun an image is made for; rows sum to 1.
        inside: scalars from within the tower for the whole image, by name (`taps`); only those asked for.
        earlier: unit vectors [M, D] of images that are finished.
    """

    pixels: torch.Tensor
    embeds: dict[str, torch.Tensor]
    texts: torch.Tensor
    targets: torch.Tensor
    inside: dict[str, torch.Tensor] = field(default_factory=dict)
    earlier: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """One weighted loss term: a name for reports, the views and inside values it needs, its value for what was seen."""

    name: str
    views: frozenset[str]
    value: Callable[[Seen], torch.Tensor]
    weight: float = 1.0
    inside: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Objective:
    """A sum of terms."""

    terms: tuple[Term, ...] = ()

    def __add__(self, other: Objective) -> Objective:
        return Objective(self.terms + other.terms)

    def __mul__(self, factor: float) -> Objective:
        return Objective(tuple(replace(term, weight=term.weight * factor) for term in self.terms))

    __rmul__ = __mul__

    @property
    def views(self) -> frozenset[str]:
        """Every view some term needs."""
        return frozenset().union(*(term.views for term in self.terms))

    @property
    def inside(self) -> frozenset[str]:
        """Every value from within the tower that some term needs."""
        return frozenset().union(*(term.inside for term in self.terms))

    def __call__(self, seen: Seen) -> tuple[torch.Tensor, dict[str, float]]:
        """The weighted sum, and each term's own value for reports."""
        total = torch.zeros((), device=seen.pixels.device)
        shown = {}
        for term in self.terms:
            value = term.value(seen)
            shown[term.name] = float(value.detach())
            total = total + term.weight * value
        return total, shown


def guidance(view: str, temperature: float) -> Objective:
    """PGSI: cross-entropy of the image against all prompts, the image's own prompt being the answer."""

    def value(seen: Seen) -> torch.Tensor:
        return F.cross_entropy(seen.embeds[view] @ seen.texts.T / temperature, seen.targets)

    return Objective((Term(f"pgsi_{view}", frozenset({view}), value),))


def structure(temperature: float, background_temperature: float | None = None) -> Objective:
    """SCG: the box is pulled to its prompt, away from the other prompts and from every background of the batch.

    Args:
        temperature: of the prompts, and of the backgrounds unless those have their own.
        background_temperature: higher values weaken the push away from backgrounds; None is as published.
    """
    apart = background_temperature or temperature

    def value(seen: Seen) -> torch.Tensor:
        box, background = seen.embeds["box"], seen.embeds["background"]
        logits = torch.cat([box @ seen.texts.T / temperature, box @ background.T / apart], 1)
        return F.cross_entropy(logits, F.pad(seen.targets, (0, len(background))))

    return Objective((Term("scg", frozenset({"box", "background"}), value),))


def total_variation() -> Objective:
    """Mean squared difference of neighbouring pixels, both directions."""

    def value(seen: Seen) -> torch.Tensor:
        x = seen.pixels
        return (x[:, :, 1:] - x[:, :, :-1]).square().mean() + (x[:, :, :, 1:] - x[:, :, :, :-1]).square().mean()

    return Objective((Term("tv", frozenset(), value),))


def diversity() -> Objective:
    """Mean cosine similarity of each image to the others of its batch and to those finished before it."""

    def value(seen: Seen) -> torch.Tensor:
        own = seen.embeds["whole"]
        count = len(own)
        others = own @ own.T - torch.eye(count, device=own.device)
        total, pairs = others.sum(), count * (count - 1)
        if seen.earlier is not None and len(seen.earlier):
            total, pairs = total + (own @ seen.earlier.T).sum(), pairs + count * len(seen.earlier)
        return total / max(1, pairs)

    return Objective((Term("diversity", frozenset({"whole"}), value),))


def inside(name: str) -> Objective:
    """A value from within the tower as a loss: `bns`, `pse` or `attention` (`taps` has them)."""
    return Objective((Term(name, frozenset({"whole"}), lambda seen: seen.inside[name], inside=frozenset({name})),))
