"""Shipped weights without their empty rows: a mini's captions use a few dozen of the 49,408 rows of its token table."""

import torch

TABLE, ROWS, IDS = "token_embedding.weight", "token_embedding.rows", "token_embedding.ids"


def pack_token_table(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the token table [vocabulary, width] by its rows that are not zero, their ids, and its size."""
    packed = dict(state)
    table = packed.pop(TABLE)
    ids = torch.nonzero(table.abs().sum(1)).flatten()
    # the last id is the table's size: one more entry than there are rows
    packed[ROWS], packed[IDS] = table[ids].contiguous(), torch.cat([ids, torch.tensor([len(table)])])
    return packed


def unpack_token_table(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `pack_token_table`; a state dict with its whole table comes back as it is."""
    if TABLE in state:
        return state
    full = dict(state)
    rows, ids = full.pop(ROWS), full.pop(IDS)
    table = torch.zeros(int(ids[-1]), rows.shape[1], dtype=rows.dtype)
    table[ids[:-1]] = rows
    full[TABLE] = table
    return full
