"""The first signal asks, the second one kills."""

from __future__ import annotations

import gc
import signal

import numpy as np
import pytest

from jaxtune.training import signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_a_stop(number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with signals.stop_signals() as should_stop:
        assert not should_stop()
        signal.raise_signal(number)
        assert should_stop()
        # The same signal again does what it did outside of the block.
        assert signal.getsignal(number) == before[(signal.SIGTERM, signal.SIGINT).index(number)]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def uncollected():
    """No garbage is collected: what a signal raises in one of the collector's callbacks is lost."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_a_second_interrupt_is_an_interrupt():
    with signals.stop_signals() as should_stop:
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_process_that_is_asked_stops_all(monkeypatch):
    asked = []
    monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        signals.multihost_utils,
        "process_allgather",
        lambda own: asked.append(bool(own[0])) or np.stack([own, np.array([True])]),
    )
    with signals.stop_signals() as should_stop:
        assert should_stop()
    assert asked == [False]
