"""Ctrl-C: the first asks a run to save and leave, the second leaves at once."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Self

LEFT = 130  # the exit status of a command that Ctrl-C ended


class Interrupts:
    """Counts Ctrl-C while it is in force; call it to learn whether there was one. A context.

    Python runs a signal handler only between two of its own instructions, so that during a
    compilation of minutes two Ctrl-C would be one, and late. The bytes that the interpreter writes
    for each signal arrive at once, in a thread that waits for them. Outside the main thread, which
    alone may handle signals, nothing is counted.

    Args:
      first: called, in that thread, at the first Ctrl-C.
      second: called before the process ends at the second.
    """

    def __init__(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        self._calls = (first, second)
        self._count = 0

    def __call__(self) -> bool:
        return self._count > 0

    def __enter__(self) -> Self:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._handler = signal.signal(signal.SIGINT, lambda *_: None)
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno())
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGINT, self._handler)
            self._writer.close()  # ends the thread

    def _listen(self) -> None:
        with self._reader:
            while data := self._reader.recv(1):
                if data[0] == signal.SIGINT:
                    self._calls[min(self._count, 1)]()
                    self._count += 1
                if self._count > 1:
                    os._exit(LEFT)
