"""Asks a real Triton server about a package on disk, unmodified; prints JSON. Runs in an environment of its own.

NVIDIA's server comes with nvidia-pytriton: its core, its scheduler of ensembles and its Python backend, without the
backend that runs ONNX files. One of that name stands in for it, which hands tensors to onnxruntime and does no more.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import tritonclient.http as triton

STAND_IN = """
import json
from pathlib import Path
import onnxruntime as ort
import triton_python_backend_utils as pb
class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        self.session = ort.InferenceSession(folder / config["default_model_filename"])
        self.names = [[entry["name"] for entry in config[side]] for side in ("input", "output")]
    def execute(self, requests):
        return [self.answer(request) for request in requests]
    def answer(self, request):
        given, wanted = self.names
        feeds = {name: pb.get_input_tensor_by_name(request, name).as_numpy() for name in given}
        found = self.session.run(wanted, feeds)
        return pb.InferenceResponse([pb.Tensor(*pair) for pair in zip(wanted, found)])
"""
STARTING = 200  # seconds


def main() -> None:
    folder, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
    site = Path(sysconfig.get_path("purelib"))
    with tempfile.TemporaryDirectory() as place, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        home = Path(place) / "tritonserver"
        shutil.copytree(site / "pytriton" / "tritonserver", home)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = home / "backends" / "python" / "triton_python_backend_stub"
        shutil.copy(home / "python_backend_stubs" / version / stub.name, stub)
        (home / "backends" / "onnxruntime").mkdir()
        (home / "backends" / "onnxruntime" / "model.py").write_text(STAND_IN)
        command = [home / "bin" / "tritonserver", "--model-repository", folder / "model_repository"]
        command += ["--backend-directory", home / "backends", "--http-address", "127.0.0.1", "--http-port", str(port)]
        command += ["--allow-grpc", "false", "--allow-metrics", "false"]
        libraries = f"{site / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # its Python models run in this environment
        place_of = os.environ | {"LD_LIBRARY_PATH": libraries, "PATH": path}
        with subprocess.Popen(command, env=place_of, stdout=sys.stderr) as server:
            try:
                print(json.dumps(answers(port, server, request)))
            finally:
                server.terminate()


def answers(port: int, server: subprocess.Popen, request: dict) -> dict:
    """Embeddings of all files in one request and of each text in one of its own, and what comes of what is neither."""
    client = triton.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=120)
    end = time.monotonic() + STARTING
    while not ready(client):
        if server.poll() is not None or time.monotonic() > end:
            raise SystemExit("the server does not start")
        time.sleep(0.5)

    def ask(kind: str, rows: list[bytes]) -> list[list[float]]:
        tensor = triton.InferInput(kind, [len(rows), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(rows, object)[:, None])
        return client.infer(f"embed_{kind}", [tensor]).as_numpy(f"{kind}_embeds").tolist()

    def refused(kind: str, row: bytes) -> str:
        try:
            return f"answered {ask(kind, [row])}"
        except triton.InferenceServerException as error:
            return f"{error.status()} {error.message()}"

    return {
        "own_resize": ask("image", [Path(image).read_bytes() for image in request["images"]]),
        "text_embeds": [ask("text", [text.encode()])[0] for text in request["texts"]],
        "refused": [refused("image", b"no image"), refused("text", b"\xff\xfe")],
    }


def ready(client: triton.InferenceServerClient) -> bool:
    """Whether every model of the repository is loaded."""
    try:
        return bool(client.is_server_ready())
    except OSError:
        return False


main()
