"""Which rewrites of the same quantised graph make it run fastest? A variant is a tuple of rewrites, as a target is.

    d4c-onnx synthesize ViT-B-32 --pretrained random --set synthesis.method=noise
    python benchmarks/graph_variants.py exported/ViT-B-32 exported/ViT-B-32/calibration-* --batches 1,16

Both encoders are quantised once, without any rewrite for serving; each variant rewrites copies of these files.
`--beside` races other bundles of the model as they are. Interleaved medians, two threads.
"""

import argparse
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration.dataset import open_calibration_set
from d4c_onnx.calibration.readers import D4CCalibrationDataReader, PromptCalibrationDataReader
from d4c_onnx.evaluation.latency import Contender, drawn_feeds, measure_latency
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.quantization.encoder import quantize_encoder
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.quantization.rewrites.gelu import SEPARATE_GELU
from d4c_onnx.quantization.rewrites.pooled_row import COMPUTE_POOLED_ROW
from d4c_onnx.quantization.rewrites.rewrite import Rewrite, apply_all
from d4c_onnx.quantization.targets import TARGETS
from d4c_onnx.recipe_file import load_recipe

VARIANTS: dict[str, tuple[Rewrite, ...]] = {
    "as quantised (all rows)": (),
    "pooled row only": (COMPUTE_POOLED_ROW,),
    "attention as one operator": (FUSE_ATTENTION,),
    "both": (COMPUTE_POOLED_ROW, FUSE_ATTENTION),
    "GELU apart": (SEPARATE_GELU,),
    **{f"target {name}": target.served_rewrites for name, target in TARGETS.items() if name in ("cpu", "portable")},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fp32", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="further bundles, as they are")
    parser.add_argument("--only", default="", help="a regular expression for the names of variants")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    sizes = [int(size) for size in args.batches.split(",")]
    base, dataset = open_bundle(args.fp32), open_calibration_set(args.calibration)
    config = load_recipe(None, [f"quantization.bits={args.bits}", "quantization.rounding=nearest"]).quantization
    plain = replace(TARGETS["cpu"], served_rewrites=())
    readers = {"image": D4CCalibrationDataReader(dataset, 8), "text": PromptCalibrationDataReader(dataset, 8)}
    with tempfile.TemporaryDirectory() as folder:
        quantized = {tower: Path(folder) / f"{tower}.onnx" for tower in base.encoders}
        for tower, path in base.encoders.items():
            quantize_encoder(path, quantized[tower], readers[tower], config, target=plain)
        contenders = [Contender("FP32", base.encoders)]
        for path in args.beside:
            made = open_bundle(path)
            contenders.append(Contender(str(path), made.encoders, made.session_entries))
        variants = {name: rewrites for name, rewrites in VARIANTS.items() if re.search(args.only, name)}
        for number, (name, rewrites) in enumerate(variants.items()):
            files = {}
            for tower, path in quantized.items():
                model = load_model(path)
                apply_all(rewrites, model)
                files[tower] = Path(folder) / f"{number}-{tower}.onnx"
                save_model(model, files[tower])
            contenders.append(Contender(name, files))
        feeds = drawn_feeds(base, sizes, 16)
        towers = measure_latency(contenders, feeds, rounds=args.rounds, threads=args.threads)
    for tower, rows in towers.items():
        print(f"\n| {tower} encoder | {' | '.join(f'batch {size}, ms | faster than FP32' for size in sizes)} |")
        print(f"|---|{'---|---|' * len(sizes)}")
        for row in rows:
            cells = [f"{row.batches[size].median_ms:.1f} | {row.batches[size].speed_up:.2f}x" for size in sizes]
            print(f"| {row.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
