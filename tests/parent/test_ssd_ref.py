"""Law 6 for the scan: the chunked form against the step-by-step specification.

Compared: outputs, and gradients of all six inputs, for any length, grouping and chunk.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.strategies import TOLERANCE, assert_near, difference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic.config import ConfigError
from elastic.parent.ssd import resolve_kernels, scan
from elastic.parent.ssd_ref import CHUNK, ssd_chunked, ssd_recurrent

Inputs = tuple[Tensor, ...]


def random_inputs(
    time: int,
    heads: int = 4,
    groups: int = 2,
    channels: int = 3,
    states: int = 5,
    dtype: torch.dtype = torch.float32,
    step: float = 1.0,
    decay: float = 1.0,
) -> Inputs:
    """x, dt, a, b, c, d of `ssd_recurrent` for a batch of two; leaves that take a gradient."""
    generator = torch.Generator().manual_seed(time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = (
        normal(2, time, heads, channels),
        step * F.softplus(normal(2, time, heads)),
        -decay * torch.rand(heads, generator=generator),
        normal(2, time, groups, states),
        normal(2, time, groups, states),
        normal(heads),
    )
    return tuple(value.to(dtype).requires_grad_() for value in inputs)


def outputs_and_gradients(run: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """y, then the gradient of each input."""
    y = run(*inputs)
    weights = torch.linspace(-1, 1, y.numel()).sin().view(y.shape)
    return [y.detach(), *torch.autograd.grad((y.float() * weights).sum(), inputs)]


def assert_agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Outputs within the table; gradients within ten times it, their sums cancel."""
    assert_near(actual[0], expected[0])
    for name, value, wanted in zip("x dt a b c d".split(), actual[1:], expected[1:], strict=True):
        assert difference(value, wanted) <= 10 * TOLERANCE[torch.float32], f"gradient of {name}"


@given(
    time=st.integers(1, 70),
    per_group=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.integers(1, 4),
    states=st.integers(1, 4),
    chunk=st.integers(1, 90),
    decay=st.sampled_from([0.05, 1.0]),
)
def test_chunked_equals_recurrent_in_outputs_and_gradients(
    time: int, per_group: int, groups: int, channels: int, states: int, chunk: int, decay: float
) -> None:
    heads = per_group * groups
    inputs = random_inputs(time, heads, groups, channels, states, decay=decay)
    slow = outputs_and_gradients(ssd_recurrent, inputs)
    fast = outputs_and_gradients(lambda *i: ssd_chunked(*i, chunk=chunk), inputs)
    assert_agree(fast, slow)


@pytest.mark.parametrize("time", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_default_chunk_equals_recurrent_around_its_borders(time: int) -> None:
    inputs = random_inputs(time, decay=0.1)  # slow decay: far chunks are still felt
    slow = outputs_and_gradients(ssd_recurrent, inputs)
    fast = outputs_and_gradients(ssd_chunked, inputs)
    assert_agree(fast, slow)


@pytest.mark.parametrize("groups", [1, 2, 3, 6], ids="groups={}".format)
def test_head_i_reads_the_b_and_c_of_its_group(groups: int) -> None:
    """Both scans against each head alone with its group's B and C: no mix-up can hide in both."""
    heads = 6
    x, dt, a, b, c, d = random_inputs(9, heads, groups)
    for run in (ssd_recurrent, ssd_chunked):
        together = run(x, dt, a, b, c, d)
        for head in range(heads):
            group = head // (heads // groups)
            one, own = slice(head, head + 1), slice(group, group + 1)
            alone = run(x[:, :, one], dt[..., one], a[one], b[:, :, own], c[:, :, own], d[one])
            assert difference(together[:, :, one], alone) < 1e-5


def test_recurrent_equals_the_formula_written_out() -> None:
    """The specification: y_t = d x_t + sum over s <= t of (c_t . b_s) decay(s, t) dt_s x_s."""
    x, dt, a, b, c, d = (value.detach()[:1] for value in random_inputs(6, 1, 1, 1, 4))
    expected = []
    for t in range(6):
        y = d[0] * x[0, t, 0, 0]
        for s in range(t + 1):
            decay = torch.exp(a[0] * dt[0, s + 1 : t + 1, 0].sum())
            y = y + (c[0, t, 0] @ b[0, s, 0]) * decay * dt[0, s, 0] * x[0, s, 0, 0]
        expected.append(y)
    actual = ssd_recurrent(x, dt, a, b, c, d).flatten()
    assert difference(actual, torch.stack(expected)) < 1e-5


def test_a_longer_sequence_begins_like_a_shorter_one() -> None:
    """Padding and later chunks reach back to no earlier step."""
    x, dt, a, b, c, d = random_inputs(3 * CHUNK)
    whole = ssd_chunked(x, dt, a, b, c, d)
    for time in (1, CHUNK - 3, CHUNK, 2 * CHUNK + 7):
        part = ssd_chunked(x[:, :time], dt[:, :time], a, b[:, :time], c[:, :time], d)
        assert difference(whole[:, :time], part) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("run", [ssd_recurrent, ssd_chunked])
def test_bfloat16_goes_in_and_out_and_is_computed_in_float32(run: Callable[..., Tensor]) -> None:
    inputs = random_inputs(70, dtype=torch.bfloat16)
    rounded = tuple(value.detach().float().requires_grad_() for value in inputs)
    exact = outputs_and_gradients(ssd_recurrent, rounded)
    half = outputs_and_gradients(run, inputs)
    assert all(value.dtype == torch.bfloat16 for value in half)
    for value, wanted in zip(half, exact, strict=True):
        assert difference(value, wanted) < 2**-7, "only the last rounding is in bfloat16"


@pytest.mark.parametrize("decay", [1e2, 1e4, 1e6], ids="decay={:g}".format)
def test_large_decays_stay_finite_in_outputs_and_gradients(decay: float) -> None:
    inputs = random_inputs(2 * CHUNK + 3, step=10.0, decay=decay)
    slow = outputs_and_gradients(ssd_recurrent, inputs)
    fast = outputs_and_gradients(ssd_chunked, inputs)
    for value in (*slow, *fast):
        assert value.isfinite().all()
    # Sums of many large decays cancel in float32, ten times the usual rounding.
    assert difference(fast[0], slow[0]) <= 10 * TOLERANCE[torch.float32]


def test_no_decay_is_a_plain_sum() -> None:
    x, dt, _, b, c, d = random_inputs(2 * CHUNK + 3)
    still = torch.zeros(4)
    assert (
        difference(ssd_chunked(x, dt, still, b, c, d), ssd_recurrent(x, dt, still, b, c, d))
        <= (TOLERANCE[torch.float32])
    )


def test_scan_takes_the_chunked_path_on_a_cpu() -> None:
    """And takes raw step sizes, which it makes positive and keeps within the limit."""
    x, raw, a, b, c, d = random_inputs(5)
    kernels, bias = resolve_kernels("auto", torch.device("cpu")), torch.linspace(-4, 1, 4)
    dt = torch.log1p(torch.exp(raw + bias)).clamp(0.5, 1.0)
    assert (dt == 0.5).any() and (dt == 1.0).any() and ((0.5 < dt) & (dt < 1.0)).any()
    y = scan(x, raw, bias, (0.5, 1.0), a, b, c, d, kernels)
    assert_near(y, ssd_chunked(x, dt, a, b, c, d))


@pytest.mark.parametrize("kernels", ["auto", "mamba_ssm"])
def test_a_gpu_without_its_kernels_is_refused_in_one_line(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain scan there would be slow without a word; whoever wants it says so."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = (
        rf"^parent\.kernels={kernels}: mamba_ssm is not installed; pip install "
        r"--no-build-isolation mamba-ssm causal-conv1d, or set parent\.kernels=torch \(slower\)$"
    )
    with pytest.raises(ConfigError, match=line):
        resolve_kernels(kernels, torch.device("cuda"))
    assert resolve_kernels("torch", torch.device("cuda")) == "torch"
    assert resolve_kernels("auto", torch.device("cpu")) == "torch"


@pytest.mark.parametrize("installed", [True, False])
def test_kernels_without_a_gpu_are_refused_in_one_line(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if installed else None)
    with pytest.raises(ConfigError, match=r"^parent\.kernels=mamba_ssm: its kernels need a GPU.*$"):
        resolve_kernels("mamba_ssm", torch.device("cpu"))
    assert resolve_kernels("auto", torch.device("cpu")) == "torch"
    assert not installed or resolve_kernels("auto", torch.device("cuda")) == "mamba_ssm"


def test_slower_kernels_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "mamba_ssm" or None)
    assert resolve_kernels("auto", torch.device("cuda")) == "mamba_ssm"
    assert "causal_conv1d is not installed" in caplog.text


@pytest.mark.parametrize("mistake", ["group order", "lost carry"])
def test_the_comparison_notices_a_wrong_scan(mistake: str) -> None:
    """Guards the guard."""
    x, dt, a, b, c, d = random_inputs(70, decay=0.1)
    expected = ssd_recurrent(x, dt, a, b, c, d)
    if mistake == "group order":
        actual = ssd_chunked(x, dt, a, b.flip(2), c.flip(2), d)
    else:
        parts = [
            ssd_chunked(x[:, s], dt[:, s], a, b[:, s], c[:, s], d)
            for s in (slice(0, 64), slice(64, 70))
        ]
        actual = torch.cat(parts, dim=1)
    assert difference(actual, expected) > 100 * TOLERANCE[torch.float32]
