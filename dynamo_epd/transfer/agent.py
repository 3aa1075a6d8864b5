# SPDX-License-Identifier: Apache-2.0
"""NIXL, as much of it as we use. The only file that imports it.

Written on NIXL's binding and not on its Python class, because that class fixes ``pthrDelay`` at 0: its progress thread
then spins on a whole core, for ever. With a delay of 2000 microseconds an idle agent takes half a percent, and a READ
0.1 ms longer than with 1000. One thread calls an agent: the event loop's.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dynamo_epd.errors import HandOffFailed

PROGRESS_DELAY_US = 2000


def _bindings() -> Any:
    """NIXL's binding. Package ``nixl`` chooses between the CUDA 12 and 13 wheels, and imports torch to ask which (two
    seconds, 200 MB) where torch is a CPU build; where only one wheel is installed there is nothing to choose."""
    wheels = [wheel for wheel in ("nixl_cu13", "nixl_cu12") if find_spec(wheel)]
    return import_module(f"{wheels[0] if len(wheels) == 1 else 'nixl'}._bindings")


class Agent:
    """One NIXL agent with the UCX backend and one registered range of host memory."""

    def __init__(self, name: str, address: int, nbytes: int):
        binding = _bindings()
        self._nixl = binding
        self._error = tuple(
            error for key, error in vars(binding).items() if key.startswith("nixl") and key.endswith("Error")
        )
        config = binding.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = PROGRESS_DELAY_US
        self.name = name
        self._agent = binding.nixlAgent(name, config)
        self._ucx = [self._agent.createBackend("UCX", {})]
        self._registered = binding.nixlRegDList(binding.DRAM_SEG, [(address, nbytes, 0, "")])
        self._agent.registerMem(self._registered, self._ucx)

    def metadata(self) -> bytes:
        """How to connect and what is registered, in NIXL's own coding."""
        return bytes(self._agent.getLocalMD())

    def add_peer(self, metadata: bytes) -> str:
        """Load a peer's metadata; returns its agent name. Raises `HandOffFailed` for garbage and for a dead peer."""
        try:
            name = self._agent.loadRemoteMD(metadata)
            return name.decode() if isinstance(name, bytes) else str(name)
        except (*self._error, UnicodeDecodeError) as error:
            raise HandOffFailed(f"the owner cannot be reached over NIXL: {type(error).__name__}") from error

    def connect(self, peer: str) -> None:
        """Begin the wire-up that the first READ would begin otherwise."""
        try:
            self._agent.makeConnection(peer, self._ucx)
        except self._error as error:
            raise HandOffFailed(f"the owner cannot be reached over NIXL: {type(error).__name__}") from error

    def remove_peer(self, peer: str) -> None:
        """Disconnect and forget. What is in flight with this peer ends with an error."""
        with suppress(*self._error):  # NIXL may have seen the peer die and forgotten it by itself
            self._agent.invalidateRemoteMD(peer)

    def read(self, peer: str, local: int, remote: int, nbytes: int, notice: bytes = b"") -> Read:
        """Start to READ ``nbytes`` at address ``remote`` of ``peer`` to address ``local``. Raises `HandOffFailed`.

        ``notice``, if not empty, reaches the peer after the last byte was taken, and the READ ends after that
        (`notices`).
        """
        nixl = self._nixl
        try:
            request = self._agent.createXferReq(
                nixl.NIXL_READ,
                nixl.nixlXferDList(nixl.DRAM_SEG, [(local, nbytes, 0)]),
                nixl.nixlXferDList(nixl.DRAM_SEG, [(remote, nbytes, 0)]),
                peer,
                notice,
                self._ucx,
            )
        except self._error as error:
            raise HandOffFailed(f"the owner is gone: {type(error).__name__}") from error
        return Read(self._nixl, self._error, self._agent, request)

    def notify(self, peer: str, notice: bytes) -> None:
        """Send a notice that belongs to no READ. Raises `HandOffFailed`."""
        try:
            self._agent.genNotif(peer, notice)
        except self._error as error:
            raise HandOffFailed(f"the owner is gone: {type(error).__name__}") from error

    def notices(self) -> list[bytes]:
        """What peers have sent since the last call."""
        return [notice for notices in self._agent.getNotifs({}, self._ucx).values() for notice in notices]

    def close(self) -> None:
        """Deregister the memory and end the progress thread. No read may be in flight."""
        self._agent.deregisterMem(self._registered, self._ucx)
        del self._agent


class Read:
    """One READ that NIXL knows of. Until `settle` has said True, NIXL may write to the local side."""

    def __init__(self, nixl: Any, error: tuple[type[BaseException], ...], agent: Any, request: int):
        self._nixl = nixl
        self._error = error
        self._agent = agent
        self._request: int | None = request
        self._posted = False

    def poll(self) -> bool:
        """Post it the first time; make progress; True once the bytes have arrived. Raises `HandOffFailed`."""
        if self._request is None:
            return True
        try:
            if self._posted:
                status = self._agent.getXferStatus(self._request)
            else:
                self._posted = True
                status = self._agent.postXferReq(self._request, b"")
        except self._error as error:
            raise HandOffFailed(f"the READ failed: {type(error).__name__}") from error
        if status == self._nixl.NIXL_SUCCESS:
            self.settle()
            return True
        if status != self._nixl.NIXL_IN_PROG:
            raise HandOffFailed(f"the READ failed: {status}")
        return False

    def settle(self) -> bool:
        """Give the request back if NIXL has done with it; False while it may still write."""
        if self._request is None:
            return True
        try:
            if self._posted and self._agent.getXferStatus(self._request) == self._nixl.NIXL_IN_PROG:
                return False
        except self._error:
            pass  # it has ended, badly
        try:
            self._agent.releaseXferReq(self._request)
        except self._error:
            return False
        self._request = None
        return True
