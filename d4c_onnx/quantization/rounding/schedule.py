"""How long AdaRound learns: values without torch, so that a recipe can name them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdaRoundSchedule:
    """Of Adam, for each region.

    Attributes:
        steps: per region.
        learning_rate: of Adam.
        batch: images or prompts per step.
    """

    steps: int
    learning_rate: float
    batch: int = 32


# A twentieth of the published steps with ten times the rate ends as low on the minis (docs/log.md).
SHORT = AdaRoundSchedule(1_000, 0.01)
# Source: arXiv 2511.15411's code.
PUBLISHED = AdaRoundSchedule(20_000, 0.001)
