# SPDX-License-Identifier: Apache-2.0
"""The bytes of an arena: one anonymous mapping, and views of it."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import xxhash

from dynamo_epd.transfer.handle import ITEM_BYTES

Digest = xxhash.xxh3_128


def digest_of(buffer: Any) -> str:
    """XXH3-128 of a buffer, 32 hex characters.

    It guards against corruption and against slots that were reused. It does not guard against an adversary inside the
    cluster, who could write any arena anyhow; in exchange it runs at the speed of memory.
    """
    return xxhash.xxh3_128_hexdigest(buffer)


def loaded_torch() -> Any:
    """torch if this process has imported it, else None: who holds a tensor or a GPU has imported it already."""
    return sys.modules.get("torch")


def is_tensor(value: Any) -> bool:
    torch = loaded_torch()
    return torch is not None and isinstance(value, torch.Tensor)


class Memory:
    """``nbytes`` of host memory at a fixed ``address``; pinned if this process uses CUDA."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults on first use
        self._bytes = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        torch = loaded_torch()
        self._pinned = torch is not None and torch.cuda.is_available()
        if self._pinned:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(self.address, nbytes, 0)))

    def bytes_at(self, offset: int, nbytes: int) -> memoryview:
        """The bytes themselves, writable."""
        return self._bytes[offset : offset + nbytes]

    def view(self, offset: int, shape: tuple[int, ...], dtype: str) -> Any:
        """A torch tensor of ``shape`` and ``dtype`` over the bytes, or a memoryview for ``bytes``."""
        count = 1
        for size in shape:
            count *= size
        if dtype == "bytes":
            return self.bytes_at(offset, count)
        import torch

        if count == 0:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        return torch.frombuffer(self._map, dtype=getattr(torch, dtype), count=count, offset=offset).view(shape)

    def write(self, offset: int, value: Any) -> tuple[tuple[int, ...], str]:
        """Copy a tensor (any device) or a contiguous buffer in; returns shape and dtype. The caller keeps bounds."""
        if is_tensor(value):
            shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
            self.view(offset, shape, dtype).copy_(value)
            return shape, dtype
        source = memoryview(value).cast("B")
        self.bytes_at(offset, source.nbytes)[:] = source
        return (source.nbytes,), "bytes"

    @staticmethod
    def nbytes_of(value: Any) -> int:
        """Bytes that `write` would take. Raises TypeError for a tensor whose dtype does not travel."""
        if is_tensor(value):
            dtype = str(value.dtype).removeprefix("torch.")
            if dtype not in ITEM_BYTES:
                raise TypeError(f"{dtype} tensors do not travel")
            return int(value.nbytes)
        return memoryview(value).nbytes

    def close(self) -> None:
        """Unmap, once the last tensor that someone still holds is gone."""
        if self._pinned:
            loaded_torch().cuda.cudart().cudaHostUnregister(self.address)
            self._pinned = False
        # Not closed but let go: torch holds the mapping without locking it, and would read unmapped memory.
        del self._bytes, self._map
