"""What measuring says of accuracy, as values: `evaluate` returns them, manifests keep them, --json prints them."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of two hit rates on the same items, with its 95 % interval; all in percentage points."""

    points: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Versus:
    """How a bundle's answers compare with those of the first one.

    Attributes:
        agreement: of the best answer per image, in percent.
        cosine_image, cosine_text: mean cosine of each tower's embeddings.
        similarity_rmse: root mean square error of the similarity matrix.
        top1_difference: where there are labels.
        cosine_image_least, cosine_text_least: where they are looked at, in fidelity.
    """

    agreement: float
    cosine_image: float
    cosine_text: float
    similarity_rmse: float
    top1_difference: PairedDifference | None = None
    cosine_image_least: float | None = None
    cosine_text_least: float | None = None

    @property
    def top1_lost(self) -> float:
        """Percentage points of top-1 below the first bundle; 0 where there are no labels."""
        return -self.top1_difference.points if self.top1_difference else 0.0

    def as_dict(self) -> dict[str, object]:
        """For JSON: what was not measured is left out."""
        return _measured(
            top1_difference=asdict(self.top1_difference) if self.top1_difference else None,
            agreement=self.agreement,
            cosine_image=self.cosine_image,
            cosine_image_least=self.cosine_image_least,
            cosine_text=self.cosine_text,
            cosine_text_least=self.cosine_text_least,
            similarity_rmse=self.similarity_rmse,
        )


@dataclass(frozen=True, slots=True)
class BundleAccuracy:
    """One bundle's row.

    Attributes:
        bundle: its path; in a manifest, which holds no machine's paths, its folder's name.
        top1, top5: in percent, where there are labels.
        versus_first: None in the first row.
    """

    bundle: str
    top1: float | None = None
    top5: float | None = None
    versus_first: Versus | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON: what was not measured is left out."""
        versus = self.versus_first.as_dict() if self.versus_first else None
        return _measured(bundle=self.bundle, top1=self.top1, top5=self.top5, versus_first=versus)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Several bundles side by side, the baseline first.

    Attributes:
        kind: `zero-shot` on a labelled set, or `fidelity` on held-out synthetic input.
        images: how many were looked at.
        bundles: one row each.
        dataset: the labelled set's name.
        prompts: how many, in fidelity.
    """

    kind: str
    images: int
    bundles: tuple[BundleAccuracy, ...]
    dataset: str | None = None
    prompts: int | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON: what does not apply is left out."""
        rows = [row.as_dict() for row in self.bundles]
        return _measured(kind=self.kind, dataset=self.dataset, images=self.images, prompts=self.prompts, bundles=rows)


@dataclass(frozen=True, slots=True)
class PromiseTry:
    """One pair of encoder files that was held against a promise.

    Attributes:
        image, text: the widths of each encoder's weights, in words.
        weight_bits_average: stored bits a weight, over both files.
        size_bytes: of both files.
        cosine_image, cosine_text: mean cosine to FP32 on held-out images and prompts; None where nobody asked.
        top1_lost: percentage points of top-1 below FP32 on the labelled set; None where nobody asked.
    """

    image: str
    text: str
    weight_bits_average: float
    size_bytes: int
    cosine_image: float | None = None
    cosine_text: float | None = None
    top1_lost: float | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON: what was not measured is left out."""
        return _measured(**asdict(self))


@dataclass(frozen=True, slots=True)
class Promise:
    """What was promised of a quantised bundle, and how the smallest files that keep it were found.

    Attributes:
        target_cosine: that each tower's mean cosine to FP32 must reach on held-out data; None: not asked.
        max_drop: that top-1 may fall by, in percentage points; None: not asked.
        tries: in the order in which they were made.
        chosen: which of them, or, where both towers were settled in different ones, what they are together; None: no
            configuration keeps the promise.
    """

    target_cosine: float | None
    max_drop: float | None
    tries: tuple[PromiseTry, ...]
    chosen: PromiseTry | None

    def as_dict(self) -> dict[str, object]:
        """For JSON: what was not asked is left out."""
        return _measured(
            target_cosine=self.target_cosine,
            max_drop=self.max_drop,
            kept=self.chosen is not None,
            chosen=self.chosen.as_dict() if self.chosen else None,
            tries=[entry.as_dict() for entry in self.tries],
        )


def _measured(**values: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}
