"""Folders, tars and lists of texts become files of vectors, one by one: memory is the same however many."""

from d4c_onnx.embedding.vectors import EmbedReport, embed_source

__all__ = ["EmbedReport", "embed_source"]
