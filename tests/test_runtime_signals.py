"""The first signal is noted, the second ends the process, and the handlers go back."""

import os
import signal

import pytest

from gpt_jax.runtime.signals import Stop

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def exits(monkeypatch):
    """The codes that os._exit was called with: it would end the tests too."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize("number", BOTH)
def test_a_first_signal_is_noted_and_the_run_goes_on(number, exits, capsys):
    """C15."""
    with Stop() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
    assert not exits
    said = capsys.readouterr()
    assert f"{signal.Signals(number).name}: saving after this iteration" in said.err
    assert not said.out


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_a_second_signal_of_either_kind_leaves_at_once_with_130(first, second, exits):
    """C15."""
    with Stop():
        signal.raise_signal(first)
        assert not exits
        signal.raise_signal(second)
        assert exits == [130]


def test_the_handlers_from_before_are_back_afterwards(exits):
    before = [signal.getsignal(number) for number in BOTH]
    with Stop():
        assert all(signal.getsignal(number) not in before for number in BOTH)
    assert [signal.getsignal(number) for number in BOTH] == before
    with pytest.raises(ZeroDivisionError), Stop():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in BOTH] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not exits


def test_each_run_starts_unasked(exits):
    with Stop():
        signal.raise_signal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.asked
    assert not exits
