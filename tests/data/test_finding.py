"""Which files a path names, and that every other file of a folder is counted."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from octavo.data.finding import counted, find_files
from octavo.errors import UsageError

SUFFIXES = [".txt", ".jsonl"]


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_folder_gives_its_known_files_sorted_without_hidden_ones(tmp_path: Path) -> None:
    names = ["b.txt", "a.jsonl.gz", "deep/er/c.TXT", "picture.png", ".hidden.txt", ".git/d.txt"]
    for name in names:
        write(tmp_path / name, b"x")
    actual = find_files([str(tmp_path)], SUFFIXES).files
    assert [str(path.relative_to(tmp_path)) for path in actual] == ["a.jsonl.gz", "b.txt", "deep/er/c.TXT"]


def test_a_file_is_found_once_in_the_order_given(tmp_path: Path) -> None:
    first, second = write(tmp_path / "b.txt", b"x"), write(tmp_path / "a.txt", b"x")
    assert find_files([str(first), str(tmp_path / "*.txt"), str(tmp_path)], SUFFIXES).files == [first, second]


def test_a_named_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "[odd] name", b"x")
    assert find_files([str(path)], SUFFIXES).files == [path]


def test_the_error_of_a_missing_path_suggests_the_most_similar_one(tmp_path: Path) -> None:
    write(tmp_path / "plays" / "hamlet.txt", b"x")
    with pytest.raises(UsageError, match=r"plays.hamlte\.txt: no such.*\n.*plays.hamlet\.txt\?"):
        find_files([str(tmp_path / "plays" / "hamlte.txt")], SUFFIXES)
    with pytest.raises(UsageError, match=r"mean .*plays\?"):
        find_files([str(tmp_path / "play" / "hamlet.txt")], SUFFIXES)


@pytest.mark.parametrize("name", ["*.txt", "empty"])
def test_a_path_or_glob_without_files_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no file"):
        find_files([str(tmp_path / name)], SUFFIXES)


def test_every_file_of_a_folder_is_read_or_counted_by_kind(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside"
    for name in (
        "a.txt",
        "b.docx",
        "deep/c.DOCX",
        "d.pdf",
        "notes",
        "e.tar.gz",
        ".hidden.txt",
        ".git/f.txt",
        ".git/g.txt",
    ):
        write(folder / name)
    write(outside / "h.txt")
    (folder / "linked").symlink_to(outside)
    (folder / "away.txt").symlink_to(outside / "h.txt")
    (folder / "again.txt").symlink_to("a.txt")
    (folder / "broken.txt").symlink_to("nowhere.txt")
    os.link(folder / "a.txt", folder / "z.txt")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as end:
        here = Path.cwd()
        os.chdir(folder)  # the name of a socket is short
        end.bind("s.txt")
        os.chdir(here)
        actual = find_files([str(folder)], SUFFIXES)
    assert [path.name for path in actual.files] == ["a.txt"]
    assert actual.not_read == {
        ".docx": 2,
        ".pdf": 1,
        ".tar.gz": 1,
        "file without a suffix": 1,
        "hidden file": 1,
        "hidden folder": 1,
        "linked folder": 1,
        "link that leads out of the folder": 1,
        "broken link": 1,
        "second name of a file that is read": 2,
        "pipe (FIFO)": 1,
        "socket": 1,
    }
    everything = sum(len(names) for _, _, names in os.walk(folder)) - 2  # those in the hidden folder
    assert sum(actual.not_read.values()) + len(actual.files) == everything + 2  # and two folders


def test_a_link_is_read_where_it_is_named_and_inside_its_folder(tmp_path: Path) -> None:
    target = write(tmp_path / "outside" / "h.txt")
    (tmp_path / "data").mkdir()
    link = tmp_path / "data" / "away.txt"
    link.symlink_to(target)
    assert find_files([str(link)], SUFFIXES).files == [link]
    assert find_files([str(tmp_path / "data" / "*")], SUFFIXES).files == [link]
    with pytest.raises(UsageError, match=r"no file here.*\n.*1 link that leads out of the folder.*FOLDER/\*"):
        find_files([str(tmp_path / "data")], SUFFIXES)
    assert find_files([str(tmp_path)], SUFFIXES).files == [target]


def test_a_named_broken_link_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("nowhere")
    with pytest.raises(UsageError, match="a link that leads nowhere"):
        find_files([str(tmp_path / "a.txt")], SUFFIXES)


def test_a_glob_that_matches_folders_and_their_files_reads_each_file_once(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.txt"), write(tmp_path / "sub" / "b.txt")]
    actual = find_files([str(tmp_path / "**")], SUFFIXES)
    assert actual.files == files
    assert not actual.not_read


def test_kinds_are_counted_in_words() -> None:
    assert counted({".pdf": 1, ".docx": 2, "linked folder": 1}) == "2 .docx, 1 .pdf, 1 linked folder"
    assert counted({"link that leads out of the folder": 3}) == "3 links that lead out of the folder"
    assert counted({"file without a suffix": 2, "second name of a file that is read": 2}) == (
        "2 files without a suffix, 2 second names of a file that is read"
    )
    assert counted({f".x{number}": 1 for number in range(30)}).endswith("18 of other kinds")


def test_the_lock_of_an_open_word_document_is_a_hidden_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "~$a.docx").write_bytes(bytes(162))
    found = find_files([str(tmp_path)], (".txt", ".docx"))
    assert [Path(file).name for file in found.files] == ["a.txt"]
    assert found.not_read == {"hidden file": 1}
