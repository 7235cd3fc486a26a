"""python -m elastic.teacher objective.top_k=64 objective.store=DIR [key=value ...]."""

import sys

from elastic.cli.command import command
from elastic.config import TeachConfig


def main(config: TeachConfig) -> None:
    """Write this worker's part of a store; exit code 1 when the disk does not take it."""
    from elastic.teacher.cache.write import write_store  # after the settings: torch takes seconds

    try:
        write_store(config)
    except FileExistsError:
        raise  # a wrong setting, exit code 2
    except OSError as error:
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    command("teach", TeachConfig, main)
