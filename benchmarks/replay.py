"""Does a change of the code change the files? Record what the code makes, change it, record again, compare.

    python benchmarks/replay.py record before -o before.json      # files are kept in before/, numbers in before.json
    python benchmarks/replay.py record after -o after.json        # of the changed code
    python benchmarks/replay.py compare before.json after.json

Each case quantises one model at one width for one target, with a small noise calibration, in a process of its own.
Recorded are, of each encoder's file: every 4- and 8-bit initialiser, every float one, what onnxruntime answers to noise
and to the golden text, the bytes, and how many nodes of each operator there are; of the run its seconds and memory.
`compare` prints one line a case: `same` where all of that (but time and memory) is equal to the bit, or what is not.
Both sides want the same OMP_NUM_THREADS: sums of moments in another order round some 4-bit weights the other way.
Models are the embedded minis, families in miniature (the one with Hugging Face's text tower needs transformers) and two
full-size architectures with random weights; a local open_clip config with its checkpoint beside it joins by
`--checkpoint my-arch.json`. Speed is raced by `d4c-onnx benchmark before/MODEL before/MODEL/w4a8 after/MODEL/w4a8`.
"""

import argparse
import hashlib
import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

CALIBRATION = (
    "synthesis.method=noise",
    "synthesis.images=16",
    "synthesis.held_out=4",
    "text.prompts=48",
    "text.held_out=8",
    "evaluation.dataset=fidelity",
)
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
POOLER = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
HUGGING_FACE = "HUGGING_FACE"  # stands for a folder with a model's configuration and its tokenizer
XLM_ROBERTA = {
    "model_type": "xlm-roberta",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 34,
    "pad_token_id": 1,
}
TINY: dict[str, dict[str, Any]] = {
    "tiny-coca": {
        "embed_dim": 64,
        "vision_cfg": {**VIT, **POOLER, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    "tiny-bidirectional": {
        "embed_dim": 96,
        "vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        "custom_text": True,
    },
    "tiny-convnext": {
        "embed_dim": 64,
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        "text_cfg": TEXT,
    },
    "tiny-hugging-face": {
        "embed_dim": 64,
        "vision_cfg": VIT,
        "text_cfg": {
            "hf_model_name": HUGGING_FACE,
            "hf_tokenizer_name": HUGGING_FACE,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "mean_pooler",
            "context_length": 32,
        },
    },
}
ALL = (
    *((bits, target) for target in ("cpu", "portable", "tensorrt", "openvino", "cuda") for bits in ("w8a8", "w4a8")),
    ("w6a6", "cpu"),
    ("w4a16", "cuda"),
    ("w8a16", "cuda"),
)
FEW = (("w8a8", "cpu"), ("w4a8", "cpu"), ("w4a8", "tensorrt"), ("w4a16", "cuda"))
PORTABLE = (("w8a8", "portable"), ("w4a8", "portable"))
CASES: dict[str, tuple[tuple[str, str], ...]] = {
    "mini-vit": ALL,
    "mini-rn": ALL,
    **dict.fromkeys(TINY, (*FEW, *PORTABLE)),
    "ViT-B-32": FEW,
    "RN50": FEW,
}


def record(args: argparse.Namespace) -> None:
    """Every case that matches, each in a process of its own; what is recorded already is not made again."""
    cases = {**CASES, **({args.checkpoint.stem: FEW} if args.checkpoint else {})}
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for model, widths in cases.items():
        for bits, target in widths:
            name = f"{model} {bits} {target}"
            if not re.search(args.only, name) or name in results:
                continue
            command = [sys.executable, "-P", __file__, "one", str(args.folder), model, bits, target]
            done = subprocess.run(
                [*command, *(["--checkpoint", str(args.checkpoint)] if args.checkpoint else [])],
                capture_output=True,
                text=True,
                check=False,
            )
            failed = {"failed": f"{done.stderr.strip()[-500:]} (exit code {done.returncode})"}
            results[name] = failed if done.returncode else json.loads(done.stdout.splitlines()[-1])
            args.output.write_text(json.dumps(results, indent=1))
            print(name, results[name].get("seconds", "failed"), flush=True)


def one(args: argparse.Namespace) -> None:
    """One case; prints what is recorded of it."""
    import open_clip

    from d4c_onnx import pipeline
    from d4c_onnx.recipe_file import load_recipe

    _add_tiny(args.folder / "configs")
    pretrained: str | None = "random"
    if args.checkpoint:
        open_clip.add_model_config(args.checkpoint)
    if args.checkpoint and args.model == args.checkpoint.stem:
        pretrained = str(args.checkpoint.with_suffix(".safetensors"))
    elif args.model.startswith("mini-"):
        pretrained = None
    keys = (*CALIBRATION, f"quantization.bits={args.bits}", f"quantization.target={args.target}")
    output = args.folder / args.target
    made: Any = pipeline.quantize_bundle(args.model, load_recipe(None, keys), output=output, pretrained=pretrained)
    report = made if isinstance(made, dict) else made.as_dict()  # a dict before commits of November 2026
    found = {
        "seconds": report["seconds"]["quantize"],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "files": {path.name: _contents(path) for path in sorted(Path(report["bundle"]).glob("*.onnx"))},
    }
    print(json.dumps(found))


def _add_tiny(folder: Path) -> None:
    """Tell open_clip the models in miniature, with what Hugging Face's text tower reads beside its configuration."""
    import open_clip
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    inner = folder / HUGGING_FACE
    inner.mkdir(parents=True, exist_ok=True)
    (inner / "config.json").write_text(json.dumps(XLM_ROBERTA))
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.save(str(inner / "tokenizer.json"))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (inner / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32, **names})
    )
    for name, config in TINY.items():
        text = {key: str(inner) if value == HUGGING_FACE else value for key, value in config["text_cfg"].items()}
        (folder / f"{name}.json").write_text(json.dumps({**config, "text_cfg": text}))
    open_clip.add_model_config(folder)


def _contents(path: Path) -> dict[str, Any]:
    import onnx
    import onnxruntime as ort

    model = onnx.load(path)
    narrow = {onnx.TensorProto.DataType.Value(name) for name in ("INT4", "UINT4", "INT8", "UINT8")}
    kinds: dict[str, list[str]] = {"integers": [], "floats": []}
    for tensor in model.graph.initializer:
        raw = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        digest = hashlib.sha256(f"{tensor.data_type} {list(tensor.dims)}".encode() + raw).hexdigest()[:16]
        if tensor.data_type in narrow:
            kinds["integers"].append(digest)
        elif tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            kinds["floats"].append(digest)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    if given.name == "pixel_values":
        feed = np.random.default_rng(0).standard_normal((2, 3, *given.shape[2:]), dtype=np.float32)
    else:
        golden = json.loads((path.parent / "golden" / "golden.json").read_text())
        feed = np.array([golden["texts"][0]["input_ids"]], np.int64)
    [answer] = session.run(None, {given.name: feed})
    return {
        **{kind: sorted(found) for kind, found in kinds.items()},
        "answer": answer.astype(np.float64).round(9).tolist(),
        "bytes": sum(file.stat().st_size for file in (path, path.with_name(path.name + ".data")) if file.exists()),
        "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
    }


def compare(args: argparse.Namespace) -> None:
    """One line a case, and an exit code of 1 where a file differs."""
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    differs = False
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        if "failed" in old or "failed" in new:
            print(f"{name}: failed before: {'failed' in old}, after: {'failed' in new} {new.get('failed', '')[-200:]}")
            differs |= ("failed" in new) and ("failed" not in old)
            continue
        found = [part for file in old["files"] for part in _differences(file, old["files"][file], new["files"][file])]
        differs |= bool(found)
        cost = f"{new['seconds'] / old['seconds']:.2f} x the time, {new['peak_mib'] / old['peak_mib']:.2f} x the memory"
        print(f"{name}: {'; '.join(found) or 'same'} ({cost})")
    for name in sorted(before.keys() ^ after.keys()):
        print(f"{name}: only {'before' if name in before else 'after'}")
    sys.exit(differs)


def _differences(file: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = []
    for kind in ("integers", "floats"):
        gone, fresh = Counter(old[kind]) - Counter(new[kind]), Counter(new[kind]) - Counter(old[kind])
        if gone or fresh:
            found.append(f"{kind} -{gone.total()} +{fresh.total()} of {len(old[kind])}")
    if old["answer"] != new["answer"]:
        found.append(f"answers by {np.abs(np.array(old['answer']) - np.array(new['answer'])).max():.1e}")
    if old["operators"] != new["operators"]:
        ops = old["operators"].keys() | new["operators"].keys()
        changed = {op: new["operators"].get(op, 0) - old["operators"].get(op, 0) for op in sorted(ops)}
        found.append("operators " + " ".join(f"{op} {count:+d}" for op, count in changed.items() if count))
    if abs(new["bytes"] / old["bytes"] - 1) > 0.001:
        found.append(f"{new['bytes'] / old['bytes']:.3f} x the bytes")
    return [f"{file.partition('_')[0]}: {part}" for part in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    made = commands.add_parser("record", help="quantise every case")
    made.add_argument("folder", type=Path, help="where the files go, and stay")
    made.add_argument("-o", "--output", type=Path, required=True, help="the JSON file of what they hold")
    made.add_argument("--only", default="", help="a regular expression over `MODEL BITS TARGET`")
    made.set_defaults(call=record)
    single = commands.add_parser("one", help="one case (what `record` starts)")
    single.add_argument("folder", type=Path)
    for name in ("model", "bits", "target"):
        single.add_argument(name)
    single.set_defaults(call=one)
    for entry in (made, single):
        entry.add_argument("--checkpoint", type=Path, help="an open_clip config, its .safetensors beside it")
    both = commands.add_parser("compare", help="two records")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    both.set_defaults(call=compare)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
