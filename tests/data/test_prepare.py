"""Text is prepared once: what is there is found again, and only while it fits and is whole."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.stores import flip
from helpers.texts import documents_of, json_lines, numbered_texts, source, text_config, write

from elastic.config import ConfigError, DataConfig, SourceConfig
from elastic.data import known, prepare, sources
from elastic.data import make as making
from elastic.data.prepare import open_prepared, prepare_data
from elastic.data.prepared import PreparedData
from elastic.data.tokenizer import train_tokenizer
from elastic.data.tokens import total


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    for i in range(5):
        write(tmp_path / f"{i}.txt", f"document number {i}\n" * 20)
    return text_config(tmp_path / "*.txt")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("read the text again")

    monkeypatch.setattr(prepare, "make", fail)


def assert_same(one: PreparedData, other: PreparedData) -> None:
    assert one.digest == other.digest and one.fingerprint == other.fingerprint
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    for name in one.stores:
        assert documents_of(one, name) == documents_of(other, name)


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# Found again


def test_preparing_is_a_function_of_text_and_settings(config: DataConfig, tmp_path: Path) -> None:
    one, two = (prepare_data(config, tmp_path / name, None) for name in ("one", "two"))
    assert_same(one, two)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert documents_of(one) == [f"document number {i}\n" * 20 for i in range(5)]
    names = sorted(path.name for path in (tmp_path / "one" / "data").iterdir())
    assert names == ["data.json", "parts", "seals.json", "text.json", "tokenizer"]


def test_what_was_prepared_is_used_again(
    config: DataConfig, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of the run say nothing about the tokens."""
    prepared = prepare_data(config, run, None)
    before = contents(run)
    forbid_work(monkeypatch)
    other = replace(config, validation_sequences=5, loader_workers=3, workers=1, on_error="skip")
    assert_same(prepared, prepare_data(other, run, None))
    assert_same(prepared, prepare_data(config, run, None, prepared.digest))
    weighted = replace(config, sources={"a": replace(config.sources["a"], weight=0.5)})
    assert_same(prepared, prepare_data(weighted, run, None))
    assert contents(run) == before


def test_several_runs_share_a_directory(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, prepared=str(tmp_path / "shared"))
    one = prepare_data(config, tmp_path / "one", None)
    assert not (tmp_path / "one").exists()
    forbid_work(monkeypatch)
    assert_same(one, prepare_data(config, tmp_path / "two", None))
    assert_same(one, open_prepared(config, tmp_path / "three"))


def test_two_runs_may_prepare_the_same_text_at_once(tmp_path: Path) -> None:
    numbered_texts(tmp_path / "x.jsonl", 200)
    config = text_config(tmp_path / "*.jsonl", prepared=str(tmp_path / "shared"))
    alone = prepare_data(replace(config, prepared=None), tmp_path / "alone", None)
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            made = pool.map(lambda n: prepare_data(config, tmp_path / str(n), None), range(3))
            for each in made:
                assert_same(alone, each)
        shutil.rmtree(tmp_path / "shared")


@pytest.mark.parametrize("change", ["settings", "text", "lost file", "broken json"])
def test_what_no_longer_fits_is_made_again(config: DataConfig, run: Path, change: str) -> None:
    old = prepare_data(config, run, None)
    if change == "settings":
        config = replace(config, tokenizer_vocab=262)
    elif change == "text":
        write(run.parent / "2.txt", "other words")
    elif change == "lost file":
        (old.stores["a"].directories[0] / "ends.npy").unlink()
    else:
        write(run / "data" / "data.json", "{")
    new = prepare_data(config, run, None)
    assert (new.fingerprint != old.fingerprint) == (change in ("settings", "text"))
    assert (new.digest != old.digest) == (change == "text")
    assert_same(new, open_prepared(config, run))


def test_work_that_is_cut_short_vouches_for_nothing(
    config: DataConfig, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old settings beside new tokens would be believed by a run with the old settings."""
    old = prepare_data(config, run, None)
    write_json = making.write_json

    def full(path: Path, *args: object) -> None:
        if path.name == "data.json":
            raise OSError("disk full")
        write_json(path, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_json", full)
        with pytest.raises(OSError, match="disk full"):
            prepare_data(replace(config, tokenizer_vocab=280), run, None)
    with pytest.raises(ConfigError, match=r"data/seals\.json: is missing; run the command that"):
        open_prepared(config, run)
    assert_same(old, prepare_data(config, run, None))


# In pieces


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A source of many parts, and one of a few."""
    monkeypatch.setattr(sources, "PART_BYTES", 2000)
    monkeypatch.setattr(sources, "LEAST_PART_BYTES", 100)
    numbered_texts(tmp_path / "many" / "x.jsonl", 300)
    numbered_texts(tmp_path / "few" / "x.jsonl", 40, first=1000)
    return text_config(tmp_path / "many" / "*", tmp_path / "few" / "*")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_preparing_goes_on_where_it_was_stopped(
    error: Any, many: DataConfig, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made is kept, and the end is that of one that was not stopped."""
    whole = prepare_data(many, run.parent / "other", None)
    count = {name: len(store.directories) for name, store in whole.stores.items()}
    assert count["a"] > 8 and count["b"] > 1
    make, made = making.make_part, 0

    def stopped(*arguments: Any) -> Any:
        nonlocal made
        if made == 5:
            raise error
        made += 1
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(making, "make_part", stopped)
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            prepare_data(many, run, None)
    kept = {path: path.stat().st_mtime_ns for path in (run / "data" / "parts").iterdir()}
    assert len(kept) == 5
    with pytest.raises(ConfigError, match="run the command that made the run again"):
        open_prepared(many, run)
    assert_same(whole, prepare_data(many, run, None))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((run / "data" / "parts").iterdir())) == sum(count.values())


def test_more_text_is_added_to_what_was_prepared(many: DataConfig, run: Path) -> None:
    """With a tokenizer that was there, only the files that are new are tokenised."""
    train_tokenizer(["document word"], 280).save_pretrained(run.parent / "tokenizer")
    many = replace(many, tokenizer=str(run.parent / "tokenizer"))
    before = prepare_data(many, run, None)
    kept = {path: path.stat().st_mtime_ns for path in (run / "data" / "parts").iterdir()}
    numbered_texts(run.parent / "many" / "y.jsonl", 30, first=2000)
    after = prepare_data(many, run, None)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert after.digest != before.digest
    assert documents_of(after)[:300] == documents_of(before)


def test_several_processes_make_what_one_does(
    many: DataConfig, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And say what one says of the records that they leave out."""
    lines = (run.parent / "few" / "x.jsonl").read_text().splitlines()
    write(run.parent / "few" / "x.jsonl", "\n".join([*lines[:30], "[]", *lines[31:]]))
    many = replace(many, on_error="skip", max_skip_fraction=0.1)
    alone = prepare_data(replace(many, workers=1), run, None)
    monkeypatch.setattr(making, "INLINE_BYTES", 0)
    together = prepare_data(replace(many, workers=2), run.parent / "other", None)
    assert_same(alone, together)
    (said,) = total(together.stores["b"].summaries).first_skipped.values()
    assert said.endswith("few/x.jsonl, line 31: the line is a list, no object")
    assert together.stores["b"].summaries == alone.stores["b"].summaries


@pytest.mark.parametrize("wanted", [300, 1500])
def test_of_a_part_of_the_text_parts_from_all_over_are_taken(
    many: DataConfig, run: Path, wanted: int
) -> None:
    """About so many tokens, wherever the files lie; the other source is whole."""
    train_tokenizer(["document word"], 280).save_pretrained(run.parent / "tokenizer")
    many = replace(many, tokenizer=str(run.parent / "tokenizer"))
    whole = prepare_data(many, run, None)
    limited = replace(many.sources["a"], target_tokens=wanted)
    few = replace(many, sources=many.sources | {"a": limited})
    part = prepare_data(few, run.parent / "other", None)
    assert wanted <= part.stores["a"].tokens < wanted + 200 < whole.stores["a"].tokens
    assert documents_of(part, "b") == documents_of(whole, "b")
    texts, found = documents_of(whole), documents_of(part)
    places = [texts.index(text) for text in found]
    assert places == sorted(places) and max(places) - min(places) > len(texts) / 3
    shutil.copytree(run.parent / "many", run.parent / "elsewhere")
    moved = replace(limited, path=str(run.parent / "elsewhere" / "*"))
    again = prepare_data(replace(few, sources=few.sources | {"a": moved}), run.parent / "3", None)
    assert again.digest == part.digest
    all_of_it = replace(limited, target_tokens=10**9)
    again = prepare_data(replace(few, sources=few.sources | {"a": all_of_it}), run, None)
    assert again.digest == whole.digest


# Where a run waits


def test_much_text_is_not_prepared_by_a_run(many: DataConfig, run: Path) -> None:
    """It says how it is, before anything is read or written; what was prepared is taken."""
    many = replace(many, prepare_inline_tokens=2000)
    with pytest.raises(ConfigError) as error:
        prepare_data(many, run, None)
    line = str(error.value)
    assert line.startswith("data.prepare_inline_tokens=2000: about ") and "\n" not in line
    assert "run elastic prepare with the settings of this run" in line
    assert not run.exists()
    made = prepare_data(many, run, None, inline=False)
    assert_same(made, prepare_data(many, run, None))


def test_a_little_of_much_text_is_prepared_by_a_run(many: DataConfig, run: Path) -> None:
    """What counts are the tokens that are wanted of a source, not those that it has."""
    many = replace(many, prepare_inline_tokens=2500)
    limited = replace(many.sources["a"], target_tokens=300)
    data = prepare_data(replace(many, sources=many.sources | {"a": limited}), run, None)
    assert data.stores["a"].tokens < 2000


def test_text_that_is_longer_than_it_looked_stops_too(many: DataConfig, run: Path) -> None:
    """Tokens of a byte each are four times as many as were expected."""
    many = replace(many, prepare_inline_tokens=20_000, tokenizer=str(run.parent / "bytes"))
    train_tokenizer([], 259).save_pretrained(run.parent / "bytes")
    size = sum(path.stat().st_size for path in run.parent.glob("*/*.jsonl"))
    assert size // 4 < 20_000 < size - 3000
    with pytest.raises(ConfigError, match=r"^data\.prepare_inline_tokens=20000: about 2\d,\d{3} "):
        prepare_data(many, run, None)
    assert prepare_data(many, run, None, inline=False).stores["a"].tokens > 15_000


def test_a_sequence_longer_than_all_text_is_refused_at_once(config: DataConfig, run: Path) -> None:
    prepare_data(config, run.parent / "other", None, lengths={"a.b": 1800})
    with pytest.raises(
        ConfigError, match=r"^a\.b=1806: a sequence longer than all the text, of 1,"
    ):
        prepare_data(config, run, None, lengths={"a.b": 1806})
    assert not run.exists()


# The tokenizer


def test_a_tokenizer_can_come_from_the_parent_or_a_path(config: DataConfig, run: Path) -> None:
    parent = run.parent / "parent"
    train_tokenizer(["other text altogether"], 265).save_pretrained(parent)
    by_parent = prepare_data(replace(config, tokenizer="parent"), run, str(parent))
    by_path = prepare_data(replace(config, tokenizer=str(parent)), run.parent / "two", None)
    assert len(by_parent.tokenizer) == len(by_path.tokenizer) == 265
    assert by_parent.digest == by_path.digest
    train_tokenizer(["and now this"], 265).save_pretrained(parent)
    changed = prepare_data(replace(config, tokenizer="parent"), run, str(parent))
    assert changed.fingerprint != by_parent.fingerprint
    train_tokenizer(["and now that"], 265).save_pretrained(parent)
    with pytest.raises(ConfigError, match=r"^data\.tokenizer=parent: its files have changed, and"):
        prepare_data(replace(config, tokenizer="parent"), run, str(parent), changed.digest)


@pytest.mark.parametrize("parent", [None, "nowhere"])
def test_a_parent_without_a_tokenizer_is_refused(
    config: DataConfig, run: Path, parent: str | None
) -> None:
    path = parent and str(run.parent / parent)
    with pytest.raises(ConfigError, match=r"parent\.path"):
        prepare_data(replace(config, tokenizer="parent"), run, path)


def test_a_tokenizer_without_an_end_is_refused(config: DataConfig, run: Path) -> None:
    tokenizer = train_tokenizer(["a"], 260)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(run.parent / "endless")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: the tokenizer has no end-of-text"):
        prepare_data(replace(config, tokenizer=str(run.parent / "endless")), run, None)


def test_a_tokenizer_is_made_for_the_training_text_of_all_sources(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one alone has more than it is trained on; and not for what is held out."""
    monkeypatch.setattr(making, "TRAINING_CHARACTERS", 400)
    words = ["aaaa", "bbbb"]
    for word in words:
        texts = [word * 20 if n % 2 == 0 else "zzzz" * 20 for n in range(40)]
        json_lines(tmp_path / f"{word}.jsonl", *({"text": text} for text in texts))
    config = text_config(*(tmp_path / f"{word}.jsonl" for word in words))
    vocabulary = prepare_data(config, run, None).tokenizer.get_vocab()
    assert "aa" in vocabulary and "bb" in vocabulary and "zz" not in vocabulary


def test_a_record_that_the_template_refuses_is_one_that_cannot_be_read(
    tmp_path: Path, run: Path
) -> None:
    """Though the tokenizer is made for the text: it is named, or left out and counted."""
    template = "{{ raise_exception('not this') if messages[0].content == 'bad' }}"
    write(tmp_path / "t.jinja", template + "{% for m in messages %}"
          "{{ '<|start|>' + m.role + ' ' + m.content + '<|end|>' }}{% endfor %}")  # fmt: skip
    for number in range(20):
        asked = "bad" if number == 12 else f"what is {number}"
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": "so much"}]
        json_lines(tmp_path / f"{number:02d}.jsonl", {"talk": said})
    config = text_config(
        source(tmp_path / "*.jsonl", messages="talk"), chat_template=str(tmp_path / "t.jinja")
    )
    with pytest.raises(ConfigError, match=r"^data\.sources\.a: .*/12\.jsonl, line 1: .*not this"):
        prepare_data(config, run, None)
    data = prepare_data(replace(config, on_error="skip", max_skip_fraction=0.1), run, None)
    assert data.stores["a"].groups == 19


# Damage


FILES = {
    "tokens.npy": "parts/*/tokens.npy",
    "ends.npy": "parts/*/ends.npy",
    "groups.npy": "parts/*/groups.npy",
    "part.json": "parts/*/part.json",
    "part's seals": "parts/*/seals.json",
    "tokenizer.json": "tokenizer/tokenizer.json",
    "data.json": "data.json",
    "text.json": "text.json",
    "seals.json": "seals.json",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["bit", "cut", "gone"])
def test_what_is_damaged_is_made_again_to_the_same_bytes(
    config: DataConfig, run: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Once: the next start reads it. Who may not make it refuses it."""
    digest = prepare_data(config, run, None).digest
    whole = contents(run)
    (path,) = (run / "data").glob(FILES[name])
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        flip(path, -5)
    with pytest.raises(ConfigError, match="; run the command that made the run again, which"):
        open_prepared(config, run)
    made = prepare_data(config, run, None, digest)
    assert contents(run) == whole
    forbid_work(monkeypatch)
    assert_same(made, prepare_data(config, run, None, digest))
    assert_same(made, open_prepared(config, run))


def test_much_text_is_compared_with_its_seals_as_it_is_read(
    config: DataConfig, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_data(config, run, None)
    (path,) = (run / "data").glob(FILES["tokens.npy"])
    flip(path, -5)
    monkeypatch.setattr(prepare, "THOROUGH_BYTES", 0)
    data = open_prepared(config, run)
    with pytest.raises(ValueError, match=r"tokens\.npy: block 0 .* differs from what was sealed"):
        documents_of(data)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "appended": (lambda d: write(d / "0.txt", "x" * 364), "0.txt has 364 bytes, it had 360"),
    "edited": (
        lambda d: write(d / "0.txt", "Document number 0\n" + "document number 0\n" * 19),
        "0.txt has other contents than it",
    ),
    "removed": (lambda d: (d / "3.txt").unlink(), "3.txt is gone"),
    "added": (lambda d: write(d / "5.txt", "new"), "5.txt has been added"),
    "renamed": (lambda d: (d / "0.txt").rename(d / "9.txt"), "0.txt is gone"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_no_model_goes_on_with_other_text(config: DataConfig, run: Path, kind: str) -> None:
    """What changed is named, and nothing is written; before any training it is read anew."""
    first = prepare_data(config, run, None)
    change, said = CHANGES[kind]
    change(run.parent)
    before = contents(run)
    message = rf"^data\.sources\.a\.path: .*/{said}.*, and the run in .*/run has trained on the "
    with pytest.raises(ConfigError, match=message + "text as it was; restore that, or choose"):
        prepare_data(config, run, None, first.digest)
    assert contents(run) == before
    assert prepare_data(config, run, None).digest != first.digest
    assert open_prepared(config, run).digest != first.digest


@pytest.mark.parametrize("lost", ["all", "data.json", "text.json"])
def test_other_text_is_found_out_by_its_tokens_where_nothing_else_tells(
    config: DataConfig, run: Path, lost: str
) -> None:
    digest = prepare_data(config, run, None).digest
    data = run / "data"
    shutil.rmtree(data) if lost == "all" else (data / lost).unlink()
    assert prepare_data(config, run, None, digest).digest == digest
    shutil.rmtree(data) if lost == "all" else (data / lost).unlink()
    write(run.parent / "2.txt", "other words")
    with pytest.raises(ConfigError, match="the text gives other tokens now than this run has"):
        prepare_data(config, run, None, digest)


def test_a_run_is_opened_without_its_sources(config: DataConfig, run: Path) -> None:
    data = prepare_data(config, run, None)
    for path in run.parent.glob("*.txt"):
        path.unlink()
    assert_same(data, open_prepared(config, run))
    with pytest.raises(ConfigError, match=r"data: is not there, or damaged; run the command"):
        open_prepared(config, run.parent / "other")


def test_libraries_of_another_version_do_not_change_what_a_model_is_trained_on(
    config: DataConfig, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_data(config, run, None)
    monkeypatch.setattr(known, "version", lambda name: "99")
    assert prepare_data(config, run, None, first.digest).fingerprint == first.fingerprint
    assert prepare_data(config, run, None).fingerprint != first.fingerprint


@pytest.mark.parametrize("change", [{"packing": "concat"}, {"validation_every": 3}])
def test_settings_that_give_other_rows_are_named(
    tmp_path: Path, run: Path, change: dict[str, Any]
) -> None:
    """The tokens are the same; what a model sees of them is not."""
    train_tokenizer(["document word"], 280).save_pretrained(tmp_path / "tokenizer")
    numbered_texts(tmp_path / "x.jsonl", 30)
    config = text_config(tmp_path / "*.jsonl", tokenizer=str(tmp_path / "tokenizer"))
    first = prepare_data(config, run, None)
    other = replace(config, **change)
    assert prepare_data(other, run, None).digest != first.digest
    assert prepare_data(config, run, None, first.digest).digest == first.digest
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(change))}"):
        prepare_data(other, run, None, first.digest)


# What cannot be read


def records_with_faults(path: Path, count: int, bad: int) -> Path:
    records: list[object] = [{"text": f"text {number}"} for number in range(count - bad)]
    return json_lines(path, *records, *([{"text": 5}] * bad))


def test_bad_records_are_left_out_where_that_is_set_and_counted(
    tmp_path: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records_with_faults(tmp_path / "x.jsonl", 200, 4)
    config = text_config(tmp_path / "*.jsonl")
    with pytest.raises(ConfigError, match=r"^data\.sources\.a: .*/x\.jsonl, line 197: .* number"):
        prepare_data(config, run, None)
    config = replace(config, on_error="skip", max_skip_fraction=0.02)
    assert prepare_data(config, run, None).stores["a"].documents == 196
    assert "data.sources.a: 4 records are left out, wrong_type: " in caplog.text
    assert "x.jsonl, line 197" in caplog.text
    with pytest.raises(ConfigError) as error:
        prepare_data(replace(config, max_skip_fraction=0.019), run.parent / "other", None)
    said = "data.max_skip_fraction=0.019: 4 of 200 records of data.sources.a cannot be read, 4 of "
    assert str(error.value).startswith(said + "them wrong_type: ")


@pytest.mark.parametrize(("bad", "enough"), [(1, True), (2, False)])
def test_the_share_of_a_few_records_is_taken_at_the_end(
    tmp_path: Path, run: Path, bad: int, enough: bool
) -> None:
    records_with_faults(tmp_path / "x.jsonl", 20, bad)
    config = text_config(tmp_path / "*.jsonl", on_error="skip", max_skip_fraction=0.05)
    if enough:
        assert prepare_data(config, run, None).stores["a"].documents == 19
    else:
        with pytest.raises(ConfigError, match=r"max_skip_fraction=0\.05: 2 of 20 records of data"):
            prepare_data(config, run, None)


def test_a_source_without_text_is_refused(tmp_path: Path, run: Path) -> None:
    numbered_texts(tmp_path / "a.jsonl", 10)
    for number, content in enumerate(['{"text": ""}\n' * 3, "", "\n\n"]):
        write(tmp_path / "b.jsonl", content)
        config = text_config(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
        with pytest.raises(ConfigError, match=r"^data\.sources\.b: there is no text in it; must"):
            prepare_data(config, run.parent / str(number), None)


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_a_source_of_too_few_documents_is_refused(
    tmp_path: Path, run: Path, documents: int
) -> None:
    numbered_texts(tmp_path / "x.jsonl", documents)
    for every in (2, None):
        config = text_config(tmp_path / "x.jsonl", validation_every=every)
        message = rf"^data\.validation_every={every}: the source a has only {documents} document"
        with pytest.raises(ConfigError, match=message):
            _ = prepare_data(config, run, None).digest


def test_a_hub_that_cannot_be_reached_stops_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = text_config(SourceConfig(kind="hub", path="no/such-data-set"))
    with pytest.raises(ConfigError, match=r"^data\.sources\.a\.path=no/such.*cannot load") as error:
        prepare_data(config, run, None)
    assert "\n" not in str(error.value) and not run.exists()


def test_empty_documents_are_told(
    tmp_path: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    json_lines(tmp_path / "x.jsonl", *({"text": text} for text in ("a", "", "b", "", "c", "d")))
    prepare_data(text_config(tmp_path / "x.jsonl"), run, None)
    assert "data.sources.a: 2 of 6 documents are empty and left out" in caplog.text


def test_nothing_is_said_of_whole_records(
    config: DataConfig,
    run: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    prepare_data(config, run, None)
    assert caplog.text == "" and capfd.readouterr() == ("", "")
