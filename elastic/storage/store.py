"""The tensors of a safetensors checkpoint by their names: headers checked, nothing else read."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from elastic.storage.index import INDEX, weight_map_of
from elastic.storage.opened import OpenFile
from elastic.storage.reading import BLOCK_BYTES, DTYPES, StoredTensor
from elastic.storage.rooms import Rooms
from elastic.storage.seals import SealBroken, Seals

log = logging.getLogger(__name__)

WHOLE = "model.safetensors"

BESIDE = tuple(f"{name}.safetensors" for name in ("router", "members", "energies", "calibration"))
"""Files of an elastic checkpoint that hold no weights of the parent."""

SKIPPED = re.compile(r"mtp\.")
"""Tensors that are left behind: layers for multi-token prediction. They read the hidden states of
the parent as it was, in its width and basis: beside trained and narrowed weights they predict
nothing."""


class TensorStore(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint directory; headers are read and checked, nothing else.

    Args:
        expected: name -> shape of every tensor that must be there.
        seals: what the files are compared with as they are read; None takes seals.json beside them,
            if it is there.

    Raises:
        ValueError: a shard is missing, damaged or disagrees with the index, or a tensor is absent,
            unknown, of another shape than by config.json or of a type that cannot be read.
    """

    def __init__(
        self, directory: Path, expected: dict[str, tuple[int, ...]], seals: Seals | None = None
    ) -> None:
        self.directory = directory
        self.seals = seals or Seals.read(directory)
        self._tensors: dict[str, StoredTensor] = {}
        if self.seals is not None:
            self.seals.check(INDEX)
        rooms = Rooms(BLOCK_BYTES)
        for path in shards(directory):
            for name, found in _tensors_of(path, self.seals, rooms).items():
                if name in self._tensors:
                    first = self._tensors[name].file.path.name
                    raise ValueError(f"{directory}: tensor {name} is in {first} and in {path.name}")
                self._tensors[name] = found
        _check_index(directory, self._tensors)
        skipped = sorted(name for name in self._tensors if SKIPPED.match(name))
        if skipped:
            _say(
                f"{directory}: {len(skipped)} tensors of multi-token prediction are left out "
                f"({skipped[0]}, ...); what is written has none, and num_nextn_predict_layers is 0"
            )
        for name in skipped:
            del self._tensors[name]
        self.head_stored = "lm_head.weight" in self._tensors
        if not self.head_stored and "lm_head.weight" in expected:
            # Checkpoints with a tied head may store the embedding alone.
            if "backbone.embeddings.weight" in self._tensors:
                self._tensors["lm_head.weight"] = self._tensors["backbone.embeddings.weight"]
        for name, shape in expected.items():
            tensor = self._tensors.get(name)
            if tensor is None:
                raise ValueError(
                    f"{directory}: tensor {name} is missing from the shards{_hint(self._tensors)}"
                )
            if tensor.shape != shape:
                raise ValueError(
                    f"{directory}: tensor {name} has shape {tensor.shape}, config.json gives "
                    f"{shape}"
                )
        unknown = sorted(set(self._tensors) - set(expected))
        if unknown:
            raise ValueError(
                f"{directory}: unknown tensor {unknown[0]} ({len(unknown)} in all){_hint(unknown)}"
            )

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@cache
def _say(line: str) -> None:
    """Once: a run opens its parent at every step."""
    log.info("%s", line)


def _hint(names: Iterable[str]) -> str:
    """What tensors of these names tell about where they come from; begins with a semicolon."""
    names = list(names)
    if any(name.endswith("rotary_emb.inv_freq") for name in names):
        return (
            "; rotary_emb.inv_freq is a buffer that older code stored, and Nemotron-H has no "
            "rotary embedding: remove it"
        )
    if any(name.startswith("model.") for name in names):
        return (
            "; model.* is what transformers calls them in memory: write the checkpoint with "
            "save_pretrained, which stores backbone.*"
        )
    return ""


def shards(directory: Path) -> list[Path]:
    """Files that hold the model's weights: those of the index, else `WHOLE` alone, whatever else
    lies beside it (an optimizer's state, averaged weights)."""
    weight_map = weight_map_of(directory)
    if weight_map is None:
        if not (directory / WHOLE).is_file():
            raise ValueError(f"{directory}: no model weights found: neither {WHOLE} nor {INDEX}")
        others = {path.name for path in directory.glob("*.safetensors")} - {WHOLE, *BESIDE}
        if others:
            _say(f"{directory}: {WHOLE} is read, not {', '.join(sorted(others))}")
        return [directory / WHOLE]
    files = [directory / name for name in sorted(set(weight_map.values()))]
    if not files:
        raise ValueError(f"{directory / INDEX}: names no shard")
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path}: shard is missing, though {INDEX} names it")
    return files


def _tensors_of(path: Path, seals: Seals | None, rooms: Rooms) -> dict[str, StoredTensor]:
    """What a shard holds, by its header."""
    opened = OpenFile(path, seals)
    start = bytearray(8)
    try:
        opened.read_into(memoryview(start), 0, "the header")
        length = int.from_bytes(start, "little")
        if length > opened.bytes - 8:
            raise ValueError("the header is longer than the file")
        text = bytearray(length)
        opened.read_into(memoryview(text), 8, "the header")
        with safe_open(path, framework="pt"):
            pass  # it checks that header and size agree
        header: dict[str, Any] = json.loads(text)
    except SealBroken:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: shard is truncated or damaged ({error})") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: tensor {name} is stored as {entry['dtype']}; must be one of "
                + ", ".join(DTYPES)
            )
        tensors[name] = StoredTensor(
            name,
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            opened,
            8 + length + entry["data_offsets"][0],
            rooms,
        )
    return tensors


def _check_index(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise `ValueError` unless index and shards agree."""
    weight_map = weight_map_of(directory)
    if weight_map is None:
        return
    for name, file in weight_map.items():
        if name not in tensors:
            raise ValueError(
                f"{directory / file}: has no tensor {name}, though {INDEX} puts it there"
            )
        found = tensors[name].file.path.name
        if found != file:
            raise ValueError(
                f"{directory / INDEX}: puts tensor {name} into {file}, but it is in {found}"
            )
    absent = sorted(set(tensors) - set(weight_map))
    if absent:
        raise ValueError(
            f"{directory / INDEX}: has no entry for tensor {absent[0]} of "
            f"{tensors[absent[0]].file.path.name} ({len(absent)} in all)"
        )
