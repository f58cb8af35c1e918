"""A bundle over HTTP: embeddings, zero-shot scores and a page, with batches made of what arrives together. No torch.

Needs the extra `serve`. One idea a file: `limits`; `bodies`, how much of a request is read, and how long; `reading`,
what a body says; `refused`; `batcher`; `served`, bundles behind batchers; `meters` and `metered`; `app`, the paths;
`listening`, the socket.
"""
