"""Who knows the per-layer model, in fresh processes: nobody without `elastic`, everybody with it.

Import orders of `elastic` and transformers are all tried; what must stay out of memory is looked up
in `sys.modules`.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.layerwise import SIZES
from transformers import AutoModelForCausalLM

from elastic.extract.layerwise.config import NemotronHElasticConfig
from elastic.extract.layerwise.register import AUTO, _Watch


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose Mamba layers, MLPs, or both differ in size; written by transformers itself."""
    path = tmp_path_factory.mktemp("layerwise")
    per_layer = {
        "mamba": {0: {"mamba_num_heads": 4, "mamba_head_dim": 3}},
        "mlp": {1: {"intermediate_size": 7}},
        "both": {0: {"mamba_head_dim": 3}, 4: {"intermediate_size": 7}},
    }
    torch.manual_seed(0)
    for name, layers in per_layer.items():
        config = NemotronHElasticConfig(**SIZES, per_layer_config=layers)
        AutoModelForCausalLM.from_config(config).save_pretrained(path / name)
    return path


NURSERY = """
import json, os, sys, traceback
import huggingface_hub, safetensors.torch, tokenizers, torch._dynamo, torch.distributed.tensor
for line in sys.stdin:
    code, log = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""An interpreter that has imported torch, which takes seconds, but neither transformers nor us; it
runs every piece of code in a child of its own."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Run code where neither transformers nor elastic has been imported; gives what it prints."""
    log = tmp_path_factory.mktemp("nursery") / "log"
    nursery = subprocess.Popen(
        [sys.executable, "-W", "error:::elastic", "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert nursery.stdin is not None and nursery.stdout is not None

    def run(code: str) -> str:
        print(json.dumps([code, str(log)]), file=nursery.stdin, flush=True)
        status = nursery.stdout.readline().strip()
        assert status == "0", log.with_suffix(".err").read_text()
        return log.with_suffix(".out").read_text()

    yield run
    nursery.stdin.close()
    nursery.wait()


def test_stock_transformers_refuses_it(run: Callable[[str], str], directory: Path) -> None:
    """By the Auto classes, and by the stock class on the directory itself, which without the field
    `per_layer_config` would build every layer at one size. Nothing here imports elastic."""
    code = f"""
import sys
from transformers import AutoConfig, AutoModelForCausalLM, NemotronHConfig, NemotronHForCausalLM
for name in ("mamba", "mlp", "both"):
    path = {str(directory)!r} + "/" + name
    makers = [
        AutoConfig.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        NemotronHForCausalLM.from_pretrained,
        lambda path: NemotronHForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True),
        lambda path: NemotronHForCausalLM(NemotronHConfig.from_pretrained(path)),
    ]
    for maker in makers:
        try:
            maker(path)
        except Exception as error:
            print(type(error).__name__)
        else:
            print("built")
assert "elastic" not in sys.modules
"""
    found = run(code).split()
    assert len(found) == 15 and "built" not in found
    assert found[:3] == ["ValueError", "ValueError", "AmbiguousGlobalPerLayerAttributeError"]


ORDERS = {
    "elastic first": ["import elastic", "import transformers"],
    "transformers first": ["import transformers", "import elastic"],
    "Auto classes first": ["from transformers import AutoModelForCausalLM", "import elastic"],
    "Auto classes after": ["import elastic", "from transformers import AutoModelForCausalLM"],
    "generation after": ["import elastic", "import transformers.generation"],
    "pipelines after": ["import elastic", "from transformers import pipeline"],
    "twice": [
        "import elastic, importlib",
        "importlib.reload(elastic)",
        "importlib.reload(elastic)",
    ],
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_auto_classes_know_it_in_every_order(
    run: Callable[[str], str], directory: Path, name: str
) -> None:
    """And `sys.meta_path` is as it was; the stock class refuses it still."""
    lines = "\n".join(ORDERS[name])
    code = f"""
import sys
before = len(sys.meta_path)
{lines}
from transformers import AutoModelForCausalLM, NemotronHForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(directory / "both")!r})
print(type(model).__name__, isinstance(model, NemotronHForCausalLM))
print(model.model.layers[0].mixer.head_dim, model.model.layers[3].mixer.head_dim)
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("elastic")]
try:
    NemotronHForCausalLM.from_pretrained({str(directory / "both")!r})
except Exception as error:
    print(type(error).__name__)
"""
    assert run(code).splitlines() == [
        "NemotronHElasticForCausalLM True",
        "3 5",
        "AmbiguousGlobalPerLayerAttributeError",
    ]


def test_each_step_waits_until_somebody_asks(run: Callable[[str], str], directory: Path) -> None:
    """`import elastic` imports no transformers; the Auto classes import none of our model, nor the
    modelling code of Nemotron-H; a per-layer configuration does."""
    code = f"""
import sys
model = "elastic.extract.layerwise.model", "transformers.models.nemotron_h.modeling_nemotron_h"
import elastic
print("transformers" in sys.modules)
import transformers
print("{AUTO}" in sys.modules, "elastic.extract.layerwise.config" in sys.modules)
from transformers import AutoConfig, AutoModelForCausalLM
print("elastic.extract.layerwise.config" in sys.modules, [name in sys.modules for name in model])
AutoConfig.from_pretrained({str(directory / "mlp")!r})
print([name in sys.modules for name in model])
"""
    assert run(code).splitlines() == ["False", "False False", "True [False, False]", "[True, True]"]


def test_the_module_that_is_watched_is_as_it_would_be(
    run: Callable[[str], str], directory: Path
) -> None:
    """Its loader is the ordinary one, so that its source is found and it can be reloaded."""
    code = f"""
import elastic, importlib, inspect
import {AUTO} as auto
print(type(auto.__loader__).__name__, type(auto.__spec__.loader).__name__)
print(len(inspect.getsource(auto)) > 1000)
importlib.reload(auto)
"""
    assert run(code).splitlines() == ["SourceFileLoader SourceFileLoader", "True"]


def test_an_import_that_fails_is_watched_again(run: Callable[[str], str], tmp_path: Path) -> None:
    """The first attempt leaves no trace but the watch, the second one calls."""
    (tmp_path / "fragile.py").write_text("import os\nassert os.environ.get('FINE')\n")
    code = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
from elastic.extract.layerwise.register import _Watch
called = []
watch = _Watch(("fragile",), lambda: called.append("fragile" in sys.modules))
sys.meta_path.insert(0, watch)
try:
    import fragile
except AssertionError:
    print("fragile" in sys.modules, called, watch in sys.meta_path)
os.environ["FINE"] = "1"
import fragile
print(called, watch in sys.meta_path)
"""
    assert run(code).splitlines() == ["False [] True", "[True] False"]


def test_many_threads_register_once(run: Callable[[str], str], tmp_path: Path) -> None:
    """importlib lets one of them import; nobody sees the module before it has been called for."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.1)\n")
    code = f"""
import sys, threading
sys.path.insert(0, {str(tmp_path)!r})
from elastic.extract.layerwise.register import _Watch
called, seen = [], []
sys.meta_path.insert(0, _Watch(("slow",), lambda: called.append(1)))
def work():
    import slow
    seen.append(len(called))
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(called, seen)
"""
    assert run(code).strip() == f"[1] {[1] * 8}"


def test_a_registration_that_fails_is_a_warning_and_not_an_error(run: Callable[[str], str]) -> None:
    """transformers must import whatever is wrong with us; we say what will not work."""
    code = """
import sys, warnings
import elastic
sys.modules["elastic.extract.layerwise.config"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoConfig
print([str(warning.message)[:30] for warning in caught if "elastic" in str(warning.message)])
"""
    assert run(code).strip() == "['elastic: AutoModelForCausalLM ']"


def test_the_watch_finds_nothing_else() -> None:
    watch = _Watch(("no.such.module",), lambda: None)
    assert watch.find_spec("json", None) is None and watch.find_spec("no.such.module", None) is None
