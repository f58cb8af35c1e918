"""What a server needs to use a bundle: session, preprocess, tokenizer. onnxruntime, numpy, pillow; never torch."""
