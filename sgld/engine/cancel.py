"""CancelToken: how the loop interrupts the executor thread's wait."""

from __future__ import annotations

import socket


class CancelToken:
    """Set once from the loop; the executor thread waits on it beside the workers' pipes."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self.is_set = False

    def set(self) -> None:
        """Wake the executor thread: one byte through a socket pair."""
        if not self.is_set:
            self.is_set = True
            self._writer.send(b"\0")

    def fileno(self) -> int:
        return self._reader.fileno()

    def close(self) -> None:
        """Free the sockets; a `set` that comes later does nothing."""
        self.is_set = True
        self._reader.close()
        self._writer.close()
