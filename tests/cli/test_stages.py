"""Stages in a log: a line each, and signs of life in long ones."""

from __future__ import annotations

import io
import threading
import time

import pytest

from llm_coreml.cli.stages import Stages


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


def test_short_stages_have_a_line_each(clock: Clock, log: io.StringIO) -> None:
    stages = Stages(log, clock)
    stages.stage("open")
    clock.now += 2.04
    stages.stage("lower")
    for share in range(100):
        clock.now += 0.29
        stages.advance(share / 100)
    stages.close()
    lines = ["opening the checkpoint ... 2.0 s", "lowering to an ExecuTorch program ... 29.0 s"]
    assert log.getvalue().splitlines() == lines


def test_a_long_stage_says_every_half_minute_how_far_it_is(clock: Clock, log: io.StringIO) -> None:
    stages = Stages(log, clock)
    stages.stage("calibrate")
    for second in range(1, 1001):
        clock.now += 1
        stages.advance(second / 1000)
    stages.close()
    first, *signs, last = log.getvalue().splitlines()
    assert first == "reading and calibrating weights ..."
    assert len(signs) == 33
    assert signs[0] == "  3% after 30 s, 16 min left"
    assert signs[15] == "  48% after 8 min, 9 min left"
    assert signs[-1] == "  99% after 16 min, 10 s left"
    assert last == "reading and calibrating weights ... 1000.0 s"


def test_notes_have_lines_of_their_own(clock: Clock, log: io.StringIO) -> None:
    stages = Stages(log, clock)
    stages.note("before")
    stages.stage("open")
    stages.note("within")
    stages.note("again")
    clock.now += 1
    stages.close()
    told = ["before", "opening the checkpoint ...", "within", "again"]
    assert log.getvalue().splitlines() == [*told, "opening the checkpoint ... 1.0 s"]


def test_what_did_not_end_shows_no_time(clock: Clock, log: io.StringIO) -> None:
    stages = Stages(log, clock)
    stages.stage("open")
    stages.close(finished=False)
    assert log.getvalue() == "opening the checkpoint ...\n"


def test_work_that_tells_nothing_shows_that_it_lives(log: io.StringIO) -> None:
    before = threading.active_count()
    stages = Stages(log, pause=0.05)
    stages.stage("verify")
    deadline = time.monotonic() + 20
    while log.getvalue().count("0% after") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    stages.close()
    told = log.getvalue().splitlines()
    assert told[1:3] == ["  0% after 0 s", "  0% after 0 s"] and told[-1].startswith("verifying")
    time.sleep(0.2)
    assert log.getvalue().splitlines() == told, "nothing is printed after the end"
    assert threading.active_count() <= before
