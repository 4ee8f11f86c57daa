"""A driver hears every Ctrl-C, wherever it comes."""

import signal

import pytest

from rlkl.sweep.driver import _ctrl_c_afterwards


class InterruptsAtItsEnd:
    """A Ctrl-C in a finaliser, out of which Python lets no exception."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_that_a_finaliser_would_swallow_is_raised_after_the_work():
    done = []

    def work() -> None:
        with _ctrl_c_afterwards():
            InterruptsAtItsEnd()
            done.append("the work")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_one_nothing_is_raised():
    with _ctrl_c_afterwards():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
