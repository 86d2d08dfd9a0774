import os

import pytest

from ldam_plugins.training.files import write_atomic


def test_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldam_plugins.training.files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"
