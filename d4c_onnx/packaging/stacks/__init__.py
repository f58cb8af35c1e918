"""The registry: one file per stack, one value in each."""

from d4c_onnx.packaging.stack import Stack
from d4c_onnx.packaging.stacks.fastembed import FASTEMBED
from d4c_onnx.packaging.stacks.frigate import FRIGATE
from d4c_onnx.packaging.stacks.immich import IMMICH
from d4c_onnx.packaging.stacks.librephotos import LIBREPHOTOS
from d4c_onnx.packaging.stacks.onnxruntime import ONNXRUNTIME
from d4c_onnx.packaging.stacks.openvino import OPENVINO
from d4c_onnx.packaging.stacks.optimum import OPTIMUM
from d4c_onnx.packaging.stacks.rclip import RCLIP
from d4c_onnx.packaging.stacks.transformersjs import TRANSFORMERSJS
from d4c_onnx.packaging.stacks.triton import TRITON
from d4c_onnx.packaging.stacks.vespa import VESPA
from d4c_onnx.packaging.stacks.web import WEB

_ALL = (
    TRANSFORMERSJS,
    IMMICH,
    FASTEMBED,
    TRITON,
    OPTIMUM,
    OPENVINO,
    LIBREPHOTOS,
    RCLIP,
    FRIGATE,
    VESPA,
    ONNXRUNTIME,
    WEB,
)
STACKS: dict[str, Stack] = {stack.name: stack for stack in _ALL}

__all__ = ["STACKS"]
