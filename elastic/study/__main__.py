"""python -m elastic.study: the command `elastic study`."""

from elastic.cli.main import run

if __name__ == "__main__":
    run("study")
