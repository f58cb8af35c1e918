"""Memory that nobody needs any more, but Python or the C library keeps."""

import ctypes
import gc


def release_freed() -> bool:
    """Give freed memory back to the system; whether this C library can (glibc's `malloc_trim`).

    A torch model is full of references in circles and outlives its last name until Python looks for those. glibc keeps
    what lies below any block that is still in use: after a pass over a large encoder that is gigabytes, and what comes
    next asks for blocks of other sizes on top of them.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # no glibc; TypeError: Windows
        return False
    trim(ctypes.c_size_t(0))
    return True
