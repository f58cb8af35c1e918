"""What calibration images look like: some rows of docs/synthesis.md, both models side by side.

    python benchmarks/synthesis_images.py -o exported --train cifar10-train.parquet --write docs/synthesis-images.jpg

Sets that are there already (of the same recipe and seed) are drawn as they are; the others are made first.
"""

import argparse
from pathlib import Path

import numpy as np
from synthesis import MODELS, ROWS, calibration_set

from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.runtime.preprocess import denormalize

SHOWN = ("default", "published, 500 of 3,000 passes", "PGSI", "free pixels", "bns", "pse", "pink", "noise", "real")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("exported"))
    parser.add_argument("--train", type=Path, required=True, help="parquet with training images, for the row `real`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=8, help="of each set")
    parser.add_argument("--write", type=Path, required=True, help="a .jpg or .png")
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(SHOWN), len(MODELS), figsize=(13, 0.95 * len(SHOWN)), layout="constrained")
    for column, model in enumerate(MODELS):
        for panel, name in zip(axes[:, column], SHOWN, strict=True):
            panel.axis("off")
            if model not in ROWS[name].models:
                continue
            _, made = calibration_set(model, name, args.seed, args.train, args.output)
            bundle = open_bundle(pipeline.bundle_folder(args.output, model))
            pixels = denormalize(np.array(made.pixel_values[: args.images]), bundle.manifest.preprocess)
            strip = np.concatenate(list(np.pad(pixels, ((0, 0), (0, 0), (0, 0), (0, 2)), constant_values=1)), -1)
            panel.imshow(strip.transpose(1, 2, 0), interpolation="nearest")
            panel.set_title(f"{model}: {name}", fontsize=8, loc="left", pad=2)
    figure.savefig(args.write, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
