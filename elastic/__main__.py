"""python -m elastic: the command `elastic`."""

from elastic.cli.main import main

if __name__ == "__main__":
    main()
