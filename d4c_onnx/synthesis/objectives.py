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
        labels: int64 [B], the noun each image is made for.
        inside: scalars from within the tower for the whole image, by name (`taps`); only those asked for.
    """

    pixels: torch.Tensor
    embeds: dict[str, torch.Tensor]
    texts: torch.Tensor
    labels: torch.Tensor
    inside: dict[str, torch.Tensor] = field(default_factory=dict)


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
        return F.cross_entropy(seen.embeds[view] @ seen.texts.T / temperature, seen.labels)

    return Objective((Term(f"pgsi_{view}", frozenset({view}), value),))


def structure(temperature: float) -> Objective:
    """SCG: the box is pulled to its prompt, away from the other prompts and from every background of the batch."""

    def value(seen: Seen) -> torch.Tensor:
        box, background = seen.embeds["box"], seen.embeds["background"]
        logits = torch.cat([box @ seen.texts.T, box @ background.T], 1) / temperature
        return F.cross_entropy(logits, seen.labels)

    return Objective((Term("scg", frozenset({"box", "background"}), value),))


def total_variation() -> Objective:
    """Mean squared difference of neighbouring pixels, both directions."""

    def value(seen: Seen) -> torch.Tensor:
        x = seen.pixels
        return (x[:, :, 1:] - x[:, :, :-1]).square().mean() + (x[:, :, :, 1:] - x[:, :, :, :-1]).square().mean()

    return Objective((Term("tv", frozenset(), value),))


def inside(name: str) -> Objective:
    """A value from within the tower as a loss: `bns` or `pse` (`taps` has them)."""
    return Objective((Term(name, frozenset({"whole"}), lambda seen: seen.inside[name], inside=frozenset({name})),))
