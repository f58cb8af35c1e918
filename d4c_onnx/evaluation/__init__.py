"""Data sets, zero-shot, label-free fidelity, intervals. onnxruntime executes the written files; never torch."""
