"""What comes before writing: places that can be written to, and locks."""

import os

import pytest

from jaxtune.errors import UserError
from jaxtune.files import acquire_lock, check_writable


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


def test_a_lock_is_held_by_one_and_given_back(tmp_path):
    held = acquire_lock(tmp_path / "run.lock", "run")
    with pytest.raises(UserError, match=f"this run is being run by process {os.getpid()}"):
        acquire_lock(tmp_path / "run.lock", "run")
    os.close(held)
    os.close(acquire_lock(tmp_path / "run.lock", "run"))
