"""What stands in the loops of a compiled program."""

from __future__ import annotations

import re


def collectives_in_loops(text: str) -> list[str]:
    """Of a compiled program: those in the body of a loop, or in what it calls."""
    assert "ENTRY" in text
    bodies = dict(re.findall(r"^(?:ENTRY )?%(\S+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    reached = set(re.findall(r" body=%([\w.-]+)", text))
    while (
        more := {name for body in reached for name in re.findall(r"%([\w.-]+)", bodies[body])} & set(bodies) - reached
    ):
        reached |= more
    kinds = r"= \S+ ((?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\S*)\("
    return [kind for name in sorted(reached) for kind in re.findall(kinds, bodies[name])]
