"""Generation in batches is generation one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic.evaluate.writing import AT_ONCE, greedy_writer, write_all

VOCABULARY = 48


def tiny_model() -> NemotronHForCausalLM:
    """A random hybrid that is far from uniform."""
    config = NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        layers_block_type=["mamba", "mlp", "attention", "mamba"],
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=8,
        mamba_ssm_cache_dtype="float32",
    )
    model = NemotronHForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def plainly(model: Any, prompt: list[int], ends: set[int], most: int) -> list[int]:
    """One prompt, without a cache: the whole text again for each token."""
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) - len(prompt) < most:
            logits = model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
            if tokens[-1] in ends:
                break
    return tokens[len(prompt) :]


def test_batches_write_what_one_by_one_and_without_a_cache_is_written() -> None:
    """Prompts of several lengths in no order; some come to an end, others do not."""
    model, most = tiny_model(), 24
    lengths = [5, 9, 5, 1, 9, 5, 3, 17, 5, 9]
    prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in lengths]
    free = [plainly(model, prompt, set(), most) for prompt in prompts]
    ends = {free[0][3], free[4][10]}
    expected = [plainly(model, prompt, ends, most) for prompt in prompts]
    assert len({len(each) for each in expected}) > 2
    assert max(map(len, expected)) == most
    writer = greedy_writer(model, ends)
    assert write_all(writer, prompts, ends, most) == expected
    alone = [write_all(writer, [prompt], ends, most)[0] for prompt in prompts]
    assert alone == expected


def test_prompts_of_one_length_share_batches_and_keep_their_order() -> None:
    batches: list[tuple[int, ...]] = []

    def echo(prompts: Tensor, most: int) -> Tensor:
        batches.append(tuple(prompts.shape))
        return prompts[:, :1].repeat(1, most)

    prompts = [[i, *[0] * (i % 2)] for i in range(2 * AT_ONCE + 10)]
    counted: list[int] = []
    written = write_all(echo, prompts, {1}, 3, counted.append)
    assert written == [[i] if i == 1 else [i] * 3 for i in range(2 * AT_ONCE + 10)]
    assert batches == [(AT_ONCE, 1), (5, 1), (AT_ONCE, 2), (5, 2)]
    assert counted == [AT_ONCE, 5, AT_ONCE, 5]


@pytest.mark.parametrize(
    ("row", "expected"),
    [([4, 5, 9, 4], [4, 5, 9]), ([9, 4, 4, 4], [9]), ([4, 4, 4, 4], [4, 4, 4, 4])],
)
def test_what_comes_after_the_end_is_dropped(row: list[int], expected: list[int]) -> None:
    assert write_all(lambda *_: torch.tensor([row]), [[1]], {9}, 4) == [expected]
