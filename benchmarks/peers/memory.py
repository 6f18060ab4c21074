"""Peak memory of this process, for the workers."""

import resource
import sys
from pathlib import Path


def peak_megabytes() -> float:
    """Peak resident memory; what was mapped and touched counts."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
