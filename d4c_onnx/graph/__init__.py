"""ONNX helpers that several rooms need: indexing, reading and writing, weighted layers, bit counting. Never torch."""
