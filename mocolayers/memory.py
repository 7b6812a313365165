"""Memory that the next step needs again is kept, instead of being handed to the system and asked for anew."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
LARGEST = 2**25  # bytes of a block that is kept; glibc goes no higher by itself either


def keep_freed_memory(most: int = 2**29) -> bool:
    """Let glibc keep up to `most` free bytes; True if it does, False where there is no glibc.

    On a processor tensors come from malloc, which hands the feature maps of a step or a batch to the system at its end;
    the system then clears each of their pages again for the next one.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(TRIM_THRESHOLD, most) and mallopt(MMAP_THRESHOLD, LARGEST))
