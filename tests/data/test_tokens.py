"""Tokens on disk: what was written is read, whichever parts it lies in, and damage is named."""

import pickle
import tempfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from helpers.stores import Document, flip, numbered, parts_of, store_of, write_part
from hypothesis import given

from elastic.data import tokens
from elastic.data.tokens import PartSummary, PartWriter, read_summary, token_type, total
from elastic.storage.seals import SealBroken


@given(parts_of())
def test_what_was_written_is_read(parts: list[list[Document]]) -> None:
    """Every document by its number: ids, targets, place and back."""
    with tempfile.TemporaryDirectory() as directory:
        store = store_of(Path(directory), parts)
        documents = list(chain(*parts))
        assert store.documents == store.groups == len(documents)
        assert store.tokens == sum(map(len, documents))
        starts, lengths = store.places(np.arange(len(documents)))
        assert lengths.tolist() == [len(each) for each in documents]
        for start, each in zip(starts.tolist(), documents, strict=True):
            ids, targets = store.read(start, len(each))
            assert ids.dtype == np.int64 and tuple(ids) == each.ids
            assert each.targets == (tuple(targets) if targets is not None else (True,) * len(each))
        numbers = np.repeat(np.arange(len(documents)), lengths)
        assert (store.document_of(np.arange(store.tokens)) == numbers).all()
        wanted = [sum(each.targets[1:]) for each in documents]
        assert store.targets(starts, lengths).tolist() == wanted
        some = np.arange(len(documents))[1::2]
        assert [part.tolist() for part in store.places(some)] == [
            starts[some].tolist(),
            lengths[some].tolist(),
        ]


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(1 << 15, np.uint16), ((1 << 15) + 1, np.uint32), (1 << 17, np.uint32)],
)
@pytest.mark.parametrize("marked", [False, True])
def test_the_largest_id_is_no_mark(
    tmp_path: Path, vocabulary: int, dtype: type, marked: bool
) -> None:
    """An id and the bit that it is no target never mix, at the border of a type and beyond."""
    ids = (0, vocabulary - 1, vocabulary - 2, vocabulary - 1)
    targets = (False, True, False, False) if marked else (True,) * 4
    store = store_of(tmp_path, [[Document(ids, targets)]], vocabulary)
    assert token_type(vocabulary) == dtype
    found, which = store.read(0, 4)
    assert tuple(found) == ids
    assert (which is None) != marked
    assert store.targets(np.array([0]), np.array([4])).tolist() == [1 if marked else 3]
    if which is not None:
        assert tuple(which) == targets


def test_turns_of_a_record_are_one_group(tmp_path: Path) -> None:
    """Over the borders of parts too."""
    first = [Document((1, 2), (True, True), new) for new in (True, False, True)]
    second = [Document((3,), (True,), new) for new in (True, False)]
    store = store_of(tmp_path, [first, second])
    assert store.documents == 5 and store.groups == 3
    assert [store.group_numbers(part).tolist() for part in (0, 1)] == [[0, 0, 1], [2, 2]]


@pytest.mark.parametrize("name", ["ends.npy", "groups.npy", "part.json", "seals.json"])
def test_a_part_whose_small_files_differ_is_none(tmp_path: Path, name: str) -> None:
    write_part(tmp_path / "part", numbered([3, 4]), 100)
    assert read_summary(tmp_path / "part") is not None
    flip(tmp_path / "part" / name, -3)
    assert read_summary(tmp_path / "part") is None


def test_a_part_that_is_cut_or_gone_is_none(tmp_path: Path) -> None:
    assert read_summary(tmp_path / "part") is None
    write_part(tmp_path / "part", numbered([3, 4]), 100)
    path = tmp_path / "part" / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-2])
    assert read_summary(tmp_path / "part") is None


def test_a_flipped_token_is_named_as_it_is_read(tmp_path: Path) -> None:
    store = store_of(tmp_path, [numbered([3, 4])])
    flip(tmp_path / "part-0" / "tokens.npy")
    with pytest.raises(SealBroken, match=r"tokens\.npy: block 0 .* differs from what was sealed"):
        store.read(0, 3)


def test_the_digest_follows_tokens_marks_and_borders(tmp_path: Path) -> None:
    """And nothing else: neither names of directories nor when they were written."""
    plain = [Document((1, 2, 3), (True,) * 3), Document((4,), (True,))]
    others = [
        [Document((1, 2, 9), (True,) * 3), plain[1]],
        [Document((1, 2, 3), (True, True, False)), plain[1]],
        [Document((1, 2), (True,) * 2), Document((3, 4), (True,) * 2)],
        [plain[0], Document((4,), (True,), new=False)],
    ]
    digests = [
        store_of(tmp_path / str(n), [each]).digest for n, each in enumerate([plain, *others])
    ]
    assert len(set(digests)) == 5
    assert store_of(tmp_path / "again", [plain]).digest == digests[0]


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part(tmp_path / "part", numbered([3]), 100)
    save = np.save

    def fail(file: Path, *args: object, **options: object) -> None:
        if file.name == "ends.npy":
            raise OSError("disk full")
        save(file, *args, **options)

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_part(tmp_path / "part", numbered([9]), 100)
    summary = read_summary(tmp_path / "part")
    assert summary is not None and summary.tokens == 3
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_part_may_be_empty(tmp_path: Path) -> None:
    store = store_of(tmp_path, [[], numbered([2]), []])
    assert store.read(0, 2)[0].tolist() == [0, 1]
    assert store.ends(0).tolist() == store.ends(2).tolist() == []
    empty = np.empty(0, np.int64)
    assert [len(found) for found in store.places(empty)] == [0, 0]
    assert PartWriter(token_type(100)).groups == 0


def test_another_process_opens_files_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more at a time than are allowed."""
    monkeypatch.setattr(tokens, "OPEN_PARTS", 2)
    store = store_of(tmp_path, [numbered([2], first) for first in (0, 2, 4, 6)])
    for start in (0, 2, 4, 6, 0, 2):
        assert store.read(start, 2)[0].tolist() == [start, start + 1]
        assert len(store._open) <= 2
    copied = pickle.loads(pickle.dumps(store))
    assert not copied._open and copied.read(6, 2)[0].tolist() == [6, 7]
    assert copied.digest == store.digest


def test_a_source_is_the_sum_of_its_parts() -> None:
    one = PartSummary(1, 2, 3, 4, 5, 6, 7, {"not_json": 1}, {"not_json": "a, line 1"})
    two = PartSummary(10, 20, 30, 40, 50, 60, 70, {"not_json": 2, "too_long": 3},
                      {"not_json": "b, line 2", "too_long": "b, line 3"})  # fmt: skip
    assert total([one, two]) == PartSummary(
        11, 22, 33, 44, 55, 66, 77,
        {"not_json": 3, "too_long": 3}, {"not_json": "a, line 1", "too_long": "b, line 3"},
    )  # fmt: skip
