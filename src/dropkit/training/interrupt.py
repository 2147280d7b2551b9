"""Ctrl-C at a moment of our choosing: between two steps, where the state is whole and can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """While this is entered Ctrl-C waits for `answer`; a second one is obeyed at once, as ever.

    Elsewhere than in the main thread, or where somebody else decides what Ctrl-C means, nothing is changed.
    """

    def __init__(self) -> None:
        self._pressed = self._ours = False

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._press)
            self._ours = True
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def answer(self) -> None:
        """Raise what was held back.

        Raises:
            KeyboardInterrupt: Ctrl-C has been pressed since this was entered.
        """
        if self._pressed:
            self._pressed = False
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:
            self.answer()
