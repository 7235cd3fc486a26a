"""The cases of kernel_laws.py on the kernels of mamba_ssm, as test_mamba_kernels.py starts them.

Arguments: `cpu`, where Triton interprets the kernels, at the smallest size, or `cuda`, at the real
chunk and published head sizes; then `fused`, with causal_conv1d, or `pieces`, without. Prints one
line of JSON: case -> precision -> the differences and which kernels the Mamba layer ran, or what
was raised.
"""

import json
import sys
import traceback
import types

import torch


def main(device: str, path: str) -> None:
    if device == "cpu":
        from helpers.interpreted import CHUNK, load_kernels, use_twins

        kernels, chunk = load_kernels(), CHUNK
        use_twins(kernels)
    else:
        from mamba_ssm.ops.triton import ssd_combined as kernels

        chunk = 256
        torch.set_float32_matmul_precision("highest")
    if path == "pieces":
        kernels.causal_conv1d_fwd_function = kernels.causal_conv1d_bwd_function = None
    assert path == "pieces" or kernels.causal_conv1d_fwd_function, "causal_conv1d is missing"
    # These import transformers, which looks for mamba_ssm: it must be loadable by now.
    from helpers.kernel_laws import CASES, FUSED, PIECES, PRECISIONS, cases

    import elastic.parent.ssd

    elastic.parent.ssd.MAMBA_SSM_CHUNK = chunk
    ran: list[str] = []
    for entry in (FUSED, PIECES):
        note(kernels, entry, ran)
    made, results = cases(chunk, device), {}
    for name in CASES[path]:
        results[name] = {}
        for precision in PRECISIONS[device]:
            ran.clear()
            try:
                logits, gradients = made[name](precision)
                found = {"logits": logits, "gradients": gradients, "kernels": sorted(set(ran))}
            except Exception:  # the other cases are worth knowing too
                found = {"error": traceback.format_exc(limit=-4)}
            results[name][precision] = found
    print(json.dumps(results))


def note(kernels: types.ModuleType, name: str, ran: list[str]) -> None:
    """Have a function's name noted whenever it is called."""
    function = getattr(kernels, name)
    setattr(kernels, name, lambda *a, **k: (ran.append(name), function(*a, **k))[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
