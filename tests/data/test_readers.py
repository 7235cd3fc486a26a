"""Every record that can be read is read, and every other one is named; in parts as in one go."""

import bz2
import gzip
import json
import lzma
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from elastic.config import ConfigError
from elastic.data.bad import KINDS as BAD_KINDS
from elastic.data.bad import BadRecord
from elastic.data.readers import KINDS, Record, Unit, kind_of, records, units


def read(
    path: Path, *columns: str, size: int = 1 << 30, **options: Any
) -> list[tuple[int, Record]]:
    """All records of a file with their numbers in it."""
    return [
        (unit.line_of(number), value)
        for unit in units(path, size)
        for number, value in records(unit, columns or ("text",), **options)
    ]


def kind(value: Record) -> str:
    assert isinstance(value, BadRecord)
    assert "\n" not in str(value)
    return value.kind


def zstd(data: bytes) -> bytes:
    """Two frames, as several processes write them."""
    frames = []
    for part in (data[: len(data) // 2], data[len(data) // 2 :]):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(part)
        frames.append(sink.getvalue().to_pybytes())
    return b"".join(frames)


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def lines(count: int = 20) -> list[bytes]:
    """Of different lengths, with blank ones among them."""
    made = [json.dumps({"text": "é" * (i % 7) + str(i), "other": i}).encode() for i in range(count)]
    return [b"" if i % 6 == 5 else line for i, line in enumerate(made)]


def values(count: int = 20) -> list[tuple[int, Record]]:
    return [(i + 1, {"text": "é" * (i % 7) + str(i)}) for i in range(count) if i % 6 != 5]


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("last", [b"\n", b""], ids=["ended", "open"])
def test_lines_are_read(tmp_path: Path, compression: str, last: bytes) -> None:
    path = tmp_path / f"a.b.jsonl{compression}"
    path.write_bytes(COMPRESSED[compression](b"\n".join(lines()) + last))
    assert read(path) == values()


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_is_one_document(tmp_path: Path, suffix: str, compression: str) -> None:
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(COMPRESSED[compression]("\ufeffüber\r\n\nzwei\n".encode()))
    assert read(path) == [(1, "über\r\n\nzwei\n")]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_units_of_any_size_have_every_line_once(tmp_path: Path, ending: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ending.join(lines()))
    size = path.stat().st_size
    for wanted in range(1, size + 2):
        found = units(path, wanted)
        assert found[0].begin == 0 and found[-1].end == size
        assert all(a.end == b.begin for a, b in zip(found, found[1:], strict=False))
        assert all(u.end - u.begin >= wanted for u in found[:-1])
        assert read(path, size=wanted) == values()
    assert len(units(path, 1)) == 20


def test_an_empty_file_of_lines_has_no_units_and_an_empty_text_is_a_text(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).touch()
    assert units(tmp_path / "a.jsonl", 10) == []
    assert read(tmp_path / "a.txt") == [(1, "")]


WRONG = {
    b'{"text": "a"': "not_json",
    b"text": "not_json",
    b'{"text": NaN}': "not_json",
    b'{"text": "a", "x": -Infinity}': "not_json",
    b'{"text": "a"} {"text": "b"}': "not_json",
    b'{"x": ' + b"9" * 5000 + b"}": "not_json",
    b'{"text": "a\tb"}': "not_json",
    b"[" * 100_000: "not_json",
    b'{"text": "\xff"}': "not_utf8",
    b'{"text": "a\xc3': "not_utf8",
    b"\xff\xfe{\x00}\x00": "not_utf8",
    b'{"text": "\\ud800"}': "not_utf8",
    b'{"text": [{"\\udfff": 1}]}': "not_utf8",
    b'"text"': "not_object",
    b'[{"text": "a"}]': "not_object",
    b"null": "not_object",
    b"{}": "missing_field",
    b'{"Text": "a"}': "missing_field",
    b'{"text": null}': "missing_field",
    b'{"text": "' + b"a" * 101 + b'"}': "too_long",
    b'{"text": "a", "x": "' + b"b" * 10_000_000 + b'"}': "too_long",
}


@pytest.mark.parametrize("line", WRONG, ids=lambda line: line[:20].decode("latin-1"))
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "' + "é".encode() * 80 + b'"}'
    path.write_bytes(b"\n".join([good, line, b"\xef\xbb\xbf" + good, line]))
    limit = 100 if WRONG[line] == "too_long" else 200_000
    for size in (1, 1 << 30):
        found = read(path, size=size, max_characters=limit)
        assert [number for number, _ in found] == [1, 2, 3, 4]
        assert found[0][1] == found[2][1] == {"text": "é" * 80}
        assert kind(found[1][1]) == kind(found[3][1]) == WRONG[line]


def test_only_what_is_asked_for_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "b": [2], "c": null, "d": "\\ud800"}\n')
    assert read(path, "a", "b", optional=("c", "e")) == [(1, {"a": 1, "b": [2]})]


def test_a_bad_record_survives_the_way_between_processes() -> None:
    bad = BadRecord("not_json", "the line\nis not")
    again = pickle.loads(pickle.dumps(bad))
    assert str(again) == str(bad) == "not_json: the line\\nis not" and again.kind == "not_json"
    assert all("\n" not in said for said in BAD_KINDS.values())


def tables(directory: Path, table: pyarrow.Table, rows: int = 4) -> list[Path]:
    """The same table as Parquet, Arrow file and Arrow stream."""
    paths = [directory / name for name in ("a.parquet", "file.arrow", "stream.arrow")]
    pyarrow.parquet.write_table(table, paths[0], row_group_size=rows)
    makers = {paths[1]: pyarrow.ipc.new_file, paths[2]: pyarrow.ipc.new_stream}
    for path, maker in makers.items():
        with maker(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return paths


TABLE = pyarrow.table(
    {
        "other": pyarrow.array(range(9), pyarrow.timestamp("s")),
        "text": pyarrow.array([f"ü{i}" if i != 5 else None for i in range(9)]),
        "n": pyarrow.array([{"a": i, "b": None if i % 2 else "x"} for i in range(9)]),
    }
)


def test_rows_are_read(tmp_path: Path) -> None:
    for path in tables(tmp_path, TABLE):
        found = read(path, "text", optional=("n", "absent"))
        assert [number for number, _ in found] == list(range(1, 10))
        assert found[0][1] == {"text": "ü0", "n": {"a": 0, "b": "x"}}
        assert found[1][1] == {"text": "ü1", "n": {"a": 1}}
        assert kind(found[5][1]) == "missing_field"


def test_units_of_parquet_are_row_groups(tmp_path: Path) -> None:
    path = tables(tmp_path, TABLE)[0]
    assert [unit.groups for unit in units(path, 1)] == [(0, 1), (1, 2), (2, 3)]
    assert [unit.groups for unit in units(path, 1 << 30)] == [(0, 3)]
    assert [u.line_of(1) for u in units(path, 1)] == [1, 5, 9]
    assert read(path, "n", size=1) == read(path, "n")


def test_types_of_text_are_text_and_of_other_columns_do_not_matter(tmp_path: Path) -> None:
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string"))
    for index, arrow_type in enumerate(kinds):
        (tmp_path / str(index)).mkdir()
        text = pyarrow.array(["a", "b", "a"], pyarrow.string()).cast(arrow_type)
        other = pyarrow.array([1, 2, 3] if index else ["x", "y", "z"])
        for path in tables(tmp_path / str(index), pyarrow.table({"text": text, "x": other})):
            assert [value for _, value in read(path)] == [{"text": t} for t in "aba"]


def test_a_table_without_the_column_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    for path in tables(tmp_path, TABLE):
        with pytest.raises(ConfigError, match=f"^{path}: .* column x; .* of other, text, n$"):
            read(path, "x")


def test_rows_that_are_too_long_or_not_unicode_are_named(tmp_path: Path) -> None:
    binary = pyarrow.array([b"a" * 11, b"\xff", b"good"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    for path in tables(tmp_path, pyarrow.table({"text": text})):
        found = [value for _, value in read(path, max_characters=10)]
        assert [kind(value) for value in found[:2]] == ["too_long", "not_utf8"]
        assert found[2] == {"text": "good"}


def test_a_time_that_python_has_not_is_named(tmp_path: Path) -> None:
    far = pyarrow.table({"text": pyarrow.array([1 << 62, 0], pyarrow.timestamp("us"))})
    for path in tables(tmp_path, far):
        assert kind(read(path)[0][1]) == "wrong_type" and read(path)[1][0] == 2


def test_bad_texts_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    assert kind(read(tmp_path / "a.txt")[0][1]) == "not_utf8"
    for length, limit in ((11, 10), (10_000, 10)):
        (tmp_path / "a.txt").write_text("é" * length)
        assert kind(read(tmp_path / "a.txt", max_characters=limit)[0][1]) == "too_long"
    (tmp_path / "a.txt").write_text("\ufeff" + "é" * 10)
    assert read(tmp_path / "a.txt", max_characters=10) == [(1, "é" * 10)]


@pytest.mark.parametrize("suffix", [s for s in KINDS if kind_of(Path("a" + s)).compression])
def test_a_truncated_compressed_file_is_an_error_of_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    data = COMPRESSED["." + suffix.rpartition(".")[2]](
        random.Random(0).randbytes(9999).hex().encode()
    )
    for broken in (data[:-9], b"no such thing" * 9):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=rf"^{path}: cannot be read \(.+\); must be") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", range(3))
def test_a_damaged_table_is_an_error_of_one_line(tmp_path: Path, index: int) -> None:
    path = tables(tmp_path, TABLE)[index]
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], b"no table" * 99, b""):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=rf"^{path}: cannot be read \(.+\); must be") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_what_is_missing_or_of_no_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.jsonl: cannot be read \(No such file"):
        units(tmp_path / "a.jsonl", 10)
    for name in ("a.csv", "a", "a.parquet.gz", "a.gz"):
        with pytest.raises(ConfigError, match=r"must be one of .*\.jsonl\.gz"):
            units(tmp_path / name, 10)


def test_a_units_key_is_its_bytes(tmp_path: Path) -> None:
    """A change elsewhere in the file leaves it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}\n')
    first, second = [unit.key() for unit in units(path, 10)]
    assert first != second
    path.write_bytes(b'{"text": "a"}\n{"text": "c"}\n')
    assert units(path, 10)[0].key() == first and units(path, 10)[1].key() != second
    copy = tmp_path / "b.jsonl"
    copy.write_bytes(b'{"text": "a"}\n')
    assert [unit.key() for unit in units(copy, 10)] == [first]


def test_a_parquet_units_key_is_its_rows_and_types(tmp_path: Path) -> None:
    path = tables(tmp_path, TABLE)[0]
    keys = [unit.key() for unit in units(path, 1)]
    assert len(set(keys)) == 3
    pyarrow.parquet.write_table(TABLE.slice(0, 5), path, row_group_size=4)
    assert units(path, 1)[0].key() == keys[0] and units(path, 1)[1].key() not in keys
    pyarrow.parquet.write_table(TABLE.rename_columns(["o", "text", "n"]), path, row_group_size=4)
    assert units(path, 1)[0].key() != keys[0]


def test_a_place_is_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines()))
    last = pickle.loads(pickle.dumps(units(path, 1)[-1]))
    assert last.place(1) == f"{path}, line 20" and isinstance(last, Unit)
    table = tables(tmp_path, TABLE)
    assert units(table[0], 1)[1].place(2) == f"{table[0]}, row 6"
    assert units(table[1], 1)[0].place(2) == f"{table[1]}, row 2"
    (tmp_path / "a.txt").touch()
    assert units(tmp_path / "a.txt", 1)[0].place(1) == str(tmp_path / "a.txt")


def broken(rng: random.Random, number: int) -> bytes:
    """A good line with something done to it; no line ends."""
    line = bytearray(json.dumps({"text": f"<{number}> äß", "x": [None, {"y": 1.5}]}).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(line) + 1)
        action = rng.randrange(4)
        if action == 0:
            del line[at : at + rng.randint(1, 9)]
        elif action == 1:
            line[at:at] = rng.choice(
                [b"{", b"}", b'"', b"\\u", b"\\ud83d", b"NaN", b"\x00", b"\xc3"]
            )
        elif action == 2:
            line[at:at] = rng.randbytes(rng.randint(1, 5))
        else:
            line[at:] = b"[" * rng.choice([1, 3000])
    return bytes(line.replace(b"\n", b""))


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_good_record_is_lost_among_broken_ones(tmp_path: Path, count: int) -> None:
    rng = random.Random(0)
    good: dict[int, str] = {}
    found: list[bytes] = []
    for number in range(1, 2 * count + 1):
        if number % 2:
            found.append(broken(rng, number))
        else:
            good[number] = f"good {number}"
            found.append(json.dumps({"text": good[number]}).encode())
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(found))
    bad = 0
    for size in (4000, 1 << 30):
        seen = dict(read(path, size=size))
        assert {n: seen[n] for n in good} == {n: {"text": text} for n, text in good.items()}
        wrong = [value for value in seen.values() if isinstance(value, BadRecord)]
        assert all(len(str(value).splitlines()) == 1 for value in wrong)
        bad = len(wrong)
    assert bad > count / 2
