# SPDX-License-Identifier: Apache-2.0
"""Outputs are complete or not there, and nothing is replaced or removed that its writer did not write."""

import multiprocessing
import os
import shutil
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_pblora import output
from peft_pblora.output import NOTES, file_name, output_file, output_files, output_folder, remove_output


ROOT = Path(__file__).parents[1]
REFUSED = "Nothing is replaced: name another output, or move that away"


def names(folder) -> list[str]:
    """What stands in a folder, but for the notes."""
    return sorted(path.name for path in folder.iterdir() if path.name != NOTES)


def content(folder) -> dict[str, bytes | str]:
    """Every file below a folder, and every link as where it leads."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def write_folder(path, text="new", writer="us"):
    with output_folder(path, writer) as folder:
        (folder / "deep").mkdir()
        (folder / "a").write_text(text)
        (folder / "deep/b").write_text(text)


def write_file(path, text="new", writer="us"):
    with output_file(path, writer) as file:
        file.write(text)


def test_folder_appears_when_complete(tmp_path):
    target = tmp_path / "runs" / "demo"
    with output_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert names(target.parent) == ["demo"]
    with output_folder(target) as folder:
        (folder / "b").write_text("2")
    assert names(target) == ["b"]


def write_files(path, text="new", names=("a", "deep/b")):
    with output_files(path, "us") as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


def test_files_come_into_a_folder_together_and_leave_the_others(tmp_path):
    (tmp_path / "mine").write_text("mine")
    write_files(tmp_path)
    write_files(tmp_path, "newer", ["a"])
    found = {name: text for name, text in content(tmp_path).items() if NOTES not in name}
    assert found == {"a": b"newer", "deep/b": b"new", "mine": b"mine"}
    with pytest.raises(ValueError, match=f"mine was not written by 'us'.* {REFUSED}"):
        write_files(tmp_path, "last", ["a", "mine"])
    with pytest.raises(RuntimeError), output_files(tmp_path, "us") as folder:
        (folder / "a").write_text("broken")
        raise RuntimeError
    assert {name: text for name, text in content(tmp_path).items() if NOTES not in name} == found
    with output_file(tmp_path / "a") as file:  # whose it was, it stays
        file.write("changed by ours")
    write_files(tmp_path)


def test_nothing_half_written_stays_behind(tmp_path):
    write_folder(tmp_path / "demo", "old")
    before = content(tmp_path)
    with pytest.raises(KeyError), output_folder(tmp_path / "demo", "us") as folder:
        (folder / "new").write_text("half")
        raise KeyError
    for writer in (None, "us"):
        with pytest.raises(KeyError), output_file(tmp_path / "file.txt", writer) as file:
            file.write("half")
            raise KeyError
    assert content(tmp_path) == before


def test_file_is_replaced_when_complete(tmp_path):
    for text in ("one", "two"):
        write_file(tmp_path / "deep" / "file.txt", text)
    assert (tmp_path / "deep" / "file.txt").read_text() == "two"
    assert names(tmp_path / "deep") == ["file.txt"]
    with output_file(tmp_path / "bytes", "us", binary=True) as file:
        file.write(b"\xff")
    assert (tmp_path / "bytes").read_bytes() == b"\xff"


def linked(folder):
    (folder.parent / "elsewhere").write_text("new")
    (folder / "a").unlink()
    (folder / "a").symlink_to(folder.parent / "elsewhere")


def linked_folder(folder):
    folder.joinpath("deep").rename(folder.parent / "elsewhere")
    folder.joinpath("deep").symlink_to(folder.parent / "elsewhere")


CHANGES = {
    "another file": lambda folder: (folder / "notes.txt").write_text("mine"),
    "a file further down": lambda folder: (folder / "deep/notes.txt").write_text("mine"),
    "a hidden file": lambda folder: (folder / ".notes").write_text("mine"),
    "a file that was changed": lambda folder: (folder / "deep/b").write_text("mine"),
    "a file in the place of another": lambda folder: shutil.copy(folder / NOTES, folder / "a"),
    "an empty folder": lambda folder: (folder / "mine").mkdir(),
    "a link": lambda folder: (folder / "link").symlink_to(folder / "a"),
    "a link that leads nowhere": lambda folder: (folder / "link").symlink_to("nowhere"),
    "a link in the place of a file": linked,
    "a link in the place of a folder": linked_folder,
    "a write-protected file": lambda folder: (folder / "a").chmod(0o444),
    "a write-protected folder": lambda folder: (folder / "deep").chmod(0o555),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "no notes": lambda folder: (folder / NOTES).unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_folder_that_holds_anything_else_is_refused_before_the_work(tmp_path, change):
    write_folder(tmp_path / "demo")
    change(tmp_path / "demo")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=REFUSED), output_folder(tmp_path / "demo", "us"):
        pytest.fail("the work has begun")
    assert content(tmp_path) == before


def test_one_writer_does_not_replace_what_another_wrote(tmp_path):
    write_folder(tmp_path / "demo", "theirs", "them")
    write_file(tmp_path / "table", "theirs", "them")
    with output_file(tmp_path / "file") as file:
        file.write("of nobody in particular")
    before = content(tmp_path)
    for write, name in ((write_folder, "demo"), (write_file, "table"), (write_file, "file"), (write_file, "demo/a")):
        with pytest.raises(ValueError, match="was not written by 'us'"):
            write(tmp_path / name)
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "changed", "protected", "link", "dangling link"])
def test_a_file_of_anybody_else_is_refused(tmp_path, kind):
    target = tmp_path / "table.csv"
    if kind in ("changed", "protected"):
        write_file(target)
    if "link" in kind:
        write_file(tmp_path / "elsewhere")
        target.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    elif kind == "protected":
        target.chmod(0o444)
    else:
        target.write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=REFUSED), output_file(target, "us"):
        pytest.fail("the work has begun")
    assert content(tmp_path) == before


def test_only_what_a_writer_wrote_and_nobody_changed_is_removed(tmp_path):
    for name in ("mine", "changed", "others"):
        with output_file(tmp_path / name, "other" if name == "others" else "plot") as file:
            file.write(name)
    (tmp_path / "changed").write_text("by hand")
    (tmp_path / "own").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("mine", "changed", "others", "own", "folder", "nothing"):
        remove_output(tmp_path / name, "plot")
    assert names(tmp_path) == ["changed", "folder", "others", "own"]


def test_what_comes_while_the_work_goes_on_stays(tmp_path):
    for write in (output_folder, output_file):
        target = tmp_path / write.__name__
        with pytest.raises(ValueError, match=REFUSED), write(target, "us") as place:
            (place / "a").write_text("new") if write is output_folder else place.write("new")
            target.mkdir() if write is output_folder else target.write_text("mine")
            (target / "mine").write_text("mine") if write is output_folder else None
    assert content(tmp_path / "output_folder") == {"mine": b"mine"}
    assert (tmp_path / "output_file").read_text() == "mine"
    assert names(tmp_path) == ["output_file", "output_folder"]


def test_a_link_to_a_folder_leads_there(tmp_path):
    (tmp_path / "disk").mkdir()
    for target in ("disk/there", "disk/not_yet"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / target)
        for text in ("one", "two"):
            write_folder(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / target / "a").read_text() == "two"
    (tmp_path / "disk/there/notes").write_text("mine")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "disk/there")
    with pytest.raises(ValueError, match=REFUSED):
        write_folder(tmp_path / "link")


@pytest.mark.parametrize("failing", [1, 2])
def test_what_stood_there_comes_back_when_a_move_fails(tmp_path, monkeypatch, failing):
    """The moves are: old away, new to its place."""
    write_folder(tmp_path / "demo", "old")
    before, calls, rename = content(tmp_path), [], Path.rename

    def broken(path, target):
        calls.append(path)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "demo", "new")
    assert content(tmp_path) == before
    assert names(tmp_path) == ["demo"]


def test_a_kill_between_the_note_and_the_file_leaves_a_file_that_can_be_replaced(tmp_path, monkeypatch):
    write_file(tmp_path / "table", "old")
    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, lambda *args, **kwargs: os._exit(9))
    child = multiprocessing.get_context("fork").Process(target=write_file, args=(tmp_path / "table", "new"))
    child.start()
    child.join(30)
    assert child.exitcode == 9
    monkeypatch.undo()
    assert (tmp_path / "table").read_text() == "old"
    write_file(tmp_path / "table", "again")
    assert (tmp_path / "table").read_text() == "again"


def _write_often(path, text):
    for _ in range(60):
        write_folder(path, text)


def test_two_processes_that_write_one_folder_leave_that_of_one(tmp_path):
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_write_often, args=(tmp_path / "demo", text)) for text in ("one", "two")]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert names(tmp_path) == ["demo"]
    assert (tmp_path / "demo/a").read_text() == (tmp_path / "demo/deep/b").read_text()


def test_a_new_folder_has_the_rights_that_others_have(tmp_path):
    old = os.umask(0o027)
    try:
        write_folder(tmp_path / "demo")
    finally:
        os.umask(old)
    assert (tmp_path / "demo").stat().st_mode & 0o777 == 0o750


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


ODD = ["", ".", "..", "../../up", "/root", "a/b", "a\\b", "~", "-rf", ".hidden", "a.", "a ", "con", "con.txt", "LPT1",
       "a\0b", "a\nb", "\ud800", "x" * 5000, "有用", "é" * 300, "Helpful", "HELPFUL", "helpful~0", "com1.5",
       "a:b", "a|b", "*", "$HOME", "%41"]  # fmt: skip


@pytest.mark.parametrize("name", ["helpful", "helpful=0.25,harmless=0.75", "a_b-c", "1", "x=1e-07,y=0.9999999"])
def test_plain_names_are_themselves(name):
    assert file_name(name) == name


@given(st.one_of(st.sampled_from(ODD), st.text(max_size=300), st.text(string.ascii_letters + "._-~ /", max_size=8)))
def test_any_name_is_one_file_below_its_folder(name):
    found = file_name(name)
    assert found == os.path.basename(os.path.normpath(f"/folder/{found}"))
    assert not found.startswith((".", "-", "~"))
    assert not found.endswith((".", " "))
    assert len(found.encode()) <= 200
    assert found.isprintable()
    assert not set(found) & set('/\\:*?"<>|')
    assert found.split(".")[0].lower() not in output.DEVICES


@given(st.sets(st.one_of(st.sampled_from(ODD), st.text("aAbB._~/ ", max_size=4)), min_size=2, max_size=20))
def test_two_names_never_share_a_file(several):
    found = {file_name(name).casefold() for name in several}
    assert len(found) == len(several)
    assert {file_name(name) for name in found} >= {name for name in found if "~" not in name}


def test_a_folder_of_any_name_can_be_made(tmp_path):
    for name in ODD:
        (tmp_path / file_name(name)).mkdir()
    assert len(list(tmp_path.iterdir())) == len(ODD)
