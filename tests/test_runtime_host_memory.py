"""Freed memory stays in a process that asked for it, and goes back to the system in one that did not."""

import subprocess
import sys

import pytest

CODE = """
import sys
import numpy as np
from sdjax.runtime import host_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "kept":
    host_memory.keep()
before = resident()
block = np.ones(2**28, np.uint8)
del block
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is on Linux")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory(kept):
    command = [sys.executable, "-c", CODE, "kept" if kept else "returned"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={"JAX_PLATFORMS": "cpu"})
    assert (int(result.stdout) > 2**27) == kept
