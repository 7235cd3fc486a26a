"""Train a family of model sizes: python train.py [experiment=NAME] [key=value ...].

The command `elastic train`.
"""

from elastic.cli.main import run

if __name__ == "__main__":
    run("train")
