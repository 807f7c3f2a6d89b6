"""`runner.utils.serialization.pt_file`: a `.pt` file that would need more memory than its size is refused."""

import io as bytes_io
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch

from runner.utils import io


class Shared:
    weight, large = torch.arange(6.0), torch.zeros(1 << 20)


def rewrite(path, value, **settings):
    """Writes torch's `.pt` file of a value again, with other settings of the archive."""
    buffer = bytes_io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name), **settings)


def put_pickle(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")


def nested(levels, width):
    value = [1]
    for _ in range(levels):
        value = [value] * width
    return value


def itself():
    value = {}
    value["a"] = [value]
    return value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"a": torch.zeros(1).expand(10**12)}, "more bytes than the file"),
        ([torch.zeros(1 << 20)] * 40, "more bytes than the file"),
        ([Shared.large[i:] for i in range(40)], "more bytes than the file"),
        (nested(30, 10), "containers are nested to"),
        (nested(300, 1), "nested over 200 deep"),
        (itself(), "holds itself"),
    ],
    ids=["stride 0", "one tensor", "views", "shared", "deep", "itself"],
)
def test_a_value_with_many_references_to_its_bytes_is_refused(tmp_path, value, told):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: not read, ValueError: .*{told}"):
        io.load(tmp_path / "x.pt")


CALLS = {
    "bytearray": b"c__builtin__\nbytearray\nq\x00\x8a\x06\x00\x00\x00\x00\x10\x00\x85R.",
    "bytearray by memo": b"c__builtin__\nbytearray\nq\x00J\x00\x00\x00\x70q\x01\x85q\x02h\x00h\x02R.",
    "bytearray by tuple": b"c__builtin__\nbytearray\n(J\x00\x00\x00\x70tR.",
    "a codec": b"c_codecs\nencode\nX\x03\x00\x00\x00abcX\x08\x00\x00\x00punycode\x86R.",
    "a tensor": b"ctorch\nFloatTensor\nJ\x00\x00\x00\x70\x85R.",
    "a storage": b"ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x70\x85R.",
    "no stack": b"c__builtin__\nbytearray\n\x86R.",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_pickle_that_allocates_memory_is_refused(tmp_path, name):
    put_pickle(tmp_path / "x.pt", b"\x80\x02" + CALLS[name])
    with pytest.raises(ValueError, match=r"x\.pt: not read, ValueError: its (pickle|tensors)"):
        io.load(tmp_path / "x.pt")


def test_a_member_that_is_compressed_is_refused(tmp_path):
    rewrite(tmp_path / "x.pt", {"a": torch.zeros(10)})
    assert torch.equal(io.load(tmp_path / "x.pt")["a"], torch.zeros(10))
    rewrite(tmp_path / "x.pt", {"a": torch.zeros(1_000_000)}, compress_type=zipfile.ZIP_DEFLATED)
    for read in (io.load, io.read_metadata):
        with pytest.raises(ValueError, match="is compressed"):
            read(tmp_path / "x.pt")


def test_members_that_share_bytes_are_refused(tmp_path):
    """Every entry of the directory points to the first member, under another name."""
    rewrite(tmp_path / "x.pt", {"a": torch.zeros(10)})
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        first = next(info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        for number in range(100):
            copied = zipfile.ZipInfo(f"x/{number}")
            for name in ("header_offset", "compress_size", "file_size", "CRC"):
                setattr(copied, name, getattr(first, name))
            archive.filelist.append(copied)
            archive.NameToInfo[copied.filename] = copied
        archive._didModify = True
    with pytest.raises(ValueError, match="its members have"):
        io.load(tmp_path / "x.pt")


@pytest.mark.parametrize("change", ["before", "after", "comment", "count", "place"])
def test_an_archive_that_readers_may_read_differently_is_refused(tmp_path, change):
    rewrite(tmp_path / "x.pt", {"a": torch.zeros(10)})
    content = bytearray((tmp_path / "x.pt").read_bytes())
    end = len(content) - 22
    if change == "before":
        content = b"PK\x03\x04" + content
    elif change == "after":
        content += b"x"
    elif change == "comment":
        content[end + 20 : end + 22] = struct.pack("<H", 3)
        content += b"abc"
    elif change == "count":
        content[end + 8 : end + 12] = struct.pack("<HH", 1, 1)
    else:
        content[end + 16 : end + 20] = struct.pack("<L", 5)
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt: not read"):
        io.load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "value",
    [
        {"a": bytearray(b"abc"), "b": b"xyz", "c": [b"abc", "latin-1"], "d": bytearray(b"xyz")},
        {"a": Shared.weight, "b": Shared.weight, "c": Shared.weight.view(2, 3)},
        {"a": torch.zeros(4).expand(3, 4)},
        OrderedDict(a=nested(90, 1), b=[()] * 1000),
        ["bytearray", "_codecs", torch.zeros(0)],
    ],
    ids=["bytes", "ties", "expanded", "nests", "words"],
)
def test_files_of_common_programs_are_read(tmp_path, value):
    for is_zip in (True, False):
        torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
        assert str(io.load(tmp_path / "x.pt")) == str(value)


def test_arrays_of_the_same_bytes_share_them(tmp_path):
    """A structure may name a tensor any number of times, so copies would need any amount of memory."""
    array = torch.arange(4).numpy()
    io.save([array, array[:], array.reshape(2, 2)], tmp_path / "x.sft")
    first, second, third = io.load(tmp_path / "x.sft")
    assert first.tolist() == second.tolist() == third.reshape(-1).tolist() == [0, 1, 2, 3]
    second[0] = 9
    assert first[0] == 9
