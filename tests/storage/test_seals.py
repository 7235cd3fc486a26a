"""What was sealed is compared to the last byte, named where it differs, and read only where it must
be."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest

from elastic.storage import seals
from elastic.storage.files import refuse_inside
from elastic.storage.opened import OpenFile
from elastic.storage.seals import NAME, FileSeal, SealBroken, Sealing, Seals, check_beside, damage

BLOCK = 64
"""Size of a block in these tests."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "BLOCK_BYTES", BLOCK)


def sealed(directory: Path, size: int = 300) -> bytes:
    """A file `a`, another in a folder, and their seals; returns the contents of `a`."""
    content = bytes(i * 7 % 251 for i in range(size))
    (directory / "a").write_bytes(content)
    (directory / "inner").mkdir(exist_ok=True)
    (directory / "inner" / "b").write_bytes(b"b")
    Seals.of(directory).write()
    return content


def flip(path: Path, place: int) -> None:
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def opened(directory: Path) -> OpenFile:
    return OpenFile(directory / "a", Seals.read(directory))


def read(file: OpenFile, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    file.read_into(memoryview(buffer), start, "tensor x")
    return bytes(buffer)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_a_seal_made_while_writing_is_that_of_the_file(tmp_path: Path, size: int) -> None:
    """In pieces of any length; and the checksums are plain xxh3 of the blocks."""
    content = bytes(range(256)) * 2
    content = content[:size]
    (tmp_path / "a").write_bytes(content)
    sealing = Sealing()
    for at in range(0, size, 27):
        sealing.update(memoryview(content)[at : at + 27])
    assert sealing.seal() == FileSeal.of(tmp_path / "a")
    blocks = [xxh3_64_hexdigest(content[at : at + BLOCK]) for at in range(0, size, BLOCK)]
    assert sealing.seal() == FileSeal(size, tuple(blocks))


def test_seals_cover_every_file_and_are_read_again(tmp_path: Path) -> None:
    sealed(tmp_path)
    found = Seals.read(tmp_path)
    assert found is not None and list(found.files) == ["a", "inner/b"]
    assert found == Seals.of(tmp_path)
    found.check_sizes()
    found.check_all()
    assert damage(tmp_path) is None
    assert Seals.read(tmp_path / "inner") is None


def test_the_file_has_the_documented_form(tmp_path: Path) -> None:
    """Others may check with it too: its form is a contract."""
    content = sealed(tmp_path)
    value = json.loads((tmp_path / NAME).read_text())
    assert list(value) == ["format_version", "checksum", "block_bytes", "own", "files"]
    assert (value["checksum"], value["block_bytes"]) == ("xxh3_64", BLOCK)
    blocks = value["files"]["a"]["blocks"]
    assert value["files"]["a"]["bytes"] == 300 and len(blocks) == 5
    assert blocks[4] == xxh3_64_hexdigest(content[256:])


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 299])
def test_one_flipped_bit_is_named_by_file_and_block(tmp_path: Path, place: int) -> None:
    sealed(tmp_path)
    flip(tmp_path / "a", place)
    block = place // BLOCK
    last = min(300, (block + 1) * BLOCK)
    said = rf"/a: block {block} \(bytes {block * BLOCK} to {last}\) differs from what was sealed"
    found = Seals.read(tmp_path)
    assert found is not None
    found.check_sizes()  # says nothing about contents
    with pytest.raises(SealBroken, match=f"{said}; restore it"):
        found.check_all()
    told = damage(tmp_path)
    assert told is not None and told.endswith("differs from what was sealed")
    with pytest.raises(SealBroken, match=said):
        check_beside(tmp_path, "a")
    check_beside(tmp_path, "inner/b")


@pytest.mark.parametrize("change", ["cut", "longer", "gone"])
def test_sizes_are_compared_at_once(tmp_path: Path, change: str) -> None:
    content = sealed(tmp_path)
    if change == "gone":
        (tmp_path / "a").unlink()
    else:
        (tmp_path / "a").write_bytes(content[:-1] if change == "cut" else content + b"x")
    found = Seals.read(tmp_path)
    assert found is not None
    said = "/a: is missing" if change == "gone" else "/a: has (299|301) bytes, 300 were sealed"
    for check in (found.check_sizes, found.check_all):
        with pytest.raises(SealBroken, match=said):
            check()
    if change != "gone":
        with pytest.raises(SealBroken, match=said):
            opened(tmp_path)


def test_no_names_are_no_files(tmp_path: Path) -> None:
    """A checkpoint without small files must not be read whole for them."""
    sealed(tmp_path)
    flip(tmp_path / "a", 0)
    found = Seals.read(tmp_path)
    assert found is not None
    found.check()
    check_beside(tmp_path)


def test_a_file_that_has_come_since_is_not_taken_for_sealed(tmp_path: Path) -> None:
    sealed(tmp_path)
    (tmp_path / "new").write_bytes(b"n")
    with pytest.raises(SealBroken, match="new: was not there when the directory was sealed"):
        check_beside(tmp_path, "new")
    check_beside(tmp_path, "not there")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"bytes": 300', '"bytes": 301'), ('"own": "', '"own": "0'), ('{"format', '{{"format')],
)
def test_seals_that_are_damaged_themselves_say_so(tmp_path: Path, old: str, new: str) -> None:
    sealed(tmp_path)
    text = (tmp_path / NAME).read_text()
    assert old in text
    (tmp_path / NAME).write_text(text.replace(old, new))
    with pytest.raises(SealBroken, match=r"seals\.json: damaged"):
        Seals.read(tmp_path)
    told = damage(tmp_path)
    assert told is not None and "seals.json: damaged" in told


def test_what_ought_to_be_sealed_and_is_not_is_damage(tmp_path: Path) -> None:
    sealed(tmp_path)
    (tmp_path / NAME).unlink()
    assert damage(tmp_path) == f"{tmp_path / NAME}: is missing"
    assert damage(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: is missing"


def test_an_output_inside_its_input_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    inputs = tmp_path / "other", tmp_path / "in"
    for name in ("in", "in/out", "link/a/b", "in/../in/x", "x/../in"):
        with pytest.raises(ValueError, match="^output=.*: lies in .*/in, which it is made from"):
            refuse_inside("output", tmp_path / name, *inputs)
    for name in ("out", "inner", "in/../out", "."):
        refuse_inside("output", tmp_path / name, *inputs)


def scan(file: OpenFile, start: int, stop: int) -> bytes:
    """The same in pieces, each of one block."""
    pieces: list[bytes] = []
    file.scan(start, stop - start, lambda piece: pieces.append(bytes(piece)), "tensor x")
    assert all(0 < len(piece) <= BLOCK for piece in pieces)
    return b"".join(pieces)


READERS = [read, scan]

SPANS = st.tuples(st.integers(0, 300), st.integers(0, 300), st.sampled_from(READERS))


@given(st.lists(SPANS, max_size=12), st.booleans())
def test_any_reads_give_the_bytes_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    reads: list[tuple[int, int, Callable[[OpenFile, int, int], bytes]]],
    with_seals: bool,
) -> None:
    """In any order, across blocks, again, whole or scanned: the plain twin is slicing."""
    directory = tmp_path_factory.mktemp("any")
    content = sealed(directory)
    file = opened(directory) if with_seals else OpenFile(directory / "a")
    for start, stop, reader in reads:
        if start < stop:
            assert reader(file, start, stop) == content[start:stop]
    for reader in READERS:
        with pytest.raises(ValueError, match="a: shard is truncated"):
            reader(file, 250, 301)


def test_going_back_and_forth_between_blocks(tmp_path: Path) -> None:
    """A part of a block that was checked before takes the place of the one that was held."""
    content = sealed(tmp_path)
    file = opened(tmp_path)
    for block in (0, 1, 0, 1, 1, 0, 0):
        start = block * BLOCK + 3
        assert scan(file, start, start + 30) == content[start : start + 30]


@given(st.integers(0, 299), st.integers(0, 299), st.integers(1, 300), st.sampled_from(READERS))
def test_a_damaged_block_is_found_by_whoever_touches_it_and_by_no_other(
    tmp_path_factory: pytest.TempPathFactory,
    place: int,
    start: int,
    count: int,
    reader: Callable[[OpenFile, int, int], bytes],
) -> None:
    directory = tmp_path_factory.mktemp("any")
    content = sealed(directory)
    flip(directory / "a", place)
    stop = min(300, start + count)
    if start // BLOCK <= place // BLOCK <= (stop - 1) // BLOCK:
        said = f"block {place // BLOCK} .*differs from what was sealed, seen in tensor x; restore"
        with pytest.raises(SealBroken, match=said):
            reader(opened(directory), start, stop)
    else:
        assert reader(opened(directory), start, stop) == content[start:stop]


@pytest.mark.parametrize("reader", READERS)
def test_a_stream_reads_no_byte_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reader: Callable[[OpenFile, int, int], bytes],
) -> None:
    """Blocks that reads end within are kept until the next."""
    sealed(tmp_path)
    counted: list[int] = []
    original = OpenFile._read

    def counting(self: OpenFile, buffer: memoryview, offset: int) -> None:
        counted.append(len(buffer))
        original(self, buffer, offset)

    monkeypatch.setattr(OpenFile, "_read", counting)
    file = opened(tmp_path)
    for start in range(0, 300, 50):
        reader(file, start, start + 50)
    assert sum(counted) == 300
    counted.clear()
    assert len(reader(file, 0, 300)) == 300 and sum(counted) <= 300


def test_what_was_held_is_not_mistaken_for_a_damaged_block(tmp_path: Path) -> None:
    """A reader that goes on after an error gets no bytes that nobody vouches for."""
    content = sealed(tmp_path)
    flip(tmp_path / "a", BLOCK)
    file = opened(tmp_path)
    assert read(file, 1, 9) == content[1:9]
    with pytest.raises(SealBroken):
        read(file, BLOCK + 1, BLOCK + 9)
    assert read(file, 1, 9) == content[1:9]
