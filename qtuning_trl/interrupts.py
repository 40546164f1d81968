"""Ctrl-C and SIGTERM: one line instead of a traceback, and no process that is left behind."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALLED = 128  # what shells add to the number of the signal that ended a command
INTERRUPTED = SIGNALLED + signal.SIGINT


def end_in_one_line(*signums: signal.Signals) -> dict[signal.Signals, Any]:
    """
    From now on this process ends by these signals (Ctrl-C) with one line, and so do those that it forks, in silence.

    Returns:
        `dict`: The handlers before.
    """
    owner = os.getpid()

    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_IGN)  # a launcher may pass on what the terminal has sent already
        if os.getpid() == owner and os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
            what = "stopped by Ctrl-C" if signum == signal.SIGINT else f"ended by signal {signum}"
            os.write(2, f"\nqtuning: {what}.\n".encode())  # not by print, which this may have interrupted
        raise SystemExit(SIGNALLED + signum)

    return {signum: signal.signal(signum, end) for signum in signums or (signal.SIGINT,)}


@contextmanager
def ended_in_one_line() -> Iterator[None]:
    """While it is open, Ctrl-C and SIGTERM end this process with one line."""
    before = end_in_one_line(signal.SIGINT, signal.SIGTERM)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def signals_passed_on() -> Iterator[None]:
    """
    While it is open, Ctrl-C and SIGTERM go to the processes that this one has launched and waits for.

    They end by it, and so does the wait for them. What comes again is passed on as SIGTERM, lest one of them hangs.
    """
    import psutil

    passed: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        children = psutil.Process().children()
        if not children:
            raise SystemExit(SIGNALLED + signum)
        for child in children:
            child.send_signal(signal.SIGTERM if passed else signum)
        passed.append(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
