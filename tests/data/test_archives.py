"""Archives: every member is read, counted, or an error with its name; hostile archives are bounded."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from octavo.data import archives
from octavo.data.documents import ReadOptions, read
from octavo.errors import DataError

MEMBERS = {"one.txt": b"text one", "folder/two.jsonl": b'{"text": "two"}', "three.md.gz": gzip.compress(b"three")}
OTHERS = {"cover.png": b"x", "__MACOSX/a.txt": b"x", ".hidden.txt": b"x", "README": b"x"}


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def packed(name: str, members: dict[str, bytes]) -> bytes:
    data = zipped(members) if ".zip" in name else tarred(members)
    if name.endswith((".gz", ".tgz")):
        return gzip.compress(data)
    if name.endswith((".xz", ".txz")):
        return lzma.compress(data)
    if name.endswith(".zst"):
        return bytes(pytest.importorskip("zstandard").compress(data))
    return data


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("name", ["a.zip", "a.zip.gz", "a.tar", "a.tar.gz", "a.tgz", "a.txz", "a.tar.zst"])
def test_all_members_are_read_or_counted(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, packed(name, {**MEMBERS, **OTHERS}))
    reading = read([str(tmp_path)])
    assert [(document.source, document.text) for document in reading.documents] == [
        (f"{path}/one.txt", "text one"),
        (f"{path}/folder/two.jsonl", "two"),
        (f"{path}/three.md.gz", "three"),
    ]
    assert reading.not_read == {".png": 1, "hidden file": 2, "file without a suffix": 1}


def test_an_error_within_an_archive_names_member_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", zipped({"in.tar": tarred({"bad.jsonl": b'{"text": "a"}\n{"text": 1}\n'})}))
    with pytest.raises(DataError, match=r"a\.zip/in\.tar/bad\.jsonl:2: ") as caught:
        read([path])
    assert "member" not in str(caught.value)
    reading = read([path], ReadOptions(skip_bad=True))
    assert [(bad.source, bad.line) for bad in reading.skipped] == [(f"{path}/in.tar/bad.jsonl", 2)]


def test_a_member_without_a_name_is_an_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ok.txt", "fine")
        archive.writestr(zipfile.ZipInfo(""), "x")
    path = write(tmp_path / "a.zip", buffer.getvalue())
    with pytest.raises(DataError, match="has no name"):
        read([path])
    reading = read([path], ReadOptions(skip_bad=True))
    assert [document.text for document in reading.documents] == ["fine"]


@pytest.mark.parametrize("name", ["../up.txt", "/abs.txt", "a/../../b.txt", "..\\up.txt", "C:\\a.txt"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_name_that_leads_out_of_the_archive_is_an_error(tmp_path: Path, pack: object, name: str) -> None:
    suffix = ".zip" if pack is zipped else ".tar"
    path = write(tmp_path / f"a{suffix}", pack({name: b"x", "ok.txt": b"fine"}))  # type: ignore[operator]
    with pytest.raises(DataError, match="its name leads out of the archive"):
        read([path])
    reading = read([path], ReadOptions(skip_bad=True))
    assert [document.text for document in reading.documents] == ["fine"]
    assert [file.name for file in tmp_path.rglob("*")] == [f"a{suffix}"]


def test_links_and_devices_of_a_tar_are_counted_and_never_followed(tmp_path: Path) -> None:
    buffer = io.BytesIO(tarred({"ok.txt": b"fine"}))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a.txt"), (tarfile.LNKTYPE, "b.txt"), (tarfile.FIFOTYPE, "c.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
    reading = read([write(tmp_path / "a.tar", buffer.getvalue())])
    assert [document.text for document in reading.documents] == ["fine"]
    assert reading.not_read == {"link": 2, "special file": 1}


def test_an_archive_that_swells_is_an_error_with_the_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.zip", zipped({f"{n}.txt": b"word " * 100_000 for n in range(3)}))
    assert len(read([path]).documents) == 3
    monkeypatch.setattr(archives, "SURE_BYTES", 1_000_000)
    monkeypatch.setattr(archives, "MAX_RATIO", 20)
    with pytest.raises(DataError, match=r"a\.zip/2\.txt: the archive's files swell"):
        read([path])


def test_archives_within_archives_share_one_bound_and_have_a_bound_on_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = zipped({"a.txt": b"text"})
    for _ in range(archives.MAX_DEPTH - 1):
        data = zipped({"in.zip": data})
    assert read([write(tmp_path / "a.zip", data)]).documents[0].text == "text"
    with pytest.raises(DataError, match="is an archive within 3 others"):
        read([write(tmp_path / "b.zip", zipped({"in.zip": data}))])
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    many = zipped({f"{n}.txt": b"x" for n in range(3)})
    with pytest.raises(DataError, match=r"d\.zip: holds more than 5 files"):
        read([write(tmp_path / "e.zip", zipped({"c.zip": many, "d.zip": many}))])


def test_an_encrypted_member_is_an_error(tmp_path: Path) -> None:
    data = bytearray(zipped({"a.txt": b"secret"}))
    data[6] |= 1  # the flag in the local header, and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(DataError, match=r"a\.zip/a\.txt: is encrypted"):
        read([write(tmp_path / "a.zip", bytes(data))])


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.zst"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_damaged_archive_is_an_error(tmp_path: Path, name: str, kept: float) -> None:
    data = packed(name, {"a.txt": bytes(range(1, 128)).replace(b"\n", b"") * 100})
    with pytest.raises(DataError, match=r"a\.(zip|tar|tgz)"):
        read([write(tmp_path / name, data[: int(kept * len(data))])])


def test_zst_is_read_frame_by_frame_and_bounded(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = zstandard.compress(b"one ") + zstandard.compress(b"two")
    assert read([write(tmp_path / "a.txt.zst", frames)]).documents[0].text == "one two"
    with pytest.raises(DataError, match="swell to more than"):
        read([write(tmp_path / "b.txt.zst", zstandard.compress(b"a" * 80_000_000))])
    for name, data in (("c.txt.zst", frames[:-3]), ("d.txt.zst", b"no zst data")):
        with pytest.raises(DataError, match="cannot be decompressed"):
            read([write(tmp_path / name, data)])
