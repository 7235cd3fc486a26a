"""python -m elastic.evaluate: the command `elastic evaluate`."""

from elastic.cli.main import run

if __name__ == "__main__":
    run("evaluate")
