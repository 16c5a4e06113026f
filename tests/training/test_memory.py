"""What the heap keeps is given back."""

import sys
from pathlib import Path

import pytest

from training.memory import return_free_memory

PAGE = 4096


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_fragmented_heap_shrinks_when_its_free_pages_are_given_back() -> None:
    # Below the size from which glibc maps blocks of their own; each second one stays.
    blocks = [bytearray(100_000) for _ in range(3000)]
    kept, blocks = blocks[::2], []
    before = resident_mib()
    return_free_memory()
    assert resident_mib() < before - 100
    assert len(kept) == 1500
