"""CancelToken: the loop interrupts the executor thread's wait."""

from __future__ import annotations

import socket


class CancelToken:
    """A flag that the loop sets once, and that the executor thread can wait for together with pipes."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self.is_set = False

    def set(self) -> None:
        """Set the flag and wake the executor thread."""
        if not self.is_set:
            self.is_set = True
            self._writer.send(b"\0")

    def fileno(self) -> int:
        return self._reader.fileno()

    def close(self) -> None:
        """Free the sockets. A later `set` does nothing."""
        self.is_set = True
        self._reader.close()
        self._writer.close()
