"""Headers of tar files: the members are those of Python's tarfile, and damage affects only its own
member."""

import bz2
import collections
import gzip
import io
import lzma
import tarfile

import numpy as np
import pytest

from m3i_jax.data.sources import tar_headers


def parse(content: bytes) -> tuple[list[tuple[str, bytes]], dict[str, int]]:
    problems: collections.Counter[str] = collections.Counter()
    members = [
        (name, content[start : start + size])
        for name, start, size in tar_headers.tar_members(io.BytesIO(content), problems)
    ]
    return members, {kind: n for kind, n in problems.items() if n}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(make, kind):
    long = "d" * 60 + "/" + "e" * 60 + "/"
    names = ["a.jpg", "./b.txt", "b.c.d.png", "deep/er/x.jpg", "n" * 99 + ".", long + "f.jpg"]
    if kind != tarfile.USTAR_FORMAT:
        names += [long * 3 + "g.jpg", "ünï.jpg", "日本" * 60 + ".jpg"]
    members = [(name, bytes([i]) * (i * 511)) for i, name in enumerate(names)]
    content = make.tar_bytes(members, kind)
    parsed, problems = parse(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(m.name.removeprefix("./"), tar.extractfile(m).read()) for m in tar]
    assert (
        parsed == expected == [(name.removeprefix("./"), c) for name, c in members] and not problems
    )


@pytest.mark.parametrize(
    ("kind", "compress"),
    [
        ("gzip", gzip.compress),
        ("bzip2", bz2.compress),
        ("xz", lzma.compress),
        ("zstd", lambda content: b"\x28\xb5\x2f\xfd" + content),
    ],
)
def test_a_compressed_file_is_named_as_such(make, kind, compress):
    content = make.tar_bytes([(f"{n}.jpg", bytes(range(256)) * 9) for n in range(5)])
    assert parse(compress(content)) == ([], {f"files compressed by {kind}": 1})


def test_a_member_may_have_the_name_of_a_magic_number(make):
    assert parse(make.tar_bytes([("BZh.jpg", b"abc")])) == ([("BZh.jpg", b"abc")], {})


def test_sizes_in_base_256_and_in_pax_headers(make):
    content = bytearray(make.tar_bytes([("a.jpg", b"abc"), ("b.jpg", b"de")]))
    content[124:136] = b"\x80" + (3).to_bytes(11, "big")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    assert parse(bytes(content))[0] == [("a.jpg", b"abc"), ("b.jpg", b"de")]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size, member.pax_headers = (
            3,
            {
                "size": "3",
                "path": "b.jpg",
                "mtime": "1.5",
                "comment": "x=y z",
            },
        )
        tar.addfile(member, io.BytesIO(b"abc"))
    assert parse(buffer.getvalue())[0] == [("b.jpg", b"abc")]


def test_truncation_keeps_complete_members(make):
    members = [(f"{i}.jpg", bytes([i]) * (300 + 200 * i)) for i in range(8)]
    content = make.tar_bytes(members)
    ends = [
        at + size
        for _, at, size in tar_headers.tar_members(io.BytesIO(content), collections.Counter())
    ]
    for length in range(0, len(content), 77):
        parsed, problems = parse(content[:length])
        assert parsed == members[: sum(end <= length for end in ends)]
        on_block_edge = (
            length in {-(-end // 512) * 512 for end in [0, *ends]}
            or length >= -(-ends[-1] // 512) * 512 + 512
        )
        assert (
            problems == ({} if on_block_edge else {tar_headers.TRUNCATED: 1}) or length > ends[-1]
        )


def test_a_damaged_header_affects_only_its_member(make):
    members = [(f"{i}.jpg", bytes([65 + i]) * 700) for i in range(5)]
    content = make.tar_bytes(members)
    for at in (0, 3, 130, 150, 511):  # within the header of the third member
        damaged = bytearray(content)
        damaged[2 * 1536 + at] ^= 0x41
        parsed, problems = parse(bytes(damaged))
        assert parsed == members[:2] + members[3:] and problems == {tar_headers.BROKEN: 1}


def test_random_damage_never_raises(make):
    rng = np.random.default_rng(0)
    content = make.tar_bytes(
        [(f"{'x' * 120}{i}.jpg", rng.bytes(600)) for i in range(6)], tarfile.PAX_FORMAT
    )
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 30)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        parsed, _ = parse(bytes(damaged))
        assert len(parsed) <= 7


def test_members_behind_zeros_are_read(make):
    """A range that a download has not written, and an archive appended to another one."""
    members = [(f"{i}.jpg", bytes([65 + i]) * 700) for i in range(5)]
    content = bytearray(make.tar_bytes(members))
    content[1536 : 3 * 1536] = bytes(2 * 1536)  # the second and the third member
    kept = [members[0], *members[3:]]
    assert parse(bytes(content)) == (kept, {tar_headers.BROKEN: 1})
    whole, more = make.tar_bytes(members), make.tar_bytes([("more.jpg", b"more")])
    for zeros in (0, 512, 3 << 20):
        parsed = parse(whole + bytes(zeros) + more)
        assert parsed == ([*members, ("more.jpg", b"more")], {tar_headers.BROKEN: 1})
    # rubbish behind zeros is one damaged range, and zeros to the end are none
    assert parse(whole + b"x" * 1500) == (
        members,
        {tar_headers.BROKEN: 1, tar_headers.TRUNCATED: 1},
    )
    assert parse(whole + bytes(3 << 20)) == (members, {})


def test_the_padding_of_an_archive_is_read_once(make):
    """Python and GNU tar end a file with up to 10 KiB of zeros."""
    reads = []

    class Counted(io.BytesIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    content = make.tar_bytes([("1.jpg", b"x")])
    assert len(list(tar_headers.tar_members(Counted(content), collections.Counter()))) == 1
    assert len(content) == 10_240 and len(reads) == 4  # two headers, the padding, the end


def test_a_negative_size_is_a_damaged_header(make):
    content = bytearray(make.tar_bytes([("a.jpg", b"a" * 2000), ("b.jpg", b"b")]))
    at = 512 + 2048
    for size in (b"-0000004000\0", b"\xff" * 12):
        content[at + 124 : at + 136] = size
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
        assert parse(bytes(content)) == ([("a.jpg", b"a" * 2000)], {tar_headers.BROKEN: 1})
