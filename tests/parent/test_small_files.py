"""The files beside the weights, and whose licence a checkpoint has."""

from pathlib import Path

import pytest

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


def test_templates_in_a_folder_travel_along(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", "tokenizer.json")
    fill(source / "additional_chat_templates", "tools.jinja", "code.py")
    (tmp_path / "target").mkdir()
    copy_small_files(source, tmp_path / "target")
    folder = tmp_path / "target" / "additional_chat_templates"
    assert {path.name for path in folder.iterdir()} == {"tools.jinja"}
    assert (folder / "tools.jinja").read_text() == "of additional_chat_templates"


def test_no_link_that_leaves_the_checkpoint_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of a file nor of the folder of templates; one within it is, wherever it begins."""
    elsewhere = fill(tmp_path / "elsewhere", "secret", "more.jinja")
    source = fill(tmp_path / "source", "tokenizer.json")
    (source / "LICENSE").symlink_to(elsewhere / "secret")
    (source / "NOTICE").symlink_to("../elsewhere/secret")
    (source / "additional_chat_templates").symlink_to(elsewhere)
    (source / "tokenizer_copy.json").symlink_to("tokenizer.json")
    (tmp_path / "linked").symlink_to(source)
    (tmp_path / "target").mkdir()
    copy_small_files(tmp_path / "linked", tmp_path / "target")
    found = {path.name for path in (tmp_path / "target").rglob("*")}
    assert found == {"tokenizer.json", "tokenizer_copy.json"}
    assert caplog.text.count("a link that leaves the checkpoint; it is left out") == 4


def test_files_in_the_cache_of_the_hub_are_links_and_are_copied(tmp_path: Path) -> None:
    (tmp_path / "models--a--b").mkdir()
    fill(tmp_path / "models--a--b" / "blobs", "0123")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "LICENSE").symlink_to("../../blobs/0123")
    (tmp_path / "target").mkdir()
    copy_small_files(snapshot, tmp_path / "target")
    assert (tmp_path / "target" / "LICENSE").read_text() == "of blobs"
    assert not (tmp_path / "target" / "LICENSE").is_symlink()


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


def test_a_model_card_elsewhere_is_not_the_checkpoints(tmp_path: Path) -> None:
    """A link that leaves the directory is not followed for the licence either."""
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n")
    checkpoint = fill(tmp_path / "checkpoint", "LICENSE")
    (checkpoint / "README.md").symlink_to(tmp_path / "card.md")
    assert licence_of(checkpoint) == {}
    (checkpoint / "README.md").unlink()
    (tmp_path / "card.md").rename(checkpoint / "card.md")
    (checkpoint / "README.md").symlink_to("card.md")
    assert licence_of(checkpoint) == {"license": "mit"}
