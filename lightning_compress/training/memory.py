"""The highest memory use of this process."""

import sys

__all__ = ["peak_memory_bytes"]


def peak_memory_bytes() -> int | None:
    """Peak resident memory of the process in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
