"""Runs small enough for tests: the real configuration files, the real trainer, tiny sizes."""

import sysconfig
from pathlib import Path

from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback

from elastic.cli.command import CONF
from elastic.config import RunConfig, parse

STDLIB = Path(sysconfig.get_path("stdlib"))

SMALL_PARENT = [
    "parent.shape.pattern=M-M*-M-",
    "parent.shape.hidden_size=48",
    "parent.shape.vocab_size=384",
    "parent.shape.intermediate_size=128",
    "parent.shape.num_attention_heads=4",
    "parent.shape.num_key_value_heads=2",
    "parent.shape.head_dim=12",
    "parent.shape.mamba_num_heads=4",
    "parent.shape.mamba_head_dim=16",
    "parent.shape.ssm_state_size=16",
    "data.tokenizer_vocab=384",
    "data=files",
    "data.tokenizer=train",
    f"data.path='{STDLIB}/email/*.py'",
    "data.validation_every=5",
    "data.validation_sequences=8",
]
"""A parent of about 130,000 parameters on 29 files of real text."""

SMALL_SPACE = [
    "space.hidden=[48,44,40,36,32,28]",
    "space.ffn=[128,112,96,80,64,48]",
    "space.mamba_heads=[4,2]",
    "space.mamba_head_dim=null",
    "space.attention_heads=null",
    "space.depth=[7,6]",
    "space.heterogeneous=[]",
    "space.tolerance=0.02",
]


def stage(name: str, steps: int, length: int = 64, batch: int = 512, lr: float = 3e-3) -> list[str]:
    """Overrides that make one stage short."""
    where = f"curriculum.stages.{name}"
    return [
        f"{where}.tokens={steps * batch}",
        f"{where}.sequence_length={length}",
        f"{where}.batch_tokens={batch}",
        f"{where}.model_lr={lr}",
        # A second elastic stage has no warmup of its own.
        *([] if name == "long" else [f"{where}.warmup_steps={max(1, steps // 10)}"]),
    ]


CALIBRATION = [
    "importance.samples=16",
    "importance.sequence_length=64",
    "importance.depth_samples=8",
    "importance.depth_sequence_length=64",
    "importance.depth_positions=16",
]


SMALL_RUN = [
    *SMALL_PARENT,
    *SMALL_SPACE,
    *CALIBRATION,
    *stage("pretrain", 1),
    *stage("short", 1),
    *stage("long", 1, length=256),
]
"""A whole run of a step per stage."""


def settings(run_dir: Path, *overrides: str, experiment: str = "tiny") -> RunConfig:
    """What `python train.py experiment=... overrides` would run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = compose("train", [f"experiment={experiment}", f"run_dir='{run_dir}'", *overrides])
    return parse(raw, RunConfig)


def small_settings(run_dir: Path, *overrides: str, steps: tuple[int, int, int]) -> RunConfig:
    """The tiny experiment on the small parent, with so many steps per stage; each draw trains one
    budget."""
    pretrain, short, long = steps
    return settings(
        run_dir,
        *SMALL_PARENT,
        *SMALL_SPACE,
        *CALIBRATION,
        *stage("pretrain", pretrain, lr=5e-3),
        *stage("short", short, lr=2e-3),
        *stage("long", long, length=256, lr=1e-3),
        *(f"curriculum.stages.{name}.budgets_per_batch=1" for name in ("short", "long")),
        *overrides,
    )


class Stop(Callback):
    """Stop a run after so many forward passes, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
