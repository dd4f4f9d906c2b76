"""IrqLine: edges, sinks and wired-OR inputs."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvmaio.irq import IrqLine


def test_sinks_hear_changes_only():
    line = IrqLine("irq4")
    heard: list[bool] = []
    line.connect(heard.append)
    for level in (False, True, True, False, False, True):
        line.set(level)
    line.pulse()  # already high: it can only fall
    assert (heard, line.edges, repr(line)) == ([True, False, True, False], 2, "<IrqLine irq4 low>")


def test_connecting_to_a_high_line_tells_at_once_and_disconnecting_ends_it():
    line = IrqLine()
    heard: list[bool] = []
    sink = heard.append
    line.set(True)
    line.connect(sink)
    line.disconnect(sink)
    line.disconnect(sink)
    line.set(False)
    assert heard == [True]


def test_a_shared_line_is_high_while_any_input_is():
    line = IrqLine()
    heard: list[bool] = []
    line.connect(heard.append)
    first, second = line.input(), line.input()
    first(True)
    second(True)
    second(True)
    first(False)
    line.set(True)
    second(False)
    line.set(False)
    assert (heard, line.edges) == ([True, False], 1)


def test_a_sink_may_leave_while_it_is_called():
    line = IrqLine()
    heard: list[bool] = []

    def once(level):
        heard.append(level)
        line.disconnect(once)

    line.connect(once)
    line.connect(heard.append)
    line.pulse()
    assert heard == [True, True, False]


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans())))
def test_the_line_is_the_or_of_its_inputs(changes):
    line, heard = IrqLine(), [False]
    line.connect(heard.append)
    inputs = [line.set, line.input(), line.input()]
    levels = [False] * 3
    for which, level in changes:
        inputs[which](level)
        levels[which] = level
        assert line.level is any(levels)
    assert all(a is not b for a, b in pairwise(heard))
    assert line.edges == heard[1:].count(True)
