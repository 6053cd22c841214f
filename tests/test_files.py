"""What comes before writing: places that can be written to, and locks."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxtune.errors import UserError
from jaxtune.files import acquire_lock, cache_directory, check_writable, lock_holder, user_path, write_atomically


def test_a_place_is_checked_without_making_it(tmp_path):
    check_writable(tmp_path / "a" / "b" / "c", "run_dir")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run_dir: .* as .*file is no folder"):
        check_writable(tmp_path / "file" / "b" / "c", "run_dir")
    check_writable(tmp_path / "file", "--predictions")


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    # The super-user, who runs tests in a container, may write everywhere: the answer is made up.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"no permission to write to {tmp_path}"):
        check_writable(tmp_path / "run", "run_dir")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_where_even_the_super_user_makes_no_file_is_refused():
    with pytest.raises(UserError, match=r"^run_dir: /proc/run/a cannot be written: no file can be made in /proc"):
        check_writable("/proc/run/a", "run_dir")


def test_what_can_only_be_read_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(UserError, match=rf"^run_dir: .* cannot be written: {tmp_path} can only be read$"):
        check_writable(tmp_path / "run", "run_dir")


def test_a_lock_is_held_by_one_and_given_back(tmp_path):
    held = acquire_lock(tmp_path / "run.lock", "run")
    with pytest.raises(UserError, match=f"this run is being run by process {os.getpid()}"):
        acquire_lock(tmp_path / "run.lock", "run")
    os.close(held)
    os.close(acquire_lock(tmp_path / "run.lock", "run"))


def test_a_name_that_no_file_system_takes_is_refused(tmp_path):
    for name in ("n" * 300, "ü" * 130):
        with pytest.raises(UserError, match=r"^--merged: .* is a name of (300|260) bytes; .* takes 255"):
            check_writable(tmp_path / name / "b", "--merged")
    with pytest.raises(UserError, match=r"^run_dir: .*udcff.* is no UTF-8 text"):
        check_writable(tmp_path / os.fsdecode(b"caf\xff"), "run_dir")
    check_writable(tmp_path / ("n" * 255), "--merged")


def test_a_file_may_have_the_longest_name(tmp_path):
    write_atomically(tmp_path / ("n" * 255), "text")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("n" * 255, "text")]


def test_the_time_of_a_lock_is_the_same_in_every_zone(tmp_path, monkeypatch):
    before = time.time()
    held = acquire_lock(tmp_path / "run.lock", "run")
    told = set()
    for zone in ("UTC", "Asia/Kolkata", "America/Lima"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        holder = lock_holder(tmp_path / "run.lock")
        assert holder is not None
        assert holder.started is not None
        told.add(holder.started)
    assert len(told) == 1
    assert abs(told.pop() - before) < 60
    # One without a zone, of an earlier version, is still read.
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    (tmp_path / "run.lock").write_text("process 17 on node3, started 2026-01-31 10:20:30\n")
    holder = lock_holder(tmp_path / "run.lock")
    assert holder is not None
    assert (holder.process, holder.host, holder.started) == (17, "node3", 1769854830.0)
    os.close(held)
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("given", [None, "", "relative/cache"])
def test_caches_never_lie_in_the_working_directory(monkeypatch, tmp_path, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_directory() == tmp_path / ".cache" / "jaxtune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine" / "jaxtune"


def test_homes_are_expanded_in_one_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [user_path(path) for path in ("~", "~/a", "./~/a", "a/~", "")] == [
        str(tmp_path), f"{tmp_path}/a", "./~/a", "a/~", ""
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no user 'nobody-here'; a file of that name is \./~nobody-here/a"):
        user_path("~nobody-here/a")
    # What is checked is what is used: nothing expands a second time.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    check_writable("~/a/b", "run_dir")


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "kept").mkdir()
    target, link, second = tmp_path / "kept" / "file", tmp_path / "link", tmp_path / "second"
    link.symlink_to("kept/file")
    second.symlink_to(link)
    for text in ("made", "replaced"):
        write_atomically(second, text)
        assert target.read_text() == text
    assert link.is_symlink()
    assert second.is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "kept", "link", "second"]


def test_a_descriptor_is_written_to_behind_what_it_has(tmp_path):
    with (tmp_path / "output").open("w") as file:
        file.write("before\n")
        file.flush()
        for folder in ("/dev/fd", "/proc/self/fd"):
            write_atomically(Path(folder) / str(file.fileno()), "within\n")
        file.write("after\n")
    assert (tmp_path / "output").read_text() == "before\nwithin\nwithin\nafter\n"


def test_a_pipe_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_atomically(pipe, "through\n")
    reader.join(10)
    assert read == ["through\n"]
    assert pipe.is_fifo()
