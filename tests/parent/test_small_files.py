"""The files beside the weights, and whose licence a checkpoint has."""

from pathlib import Path

from elastic.parent.small_files import copy_small_files, licence_of


def fill(directory: Path, *names: str) -> Path:
    directory.mkdir()
    for name in names:
        (directory / name).write_text(f"of {directory.name}")
    return directory


def test_known_files_are_copied_and_none_is_replaced(tmp_path: Path) -> None:
    source = fill(
        tmp_path / "source", "tokenizer.json", "LICENSE.txt", "generation_config.json", "model.py",
        "weights.bin", "vocab.safetensors",
    )  # fmt: skip
    target = fill(tmp_path / "target", "tokenizer.json")
    copy_small_files(source, target)
    found = {path.name: path.read_text() for path in target.iterdir()}
    assert found == {
        "tokenizer.json": "of target",
        "LICENSE.txt": "of source",
        "generation_config.json": "of source",
    }


def test_another_tokenizer_is_not_mixed_with_the_parents(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", "tokenizer.model", "chat_template.jinja", "NOTICE")
    target = fill(tmp_path / "target", "tokenizer.json")
    copy_small_files(source, target, tokenizer=False)
    assert {path.name for path in target.iterdir()} == {"tokenizer.json", "NOTICE"}


def test_the_licence_is_what_the_model_card_says(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert licence_of(tmp_path) == {}
    card.write_text("---\nlicense: other\nlicense_name: open\nlicense_link: https://x\n---\n# T\n")
    assert licence_of(tmp_path) == {
        "license": "other",
        "license_name": "open",
        "license_link": "https://x",
    }
    for text in (
        "# no front matter\n---\nlicense: mit\n---\n",
        "---\n[: bad\n---\n",
        "---\n- a\n---",
    ):
        card.write_text(text)
        assert licence_of(tmp_path) == {}
