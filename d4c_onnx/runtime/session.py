"""onnxruntime sessions: provider choice, threads, one call per tower."""

import contextlib
import functools
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from d4c_onnx.bundle import file_size_bytes
from d4c_onnx.errors import BundleError, ModelError
from d4c_onnx.files import temporary_folder
from d4c_onnx.manifest import Signature, TensorInfo
from d4c_onnx.untrusted_json import short

if TYPE_CHECKING:
    import onnx_ir as ir

_IN_MEMORY_BYTES = 2**26  # weights of a graph that may be copied a few times
_NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(float16)": "float16", "tensor(int32)": "int32"}
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


def resolve_provider(provider: str) -> str:
    """`cpu`, `cuda` or `auto` to what this onnxruntime can run.

    Raises:
        ModelError: cuda was asked for and no session starts on it.
    """
    if provider == "cpu":
        return provider
    fault = cuda_fault()
    if provider == "cuda" and fault:
        raise ModelError(f"--provider cuda: {fault}, or use cpu.")
    return "cpu" if fault else "cuda"


@functools.cache
def cuda_fault() -> str:
    """Why no session starts on CUDA, and what to do; empty where one does.

    onnxruntime lists the provider wherever it was built with it, and where the driver or a library is missing it
    silently runs on the CPU: so a session is tried.
    """
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime has no CUDA provider. Install onnxruntime-gpu in its place"
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    said = io.StringIO()
    ort.set_default_logger_severity(4)  # what is missing would be told on stderr
    try:
        with contextlib.redirect_stdout(said):
            preload = getattr(ort, "preload_dlls", None)
            if preload is not None:  # CUDA and cuDNN from their Python packages
                preload()
            found = ort.InferenceSession(model.SerializeToString(), providers=_PROVIDERS["cuda"])
    except Exception as error:  # onnxruntime raises its own C++ exception types
        return f"onnxruntime cannot start CUDA ({str(error)[:200]}). Mend the driver"
    finally:
        ort.set_default_logger_severity(2)
    if "CUDAExecutionProvider" in found.get_providers():
        return ""
    missing = next((line for line in said.getvalue().splitlines() if line.startswith("Failed to load")), "")
    return (
        f"onnxruntime {ort.__version__} cannot load its CUDA provider"
        f"{f' ({missing[:150]})' if missing else ''}. Install the CUDA {getattr(ort, 'cuda_version', '')} and cuDNN 9 "
        "libraries (pip install onnxruntime-gpu[cuda,cudnn])"
    )


class EncoderSession:
    """One encoder file, loaded."""

    def __init__(
        self,
        path: Path | bytes,
        provider: str = "cpu",
        threads: int = 0,
        optimized_path: Path | None = None,
        optimize: bool = True,
        literal: bool = False,
        shared: bool = False,
        entries: Mapping[str, str] | None = None,
    ) -> None:
        """Load an encoder.

        Args:
            path: the .onnx file, or a serialised model.
            provider: cpu, cuda or auto.
            threads: intra-op threads; 0 lets onnxruntime choose.
            optimized_path: where onnxruntime writes the graph that it really runs.
            optimize: False turns every graph optimisation off.
            literal: leave QuantizeLinear and DequantizeLinear where they stand. By default onnxruntime rounds float
                weights to int8 by itself when they stand between such nodes.
            shared: stop the threads' busy waiting when a run ends. They would slow down whatever else runs next in this
                process: with ten sessions taking turns, a run of 18 ms was measured as 40.
            entries: further session config entries, such as a bundle's own (`Bundle.session_entries`).

        Raises:
            BundleError: onnxruntime cannot load the file.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if literal:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if shared:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in (entries or {}).items():
            options.add_session_config_entry(key, value)
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
        self._shown = "model" if isinstance(path, bytes) else str(path)
        source: Any = path if isinstance(path, bytes) else str(path)
        name = resolve_provider(provider)
        try:
            self._session = ort.InferenceSession(source, options, providers=_PROVIDERS[name])
        except Exception as error:  # onnxruntime raises its own C++ exception types
            raise self._refused("load", error) from error
        self._session.disable_fallback()  # a run that fails on CUDA would go on on the CPU
        self.input_name = next((value.name for value in self._session.get_inputs()), "")
        self.input_names = [value.name for value in self._session.get_inputs()]
        self.output_names = [output.name for output in self._session.get_outputs()]

    @classmethod
    def of_model(
        cls,
        model: "ir.Model",
        provider: str = "cpu",
        threads: int = 0,
        literal: bool = False,
        outputs: Sequence[str] | None = None,
    ) -> "EncoderSession":
        """A session of a graph in memory, of any size: the weights of a large one are read from a file, not copied.

        Args:
            outputs: names of values to give out instead of the graph's own outputs.

        Raises:
            BundleError: onnxruntime cannot load it.
        """
        from d4c_onnx.graph.model import save_model, to_proto, weight_bytes, with_outputs

        with with_outputs(model, outputs):
            if weight_bytes(model) <= _IN_MEMORY_BYTES:
                return cls(to_proto(model).SerializeToString(), provider, threads, literal=literal)
            # what onnxruntime has mapped stays readable after the file is gone
            with temporary_folder(weight_bytes(model)) as folder:
                path = folder / "model.onnx"
                save_model(model, path, limit_bytes=0)
                return cls(path, provider, threads, literal=literal)

    def check(self, told: Signature) -> None:
        """See that the file is what a manifest says of it.

        Raises:
            BundleError: it takes or gives something else: another tower's, or of a fixed batch, say.
        """
        if difference := told.difference(*self.takes_and_gives()):
            raise BundleError(f"{self._shown}: {difference}. Export or quantise the bundle again.")

    def takes_and_gives(self) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        """Inputs and outputs as onnxruntime sees them; an axis of any length is a text."""

        def described(value: Any) -> TensorInfo:
            axes = tuple(size if size else "?" for size in value.shape)
            return TensorInfo(value.name, _NUMPY.get(value.type, value.type), axes)

        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        return tuple(map(described, inputs)), tuple(map(described, outputs))

    @property
    def width(self) -> int:
        """Numbers of an embedding; 0 where the graph does not say."""
        size = self._session.get_outputs()[0].shape[-1]
        return size if isinstance(size, int) else 0

    @property
    def fixed_length(self) -> int | None:
        """The second axis of the input where the graph fixes it (a text tower without a dynamic sequence)."""
        shape = self._session.get_inputs()[0].shape
        return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None

    def run(self, batch: np.ndarray) -> np.ndarray:
        """The first output for one batch.

        Raises:
            BundleError: onnxruntime refuses the batch: the file takes another size or type, or ids that are fewer.
        """
        return self._run(self.output_names[:1], {self.input_name: batch})[0]

    def run_all(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Every output by name."""
        return self.run_named({self.input_name: batch})

    def run_named(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, for a graph of several inputs.

        Raises:
            BundleError: onnxruntime refuses the batch.
        """
        return dict(zip(self.output_names, self._run(self.output_names, feed), strict=True))

    def _run(self, outputs: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return self._session.run(list(outputs), dict(feed))
        except Exception as error:  # onnxruntime raises its own C++ exception types, and ValueError for other inputs
            raise self._refused("run", error) from error

    def _refused(self, what: str, error: Exception) -> BundleError:
        return BundleError(f"{self._shown}: onnxruntime {ort.__version__} cannot {what} it ({short(error)}).")


def optimized_graph(path: Path | bytes, entries: Mapping[str, str] | None = None) -> "ir.Model":
    """The graph that onnxruntime's CPU provider really runs for a file or a serialised model.

    Args:
        entries: session config entries that the file is served with.
    """
    import onnx_ir as ir

    needed = len(path) if isinstance(path, bytes) else file_size_bytes(path)
    with temporary_folder(needed) as folder:
        target = folder / "optimized.onnx"
        EncoderSession(path, "cpu", os.cpu_count() or 1, optimized_path=target, entries=entries)
        return ir.load(target)
