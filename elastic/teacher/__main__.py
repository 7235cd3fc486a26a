"""python -m elastic.teacher: the command `elastic cache-teacher`."""

from elastic.cli.main import run

if __name__ == "__main__":
    run("cache-teacher")
