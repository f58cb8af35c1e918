"""Vespa's embedder, for texts: ids and a mask in, a sequence out, of which the first token is taken.

The mask is declared and not read: towers that need none hide their padding themselves, and a batch is one text.
"""

from __future__ import annotations

from d4c_onnx.packaging import configs, needs
from d4c_onnx.packaging.edits import AsSequence, RenameOutput, UnusedMask
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack

_SERVICES = """<!-- inside <container> of services.xml -->
<component id="clip" type="hugging-face-embedder">
  <transformer-model path="models/text_encoder.onnx"/>
  <tokenizer-model path="models/tokenizer.json"/>
  <max-tokens>{context}</max-tokens>
  <transformer-token-type-ids/>
  <transformer-output>last_hidden_state</transformer-output>
  <pooling-strategy>cls</pooling-strategy>
  <normalize>true</normalize>
</component>
"""


def _write(job: Job) -> None:
    needs.tokenizer_file(job)
    edits = (*job.fill(), UnusedMask(), AsSequence(), RenameOutput("last_hidden_state"))
    job.encoder("text", "models/text_encoder.onnx", *edits)
    job.copy(job.bundle.tokenizer, "models/tokenizer.json")
    job.text("services.xml", _SERVICES.format(context=job.tokenizer.context_length))
    job.remarks.append("it embeds texts only: feed embeddings of images from elsewhere (another target).")
    job.remarks.append("read from its documentation, not run: no Vespa was at hand.")
    configs.remark_on_cleaning(job, "Vespa")


VESPA = Stack("vespa", _write, "copy models/ and the component into the application")
