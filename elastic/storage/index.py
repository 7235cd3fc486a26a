"""The index of a checkpoint of several shards. No torch."""

from pathlib import Path
from typing import Any

from elastic.storage.foreign import read_json

INDEX = "model.safetensors.index.json"


def weight_map_of(directory: Path) -> dict[str, str] | None:
    """Tensor -> file by the index; None where there is no index."""
    index = directory / INDEX
    if not index.is_file():
        return None
    try:
        weight_map = read_json(index)["weight_map"]
        files = {name: _file_name(name, file) for name, file in weight_map.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged ({error!r})") from error
    except ValueError as error:
        raise ValueError(str(error) if str(index) in str(error) else f"{index}: {error}") from error
    return files


def _file_name(tensor: str, file: Any) -> str:
    """A shard of an index: a file beside it and nowhere else."""
    if isinstance(file, str) and file and file.isprintable() and file == Path(file).name:
        return file
    raise ValueError(
        f"puts tensor {tensor} into {ascii(file)[:80]}; must be the name of a file beside it"
    )
