"""python -m elastic.data: the command `elastic prepare`."""

from elastic.cli.main import run

if __name__ == "__main__":
    run("prepare")
