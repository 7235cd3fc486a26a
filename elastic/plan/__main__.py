"""python -m elastic.plan: the command `elastic plan`."""

from elastic.cli.main import run

if __name__ == "__main__":
    run("plan")
