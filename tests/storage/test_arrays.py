"""Slices of an array on disk are those of numpy, and a damaged one is not read."""

from pathlib import Path

import numpy as np
import pytest

from elastic.storage import seals
from elastic.storage.arrays import StoredArray
from elastic.storage.seals import SealBroken, Seals


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(seals, "BLOCK_BYTES", 256)
    path = tmp_path / "a.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    Seals.of(tmp_path).write()
    return path


def test_slices_are_those_of_numpy(path: Path) -> None:
    stored, whole = StoredArray(path), np.load(path)
    assert (len(stored), stored.dtype, stored.ndim) == (1000, whole.dtype, 1)
    for part in (slice(0, 5), slice(990, 1010), slice(300, 300), slice(7, 3), slice(None)):
        np.testing.assert_array_equal(stored[part], whole[part])
    np.testing.assert_array_equal(np.asarray(stored), whole)


def test_a_flipped_bit_is_found_where_it_is_read(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[128 + 2 * 500] ^= 4
    path.write_bytes(content)
    stored = StoredArray(path)
    assert list(stored[10:12]) == [10, 11]
    with pytest.raises(SealBroken, match=r"a.npy: block 4 .* seen in entries 490 to 510"):
        stored[490:510]


def test_a_flipped_bit_of_the_header_is_found_at_once(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"<u2", b"<i2"))
    with pytest.raises(SealBroken, match="block 0 .* seen in the header"):
        StoredArray(path)


@pytest.mark.parametrize("change", ["cut", "matrix", "objects", "empty", "text"])
def test_what_is_no_array_of_one_dimension_is_refused(path: Path, change: str) -> None:
    """Where nothing was sealed too."""
    (path.parent / seals.NAME).unlink()
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "matrix":
        np.save(path, np.zeros((2, 3), np.uint16))
    elif change == "objects":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(b"" if change == "empty" else b"no array")
    with pytest.raises(ValueError, match=r"a.npy: (not an array, or cut|must be a .npy file of)"):
        StoredArray(path)
