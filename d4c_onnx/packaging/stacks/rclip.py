"""rclip: two files and a vocabulary in the folder of the one CLIP that it runs, ViT-B/32 at 256 pixels.

It tokenises with open_clip's own code, from the list of merges that the byte pairs in tokenizer.json came from.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from d4c_onnx.packaging import needs
from d4c_onnx.packaging.edits import RenameInput, RenameOutput
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack
from d4c_onnx.untrusted_json import Node, read_json, sequence, text

_FOLDER, _SIDE, _DIMENSIONS, _CONTEXT = "ViT-B-32-256-datacomp_s34b_b86k", 256, 512, 77
_FIRST_LINE = '"bpe_simple_vocab_16e6.txt#version: 0.2'  # readers skip it


def _write(job: Job) -> None:
    needs.size(job, _SIDE)
    needs.dimensions(job, _DIMENSIONS)
    needs.pixels_of_clip(job)
    needs.byte_pairs(job)
    needs.context(job, _CONTEXT)
    for tower, file in (("image", "visual"), ("text", "textual")):
        job.encoder(tower, f"{_FOLDER}/{file}.onnx", RenameInput("input"), RenameOutput("output"))
    job.write("tokenizer/bpe_simple_vocab_16e6.txt.gz", lambda path: _write_merges(job.bundle.tokenizer, path))
    job.remarks.append("keep the four files about licences that rclip put there; they belong to its own weights.")
    job.remarks.append("embeddings of two models do not compare: let it index again.")


def _write_merges(tokenizer: Path, path: Path) -> None:
    """The merges of a tokenizer.json, one a line, compressed without a time: equal merges give equal bytes."""
    lines = read_json(tokenizer).take("model", lambda model: model.take("merges", sequence(_merge)))
    path.write_bytes(gzip.compress("\n".join([_FIRST_LINE, *lines, ""]).encode("utf-8"), mtime=0))


def _merge(node: Node) -> str:
    """Two parts, as older files of the library have them or as newer ones."""
    return text(node) if isinstance(node.value, str) else " ".join(sequence(text, 2)(node))


RCLIP = Stack(
    "rclip",
    _write,
    "copy both folders into rclip's data folder (XDG_DATA_HOME/rclip, or ~/.local/share/rclip)",
)
