"""Loads checkpoints with whatever transformers PYTHONPATH has; the project is not imported.

    PYTHONPATH=DIRECTORY python reader.py CHECKPOINT...

A checkpoint has `expected.safetensors` beside it: tokens, logits and the continuation of a prompt.
One line of JSON per checkpoint.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def read(directory: Path) -> dict[str, object]:
    """How far the logits of a checkpoint are from those of its writer, and whether all else is
    equal."""
    wanted = load_file(directory.parent / f"{directory.name}.expected.safetensors")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    tokens, prompt = wanted["tokens"], wanted["continued"][:, : wanted["tokens"].shape[1]]
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits
    new = wanted["continued"].shape[1] - prompt.shape[1]
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    continued = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    stored = load_file(directory / "model.safetensors")
    exact = [name for name in stored if name.endswith(("A_log", ".D", "dt_bias"))]
    held = model.state_dict()
    off = (logits - wanted["logits"]).abs().max() / wanted["logits"].abs().max()
    return {
        "transformers": transformers.__version__,
        "logits": off.item(),
        "decoding": torch.equal(continued, wanted["continued"]),
        "exact": bool(exact)
        and all(torch.equal(held[n.replace("backbone.", "model.", 1)], stored[n]) for n in exact),
        "problems": sorted(str(key) for keys in report.values() for key in keys or ()),
    }


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for argument in sys.argv[1:]:
        print(json.dumps(read(Path(argument))))
