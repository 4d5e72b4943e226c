"""spectrum on a GPU: against LAPACK and the CPU kernel, bit for bit with itself, and as the decode path needs it."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import rmtkernels
from rmtkernels import spectrum_descriptors, spectrum_descriptors_, spectrum_eigvalsh
from tests.helpers import gram_of, normal, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        rmtkernels.dispatch.backends("spectrum_descriptors_")["cuda"] != "available", reason="no CUDA device or kernel"
    ),
]

DOUBLE = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_every_size_agrees_with_lapack(dtype: torch.dtype) -> None:
    for n in range(1, 129):
        full, thin = normal(3, n, n, seed=n, dtype=DOUBLE), normal(3, n, max(1, n // 3), seed=n, dtype=DOUBLE)
        matrices = torch.cat([full + full.mT, thin @ thin.mT]).to(dtype)
        values = spectrum_eigvalsh(matrices.cuda(), backend="cuda").cpu()
        exact = torch.from_numpy(np.linalg.eigvalsh(matrices.double().numpy()))
        bound = 2e-15 * exact.abs().amax(-1, keepdim=True) * n**0.5
        bound = bound + 2.0**-24 * exact.abs() if dtype == torch.float32 else bound
        assert (values.diff(dim=-1) >= 0).all()
        assert ((values.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("order", [1, -1])
def test_small_eigenvalues_of_a_graded_matrix_keep_their_digits(order: int) -> None:
    decades = torch.arange(100, dtype=DOUBLE) / 99 * 6
    scale = 10.0 ** -(decades if order == 1 else decades.flip(0))
    x = normal(100, 100, dtype=DOUBLE)
    matrix = scale[:, None] * (torch.eye(100, dtype=DOUBLE) + (x + x.T) / 2000) * scale
    want = spectrum_eigvalsh(matrix)
    assert ((spectrum_eigvalsh(matrix.cuda()).cpu() - want).abs() <= 1e-11 * want).all()


def test_a_bad_entry_spoils_its_matrix_alone() -> None:
    matrices = torch.eye(9).repeat(3, 1, 1)
    matrices[1, 4, 2] = torch.nan
    values = spectrum_eigvalsh(matrices.cuda()).cpu()
    assert values[1].isnan().all()
    assert (values[[0, 2]] == 1).all()


@pytest.mark.parametrize("dim", [3, 200, 4096])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 16, 32, 33, 64, 65, 128])
def test_descriptors_are_those_of_the_cpu(window: int, dim: int) -> None:
    rows = normal(3, 4, window, min(dim, 300), dtype=DOUBLE) + 2 * normal(3, 4, window, 1, seed=9, dtype=DOUBLE)
    gram, _ = gram_of(rows * torch.tensor([1.0, 0.1, 30.0], dtype=DOUBLE)[:, None, None, None])
    seen = torch.tensor([window, max(1, window - 2), 0, 10**6 + 1])
    for center, joint, normalize, noise in itertools.product(
        (True, False), (None, "none", "trace"), (None, "rms"), ("median", "trace")
    ):
        options = {"center": center, "joint": joint, "normalize": normalize, "noise": noise}
        got = [x.cpu() for x in spectrum_descriptors(gram.cuda(), seen.cuda(), dim, backend="cuda", **options)]
        want = spectrum_descriptors(gram, seen, dim, **options)
        assert ((got[1].double() - want[1]).abs() <= 1e-7 * want[1] + 1e-13 * want[1][..., :1].double()).all()
        torch.testing.assert_close(got[0], want[0], rtol=3e-7, atol=3e-7)


@pytest.fixture
def windows() -> tuple[Tensor, Tensor]:
    seen = torch.randint(0, 90, (33,), generator=torch.Generator().manual_seed(0))
    return gram_of(normal(4, 33, 64, 100))[0].cuda(), seen.cuda()


def test_bits_do_not_depend_on_the_run_or_the_company(windows: tuple[Tensor, Tensor]) -> None:
    gram, seen = windows
    want = spectrum_descriptors(gram, seen, 100)
    assert all(all(map(same_bits, spectrum_descriptors(gram, seen, 100), want)) for _ in range(50))
    for layer, b in itertools.product(range(4), range(33)):
        alone = spectrum_descriptors(gram[layer : layer + 1, b : b + 1].contiguous(), seen[b : b + 1], 100)
        assert all(same_bits(a[0, 0], w[layer, b]) for a, w in zip(alone, want, strict=True))
    seven = torch.full_like(seen, 7)
    tight = spectrum_descriptors(gram[..., :7, :7].contiguous(), seven, 100)
    assert same_bits(tight[0], spectrum_descriptors(gram, seven, 100)[0])


def test_neither_waits_nor_allocates_and_can_be_captured(windows: tuple[Tensor, Tensor]) -> None:
    wide = gram_of(normal(2, 3, 128, 200))[0].cuda(), torch.tensor([128, 200, 5]).cuda()  # more than 48 KB a block
    for (gram, seen), dim in ((windows, 100), (wide, 200)):
        want = spectrum_descriptors(gram, seen, dim)
        out = tuple(torch.full_like(x, torch.nan) for x in want)
        spectrum_descriptors_(*out, gram, seen, dim)
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            spectrum_descriptors_(*out, gram, seen, dim)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            spectrum_descriptors_(*out, gram, seen, dim)
        for buffer in out:
            buffer.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(same_bits, out, want))


def test_runs_on_the_current_stream(windows: tuple[Tensor, Tensor]) -> None:
    gram, seen = windows
    want = spectrum_descriptors(gram, seen, 100)
    late = torch.zeros_like(gram)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # another stream would read zeros meanwhile
        late.copy_(gram)
        got = spectrum_descriptors(late, seen, 100)
        torch.cuda.current_stream().synchronize()
    assert all(map(same_bits, got, want))


def test_follows_a_window_pushed_on_the_gpu() -> None:
    states = [rmtkernels.SlidingWindow(4, 3, 8, 96, dtype=torch.float32, device=device) for device in ("cuda", "cpu")]
    for step in range(11):
        rows = [normal(3, 96, seed=10 * step + layer) for layer in range(4)]
        states[0].update([row.cuda() for row in rows])
        states[1].update(rows)
    got, want = (state.descriptors() for state in states)
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-5, atol=1e-6)


def test_tensors_of_another_device_are_refused(windows: tuple[Tensor, Tensor]) -> None:
    gram, seen = windows
    out, values = spectrum_descriptors(gram, seen, 100)
    with pytest.raises(rmtkernels.DeviceError):
        spectrum_descriptors(gram, seen.cpu(), 100)
    with pytest.raises(rmtkernels.DeviceError):
        spectrum_descriptors_(out.cpu(), values, gram, seen, 100)


def test_compiles_without_a_graph_break(windows: tuple[Tensor, Tensor]) -> None:
    gram, seen = windows
    compiled = torch.compile(lambda g, s: spectrum_descriptors(g, s, 100), backend="aot_eager", fullgraph=True)
    assert all(map(same_bits, compiled(gram, seen), spectrum_descriptors(gram, seen, 100)))
