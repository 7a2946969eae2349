"""What is waited for is said, and only where there is a wait."""

import io
import sys
import threading

import pytest
from rich.console import Console

from moesaic.progress import MOST_SAMPLES, Meter, notice, progress, remaining, speed


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


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.01, "100 layers/s"), (4, "15 layers/min"), (240, "15 layers/h"), (9000, "0.4 layers/h")]
)
def test_a_rate_is_shown_whatever_the_length_of_a_step(clock, seconds, said):
    meter = Meter("calibrate", 60, "layers", clock=clock)
    assert speed(meter) == "– layers/s" and remaining(meter) == "? left"
    for _ in range(20):
        clock.now += seconds
        meter.advance(1)
    assert speed(meter) == said and meter.left() == pytest.approx(40 * seconds)
    clock.now += seconds / 2  # in the middle of a step
    assert speed(meter) == said and meter.left() == pytest.approx(39.5 * seconds)
    clock.now += 1000 * seconds
    assert meter.left() == 0


def test_what_was_done_before_an_interruption_is_no_part_of_the_rate(clock):
    meter = Meter("calibrate", 60, "layers", clock=clock)
    clock.now += 0.01
    meter.advance(50)
    clock.now += 100
    meter.advance(1)
    assert meter.rate() == pytest.approx(1 / 100) and remaining(meter) == "15:00 min left"


def test_the_latest_counts_more(clock):
    meter = Meter("evaluate", 1000, "rows", clock=clock)
    for seconds in (1.0,) * 50 + (10.0,) * 50:
        clock.now += seconds
        meter.advance(1)
    assert meter.rate() == pytest.approx(0.1) and len(meter.samples) < MOST_SAMPLES


def test_few_samples_are_kept_of_many_steps(clock):
    meter = Meter("export", 10**6, "B", clock=clock)
    for _ in range(10**5):
        clock.now += 0.001
        meter.advance(10)
    assert len(meter.samples) <= MOST_SAMPLES + 1 and meter.rate() == pytest.approx(10_000, rel=0.02)


def test_a_bar_may_be_drawn_while_others_count():
    """Without the copy each of these readers fails: samples are thinned under its hands."""
    meter, wrong, over = Meter("export", 10**6, "B"), list[BaseException](), threading.Event()

    def look() -> None:
        while not over.is_set():
            try:
                meter.rate()
            except BaseException as error:
                wrong.append(error)
                return

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        readers = [threading.Thread(target=look) for _ in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(50_000):
            meter.advance(1)
    finally:
        over.set()
        sys.setswitchinterval(before)
    for reader in readers:
        reader.join()
    assert not wrong and meter.done == 50_000


def test_lines_where_there_is_no_terminal(clock, capsys):
    meter = Meter("calibrate", 10, "layers", plain=True, clock=clock)
    for _ in range(3):
        clock.now += 60
        meter.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "calibrate:  30%  1 layers/min  7:00 min left" and len(lines) == 3
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_on_a_terminal(width, monkeypatch, capsys):
    """What stands there while it runs, drawn into a file that says it is a terminal."""
    screen = io.StringIO()
    monkeypatch.setattr(
        "moesaic.progress.Console",
        lambda **_: Console(file=screen, force_terminal=True, width=width, color_system=None),
    )
    with progress("calibrate", 4, "layers") as meter:
        meter.samples[0] = (meter.clock() - 120.0, 0)
        meter.advance(1)
        threading.Event().wait(0.3)
    assert "25%" in screen.getvalue() and "30 layers/h" in screen.getvalue() and "6:00 min left" in screen.getvalue()
    assert capsys.readouterr().err.startswith("calibrate: 1 layers in 2:00 min")
