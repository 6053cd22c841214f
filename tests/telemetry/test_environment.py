"""What stands beside measured numbers."""

from __future__ import annotations

from jaxtune.telemetry import environment


def test_the_processor_is_told_with_its_numbers(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(environment, "Path", lambda _: file)
    core = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Some Processor\nflags\t: a b\n"
    file.write_text(f"processor\t: 0\n{core}\nprocessor\t: 1\n{core.replace('207', '1')}")
    assert environment.processor() == "Some Processor (family 6, model 207)"
    file.write_text("model name\t: Some Board\n")
    assert environment.processor() == "Some Board"
    file.unlink()
    assert environment.processor()
