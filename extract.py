"""Cut one member out of an elastic checkpoint: no training, no GPU, no remote code.

python extract.py checkpoint=runs/tiny/elastic budget=small output=out/small: the command
`elastic extract`.
"""

from elastic.cli.main import run

if __name__ == "__main__":
    run("extract")
