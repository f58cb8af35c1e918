"""Memory that Python and onnxruntime have freed, but the C library keeps."""

import ctypes


def release_freed() -> bool:
    """Give freed memory back to the system; whether this C library can (glibc's `malloc_trim`).

    glibc keeps what lies below any block that is still in use: after a pass over a large encoder that is gigabytes, and
    what comes next asks for blocks of other sizes on top of them.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # no glibc; TypeError: Windows
        return False
    trim(ctypes.c_size_t(0))
    return True
