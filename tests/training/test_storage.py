"""Errors of the storage under checkpoints, and what is told besides."""

from __future__ import annotations

import errno
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from orbax.checkpoint._src.serialization import serialization

from jaxtune.training import storage
from jaxtune.training.storage import quiet_storage, system_errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_an_error_that_quotes_the_system_s_number_is_one_of_the_system(tmp_path, number):
    said = f"OUT_OF_RANGE: Error writing local file: Failed to write 9 bytes [os_error_code='{number}']"
    with pytest.raises(OSError) as raised, system_errors(tmp_path):  # noqa: PT011
        raise ValueError(said)
    assert (raised.value.errno, raised.value.filename) == (number, str(tmp_path))


def test_other_errors_stay_and_one_without_a_file_gets_the_folder_s_name(tmp_path):
    with pytest.raises(ValueError, match="something else"), system_errors(tmp_path):
        raise ValueError("something else")
    for given, named in ((None, str(tmp_path)), ("state", "state")):
        with pytest.raises(OSError, match="No space left") as raised, system_errors(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device", given)
        assert raised.value.filename == named


def test_ends_that_find_no_event_loop_are_not_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    storage._leave_out_late_ends.__wrapped__()
    late = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"), object=None)
    others = [
        SimpleNamespace(exc_value=RuntimeError("Event loop is closed"), object=print),
        SimpleNamespace(exc_value=RuntimeError("something else"), object=None),
        SimpleNamespace(exc_value=None, object=None),
    ]
    for each in (late, *others):
        sys.unraisablehook(each)
    assert told == others


def test_reads_that_were_given_up_are_not_told(monkeypatch):
    """Orbax starts the reads of all arrays, and leaves those that have not ended when one of them has failed."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    storage._leave_out_late_ends.__wrapped__()

    made: dict[str, Any] = {}
    for place in (serialization.__file__, __file__):
        exec(compile("async def read(): pass", place, "exec"), made)
        made[place] = made["read"]()
    read, other = made[serialization.__file__], made[__file__]
    for each in (read, other):
        sys.unraisablehook(SimpleNamespace(exc_value=ValueError("something else"), object=each))
        each.close()
    assert [each.object for each in told] == [other]


def test_of_the_errors_that_were_not_raised_nothing_is_told(caplog):
    quiet_storage()
    logging.getLogger("absl").setLevel(logging.ERROR)  # as a command does when it starts
    quiet_storage()
    logging.getLogger("absl").error("Failed to run 4 Handler Commit operations")
    asyncio_log = logging.getLogger("asyncio")
    for message in ("OUT_OF_RANGE [tensorstore_spec='{}']", "something else"):
        error = ValueError(message)
        asyncio_log.error("Future exception was never retrieved", exc_info=(ValueError, error, None))
    assert [str(record.exc_info[1]) for record in caplog.records] == ["something else"]
