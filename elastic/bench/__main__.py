"""python -m elastic.bench NAME [overrides] [json=PATH]; names are in `elastic.config.BENCHES`."""

import sys
from importlib import import_module

from elastic.cli.command import command
from elastic.config import BENCHES, BenchConfig


def measure(name: str, config: BenchConfig) -> None:
    """Run one bench, print its table and write its figures."""
    from elastic.bench.result import report  # torch only once the settings are known to be good

    report(name, config, import_module(f"elastic.bench.{name}").measure)


def main() -> None:
    """The name comes first; what follows is Hydra's."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else None
    if name not in BENCHES:
        what = "no bench is named" if name is None else f"{name}: no such bench"
        print(f"error: {what}; must be one of {', '.join(BENCHES)}", file=sys.stderr)
        sys.exit(2)
    command(f"bench/{name}", BENCHES[name], lambda config: measure(name, config))


if __name__ == "__main__":
    main()
