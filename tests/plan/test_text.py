"""What people read: the verdict first, nothing wider than 100 columns, no block twice."""

import itertools
import json
import re
import shlex
import subprocess
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from plan.test_fit import made, plan_settings

from elastic.cli.command import CONF
from elastic.config import RunConfig, parse
from elastic.plan.tables import WIDTH, shell, table
from elastic.plan.text import describe
from elastic.plan.work import make_plan

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
FIVE = {
    "small": "+budgets={a:{params:0.85},b:{params:0.65}}",
    "tiny": "+budgets={a_long_name_of_a_budget_that_nobody_shortened:{params:0.8},x:{params:0.65}}",
    "tiny_heterogeneous": "+budgets={a:{params:0.85},b:{params:0.65}}",
    "tiny_reasoning": "+budgets={a:{params:0.8},b:{params:0.6}}",
    "medium": "+budgets={a:{params:0.85},b:{params:0.65}}",
    "nano_v2_12b": "+budgets={11b:{params:1.1e10},7b:{params:7.5e9}}",
    "nano_v2_9b": "+budgets={7b:{params:7.5e9},5b:{params:5e9}}",
}
UNIFORM = [f"curriculum.stages.{stage}.budget_probabilities=null" for stage in ("short", "long")]
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "priced": ["plan.price_per_gpu_hour=2.5"],
    "gpus": ["plan.gpus=[7,1024,65536]"],
    "small": ["trainer=gpu", "trainer.num_nodes=1", "plan.gpu_gib=5", "plan.node_gib=64"],
    "contexts": ["plan.contexts=[1,1000000]", "plan.batch=100000"],
}


def cases() -> list[tuple[str, ...]]:
    plain = [(f"experiment={e}", *v) for e, v in itertools.product(EXPERIMENTS, VARIANTS.values())]
    five = [(f"experiment={name}", *UNIFORM, FIVE[name]) for name in EXPERIMENTS]
    layered = ("experiment=nano_v2_12b", "space=heterogeneous")
    text = ["data=files", "data.tokenizer=train", "data.path=" + "deep/" * 60]
    return [*plain, *five, layered, ("experiment=tiny", f"name={'a_name_' * 30}", *text)]


def of(*overrides: str) -> dict[str, Any]:
    """A plan that knows what was set, as the command makes it; the 8-process batch fits tiny."""
    stages = ("short", "long", *(["pretrain"] if "reasoning" in overrides[0] else []))
    fitting = [f"curriculum.stages.{stage}.batch_tokens=8192" for stage in stages]
    small = any(name in overrides[0] for name in ("tiny", "=small"))
    needed = fitting if small and "trainer=gpu" in overrides else []
    return make_plan(plan_settings(*overrides, *needed), [*overrides, *needed])


@pytest.mark.parametrize("overrides", cases(), ids=lambda words: " ".join(words)[:60])
def test_the_verdict_is_first_and_no_line_is_too_wide(overrides: tuple[str, ...]) -> None:
    plan = of(*overrides)
    text = describe(json.loads(json.dumps(plan)))
    assert max(len(line) for line in text.splitlines()) <= WIDTH == 100
    title = "FITS on" if plan["verdict"]["fits"] else "DOES NOT FIT on"
    assert f"{plan['name'][:30]}" in text[:60] and title in text[:300]
    heads = [text.index(f"\n{head}  ") for head in ("MEMBERS", "MEMORY", "TIME")]
    assert heads == sorted(heads) and text.index(title) < text.index("  memory") < heads[0]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_block_of_memory_is_there_twice(name: str) -> None:
    text = describe(made(f"experiment={name}", "plan.gpus=[8,64,7,9]"))
    memory = text[text.index("\nMEMORY") : text.index("\nTIME")]
    blocks = [block.split("\n", 1)[-1] for block in memory.split("\n\n")]
    assert len(blocks) == len(set(blocks))
    assert memory.count("a pass") == 1
    passes = next(block for block in memory.split("\n\n") if block.startswith("a pass"))
    rows = [re.split("  +", line) for line in passes.splitlines()]
    figures = [(row[0], *row[2:]) for row in rows]  # without the numbers of GPUs
    assert len(set(figures)) == len(figures)


def test_the_same_strategies_on_several_numbers_of_gpus_are_one_block() -> None:
    """And a number that does not divide the batch is one line."""
    text = describe(made("experiment=nano_v2_12b", "plan.gpus=[7,11]"))
    assert text.count("Impossible:") == 2
    plan = made("experiment=nano_v2_12b", "plan.gpus=[8]")
    twice = {**plan, "memory": {**plan["memory"], "gpus": plan["memory"]["gpus"][:1] * 2}}
    assert describe(twice).count("zero3 offload") == 1


def test_what_fits_says_days_hours_and_cost() -> None:
    plan = of("experiment=nano_v2_12b", "plan.price_per_gpu_hour=2.5")
    found, work = plan["verdict"], plan["training"]
    assert found["fits"] and found["change"] is None and found["short_of"] == []
    assert found["gpu_hours"] == work["gpu_hours"] and found["days"] == work["days"]
    assert found["cost"] == work["cost"] == pytest.approx(2.5 * found["gpu_hours"])
    lines = describe(plan).splitlines()
    assert lines[3].startswith("  cost    ") and lines[3].endswith(" at 2.5 per GPU-hour")
    assert "  cost" not in describe(of("experiment=nano_v2_12b"))


def test_on_processes_there_are_no_gpu_hours_and_no_cost() -> None:
    plan = of("experiment=tiny", "plan.price_per_gpu_hour=2.5")
    assert plan["verdict"]["gpu_hours"] is plan["verdict"]["cost"] is None
    assert plan["verdict"]["command"] == "elastic train experiment=tiny"


CHANGES = [
    ["trainer.strategy=zero2", "curriculum.stages.short.draws=1", "curriculum.stages.long.draws=1"],
    ["trainer.num_nodes=1"],
    ["trainer.num_nodes=1", "trainer.micro_batch_tokens=null", "plan.gpus=[8,64]"],
    ["importance.batch_size=32"],
    ["plan.gpu_gib=70", "importance.sequence_length=131072"],
    ["plan.gpu_gib=66", "trainer.num_nodes=8", "plan.gpus=[512,1024]", "importance.batch_size=8"],
]


@pytest.mark.parametrize("changes", CHANGES, ids=" ".join)
def test_the_command_of_what_does_not_fit_does(changes: list[str]) -> None:
    """Its settings, planned again, fit; days and hours are theirs."""
    real = ["experiment=nano_v2_12b", *changes]
    found = of(*real)["verdict"]
    assert not found["fits"]
    assert found["change"]
    words = shlex.split(found["command"])
    given = [word for word in words if "=" in word and not word.startswith("--")]
    options = dict(word[2:].split("=") for word in words if word.startswith("--"))
    if options:
        given += [f"trainer.num_nodes={options['nodes']}"]
        given += [f"trainer.devices={options['ntasks-per-node']}"]
    assert not any(word.startswith("plan.") for word in given)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parse(compose("train", given), RunConfig)
    again = of(*given, *(word for word in changes if word.startswith("plan.")))
    assert again["verdict"]["fits"], again["verdict"]
    assert again["verdict"]["days"] == pytest.approx(found["days"])


def test_what_nothing_helps_has_no_command() -> None:
    found = of("experiment=nano_v2_12b", "plan.gpu_gib=8")["verdict"]
    assert not found["fits"] and found["change"] is None and found["command"] is None
    assert found["short_of"] == ["device", "ranking"]


def test_a_node_that_is_too_small_is_named() -> None:
    plan = of("experiment=nano_v2_12b", "plan.node_gib=500")
    assert plan["verdict"]["short_of"] == ["host"]
    assert "  host    550.3 GiB of a node's 500.0 GiB\n" in describe(plan)


@pytest.mark.parametrize(
    "words",
    [
        ["elastic", "train"],
        ["elastic", "train", *[f"seed={n}" for n in range(40)]],
        ["elastic", "train", "data.path=" + "deep/" * 60, "a='it is'", "name=x y"],
        ["elastic", "train", "name='" + "spaces  and \\ " * 20 + "'", "seed=1"],
    ],
    ids=["short", "many", "long", "quoted"],
)
def test_a_command_on_several_lines_is_the_same_command(words: list[str]) -> None:
    """As a shell reads it."""
    text = shell(shlex.join(words), "    ")
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    program = f"show() {{ printf '%s\\0' \"$@\"; }}\nshow {text.strip()}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == words


def test_wide_tables_go_on_below() -> None:
    header = ["name", *(f"column {number}" for number in range(20))]
    text = table(header, [["x" * 80, *("1" * 9 for _ in range(20))]])
    blocks = text.split("\n\n")
    assert len(blocks) > 1 and all(block.startswith("name") for block in blocks)
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert sum(block.count("column") for block in blocks) == 20
