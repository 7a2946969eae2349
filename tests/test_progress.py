"""What is waited for is said, and only where there is a wait."""

import threading

import pytest

from moesaic.progress import notice


@pytest.mark.parametrize("quiet", [False, True])
def test_a_notice_comes_while_one_waits(quiet, capfd):
    with notice("compiling", quiet, after_seconds=0.01):
        threading.Event().wait(0.2)
        assert capfd.readouterr().err == ("" if quiet else "compiling\n")


def test_no_notice_of_what_is_over_at_once(capfd):
    with notice("compiling", after_seconds=0.1):
        pass
    with pytest.raises(ValueError, match="wrong"), notice("compiling", after_seconds=0.1):
        raise ValueError("wrong")
    threading.Event().wait(0.3)
    assert capfd.readouterr().err == ""
