"""Cut one member out of an elastic checkpoint: no training, no GPU, no remote code.

python extract.py checkpoint=runs/tiny/elastic budget=small output=out/small
"""

import sys

from elastic.cli.command import command
from elastic.config import ExtractConfig


def run(config: ExtractConfig) -> None:
    """Exit code 1 when the result differs or cannot be written; nothing is left behind then."""
    from safetensors import SafetensorError  # after the settings: torch takes seconds

    from elastic.extract.compare import VerificationError
    from elastic.extract.export import extract

    try:
        extract(config)
    except FileExistsError:
        raise  # a wrong setting, exit code 2
    except (VerificationError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    command("extract", ExtractConfig, run)
