"""Searches images with rclip, whose data folder the package is; prints JSON. Runs in rclip's own environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image
from rclip.model import Model

folder, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
os.environ["RCLIP_DATADIR"] = str(folder.resolve())  # read when a model is loaded

model = Model()
program, images = Path(sys.executable).with_name("rclip"), Path(request["images"][0]).parent
found = {
    "own_resize": model.compute_image_features([Image.open(image) for image in request["images"]]).tolist(),
    "text_embeds": model.compute_text_features(request["texts"]).tolist(),
}
ranked = []
for text in request["texts"]:
    command = [program, "--filepath-only", text]
    done = subprocess.run(command, cwd=images, capture_output=True, text=True, check=True)
    ranked.append([Path(line).name for line in done.stdout.splitlines()])
print(json.dumps(found | {"ranked": ranked}))
