"""How images are optimised, as values: D4C as this library runs it, D4C as published, and two published baselines.

    replace(D4C, scg=False, pae=False)   # prompt guidance alone

Source of the published values: arXiv 2511.15411 and its code; what each choice is worth: docs/synthesis.md. They are
constants and no recipe keys: none of them helps a user's model that would not help every model. They stand here, below
the room that uses them, because a set's key holds them: a set made with other constants is another set. Never torch.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from d4c_onnx.errors import RecipeError

Loss = Literal["d4c", "bns", "pse"]
Parametrization = Literal["fourier", "pixel"]
Labels = Literal["stratified", "random"]
Start = Literal["noise", "leaves"]


@dataclass(frozen=True, slots=True)
class Method:
    """The constants of an optimisation; the defaults are this library's D4C.

    Attributes:
        loss: what images must do. d4c: PGSI, with the switches below. bns: the distance to the tower's BatchNorm
            statistics alone (ResNets). pse: patch similarity entropy alone (ViTs). Total variation joins each of them.
        learning_rate: Adam's. Published is 0.01 for 3,000 passes; 50 have to take larger steps.
        temperature: tau of the contrastive losses, as published.
        scg: structural contrastive generation, box against background, as published; two more views of each image. The
            prompt guides without it, too.
        pae: perturbation-aware enhancement, as published.
        tv_weight: weight of the image's total variation, as published; 0.3, 1 and 3 move nothing beyond what seeds do.
        whole_image_weight: weight of PGSI on the whole image beside SCG's box. Not published; calibration sees whole
            images, and without them those of a ViT agree less.
        bns_weight: weight of the distance to BatchNorm statistics where the tower keeps them, and 0 elsewhere. Not
            published; 300 is better than 30, 100 and 1,000 for a ResNet.
        image: fourier: coefficients scaled with 1 / f under a sigmoid, so that pixels cannot leave [0, 1]. pixel: free
            values, as published, which agree less.
        box_area: range of the box's share of the image, 0 < low <= high < 1, as published; one box an image, drawn
            once: drawing anew at every step is no better.
        background_noise: sigma of the noise on SCG's background view, as published.
        shared_optimizer: one Adam over all calibration images, as published. One for each batch is as good, and batches
            that know nothing of each other let a run resume, share its work and stop early.
        labels: how nouns are dealt to images. random: drawn with replacement, as published. stratified: each equally
            often, whatever the seed.
        start: what images are before the first step. noise: N(0, 1) for pixel, as published, calmer for fourier.
            leaves: pictures of random shapes (`dead_leaves`). Not published; after 20 steps a tower of really trained
            weights is nearer to FP32, by cosine and agreement, than on the leaves themselves (docs/fidelity.md).
        patches: how many patches a side a ViT looks at while it guides; one of more sees the images smaller, its
            positions resampled, and a step takes a fraction of the time. What is fine stays as the start has it. Not
            published; 0: as many as it has.

    Raises:
        RecipeError: a value is out of its range.
    """

    loss: Loss = "d4c"
    learning_rate: float = 0.1
    temperature: float = 0.1
    scg: bool = True
    pae: bool = True
    tv_weight: float = 0.1
    whole_image_weight: float = 1.0
    bns_weight: float = 300.0
    image: Parametrization = "fourier"
    box_area: tuple[float, float] = (0.4, 0.7)
    background_noise: float = 0.1
    shared_optimizer: bool = False
    labels: Labels = "stratified"
    start: Start = "leaves"
    patches: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("loss", get_args(Loss)),
            ("image", get_args(Parametrization)),
            ("labels", get_args(Labels)),
            ("start", get_args(Start)),
        ):
            if getattr(self, name) not in choices:
                raise RecipeError(f"Method.{name}: {getattr(self, name)!r} is none of {', '.join(choices)}.")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"Method.{name}: needs a value above 0, got {getattr(self, name)}.")
        for name in ("tv_weight", "whole_image_weight", "bns_weight", "background_noise"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"Method.{name}: needs a value of at least 0, got {getattr(self, name)}.")
        if self.patches < 0:
            raise RecipeError(f"Method.patches: needs a value of at least 0, got {self.patches}.")
        low, high = self.box_area
        if not 0 < low <= high < 1:
            raise RecipeError(f"Method.box_area: needs 0 < low <= high < 1, got ({low}, {high}).")


D4C = Method()

# The switches as published, quirks included. One quirk is left out: the published PNG files of these images wrap around
# where pixels leave [0, 1]; it never touches the tensors that calibrate.
PUBLISHED = Method(
    learning_rate=0.01,
    whole_image_weight=0.0,  # (quirk) the whole image, which calibration then sees, is never in the loss
    bns_weight=0.0,
    image="pixel",  # (quirk) no clamp: pixels leave [0, 1]
    shared_optimizer=True,  # (quirk) images outside the minibatch move on stale momentum
    labels="random",  # (quirk) some nouns come up often and some never
    start="noise",
)

# Whole images alone, and small ones for a ViT: of a ViT-S/14 a step takes a tenth of the time. On a CLIP of really
# trained weights W4A8 then answers as often like FP32 as with all of D4C, and by cosine is a little farther from it.
LIGHT = Method(scg=False, patches=8)

# `synthesis.method` -> how it optimises; the others (noise, pink, leaves, real) optimise nothing
METHODS: dict[str, Method] = {
    "d4c": D4C,
    "d4c-light": LIGHT,
    "d4c-published": PUBLISHED,
    "bns": Method(loss="bns", start="noise"),
    "pse": Method(loss="pse", start="noise"),
}
