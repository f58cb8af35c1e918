"""What the CUDA driver says of the first GPU, asked through its own C library: no package is needed for it."""

import ctypes
from typing import Any


def gpu_name() -> str | None:
    """Of the first device; None without a driver or a device."""
    driver = _driver()
    text = ctypes.create_string_buffer(128)
    if driver is None or driver.cuDeviceGetName(text, len(text), ctypes.c_int(0)):
        return None
    return text.value.decode()


def gpu_used_bytes() -> int | None:
    """Memory of the first device that is taken, by whichever process; None without a driver or a device.

    What the driver takes for this process's own use of the device counts from the first call on.
    """
    driver = _driver()
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    if driver is None or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(0)):
        return None
    if driver.cuCtxSetCurrent(context) or driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)):
        return None
    return total.value - free.value


def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver
