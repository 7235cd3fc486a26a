"""python -m elastic.bench NAME: the command `elastic bench NAME`."""

from elastic.cli.main import run

if __name__ == "__main__":
    run("bench")
