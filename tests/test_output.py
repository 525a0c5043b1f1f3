# SPDX-License-Identifier: Apache-2.0
import os
import shutil
from types import SimpleNamespace

import pytest

from peft_pblora.output import output_file, output_folder


def test_folder_appears_when_complete(tmp_path):
    target = tmp_path / "runs" / "demo"
    with output_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["demo"]
    with output_folder(target) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]


def test_nothing_half_written_stays_behind(tmp_path):
    target = tmp_path / "demo"
    target.mkdir()
    (target / "old").write_text("kept")
    with pytest.raises(KeyError), output_folder(target) as folder:
        (folder / "new").write_text("half")
        raise KeyError
    with pytest.raises(KeyError), output_file(tmp_path / "file.txt") as file:
        file.write("half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
    assert [p.name for p in target.iterdir()] == ["old"]


def test_file_is_replaced_when_complete(tmp_path):
    for text in ("one", "two"):
        with output_file(tmp_path / "deep" / "file.txt") as file:
            file.write(text)
    assert (tmp_path / "deep" / "file.txt").read_text() == "two"


def test_bad_places(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file. Name another folder"), output_folder(tmp_path / "file"):
        pass
    with pytest.raises(ValueError, match="can't be made"), output_folder(tmp_path / "file" / "demo"):
        pass
    with pytest.raises(ValueError, match="is a folder. Name a file"), output_file(tmp_path):
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="no permission"), output_folder(tmp_path / "demo"):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with (
        pytest.raises(ValueError, match="needs 500 MB, but its disk has 1 MB free"),
        output_folder(tmp_path / "demo", needed_bytes=500_000_000),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
