"""Who is told of trials."""

from __future__ import annotations

from jaxtune.training.hooks import NOBODY, Hooks


def test_displays_of_a_setting_say_whose_they_are():
    titles = []

    def asked() -> bool:
        return True

    hooks = Hooks(listener=titles.append, should_stop=asked)
    assert hooks.listen("trial 1") is None
    short = hooks.titled("short")
    assert (short.listen("trial 2"), short.should_stop) == (None, asked)
    assert titles == ["trial 1", "short, trial 2"]
    assert NOBODY.titled("short").listen("trial 3") is None
    assert not NOBODY.should_stop()
