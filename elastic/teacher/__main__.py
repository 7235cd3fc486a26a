"""elastic cache-teacher objective.top_k=64 objective.teacher_cache=DIR [key=value ...]."""

import sys

from elastic.cli.command import command
from elastic.config import CacheTeacherConfig


def main(config: CacheTeacherConfig) -> None:
    """Write this worker's part of a cache; exit code 1 when the disk does not take it."""
    from elastic.teacher.cache.write import write_cache  # after the settings: torch takes seconds

    try:
        write_cache(config)
    except FileExistsError:
        raise  # a wrong setting, exit code 2
    except OSError as error:
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    command("cache_teacher", CacheTeacherConfig, main)
