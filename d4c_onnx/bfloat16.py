"""Whether this CPU multiplies bfloat16: where it does, torch's products take a half to a third of float32's time."""


def multiplies_bfloat16() -> bool:
    """CPUs without AVX512-BF16 or AMX emulate it, which is slower than float32. Imports torch."""
    import torch

    # torch has no public question for this; a release without these names answers no
    asks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in asks)
