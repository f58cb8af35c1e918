"""What an image must do. Objectives are values: built before a model is loaded, weighted with `*`, added with `+`.

    guidance("whole", 0.1) + 0.1 * total_variation()

Source: arXiv 2511.15411, PGSI and SCG; equations read from its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from d4c_onnx.calibration.method import Method


@dataclass(frozen=True, slots=True)
class Seen:
    """What one forward pass gives the objectives.

    Attributes:
        pixels: rendered pixel_values [B, 3, H, W].
        embeds: unit vectors [B, D] by view: `whole`, `box`, `background`; only the views an objective asked for.
        texts: unit vectors [K, D], one per noun.
        labels: int64 [B], the noun each image is made for.
        activation_terms: scalars from the tower's activations for the whole image, by name (`hooks`); only those asked
            for.
    """

    pixels: torch.Tensor
    embeds: dict[str, torch.Tensor]
    texts: torch.Tensor
    labels: torch.Tensor
    activation_terms: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Term:
    """One weighted loss term: its name in reports, the views and activation terms it needs, its value."""

    name: str
    views: frozenset[str]
    value: Callable[[Seen], torch.Tensor]
    weight: float = 1.0
    activation_terms: frozenset[str] = frozenset()


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
    def activation_terms(self) -> frozenset[str]:
        """Every value of the tower's activations that some term needs."""
        return frozenset().union(*(term.activation_terms for term in self.terms))

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


def activation_term(name: str) -> Objective:
    """A value of the tower's activations as a loss: `bns` or `pse` (`hooks` has them)."""

    def value(seen: Seen) -> torch.Tensor:
        return seen.activation_terms[name]

    return Objective((Term(name, frozenset({"whole"}), value, activation_terms=frozenset({name})),))


def build_objective(method: Method, keeps_statistics: bool = False) -> Objective:
    """The published sum, plus what this library adds; for the baselines, their one term and total variation.

    Args:
        keeps_statistics: whether the tower has BatchNorms to be faithful to.
    """
    smooth = method.tv_weight * total_variation()
    if method.loss != "d4c":
        return activation_term(method.loss) + smooth
    objective = guidance("whole", method.temperature)
    if method.scg:
        objective = structure(method.temperature) + (
            method.whole_image_weight * objective if method.whole_image_weight else Objective()
        )
    if keeps_statistics and method.bns_weight:
        objective = objective + method.bns_weight * activation_term("bns")
    return objective + smooth
