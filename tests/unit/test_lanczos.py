"""lanczos: top eigenpairs against the dense oracle, closed forms, broken input. Residuals are recomputed in float64."""

from dataclasses import fields
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rmtkernels
from rmtkernels import LanczosResult, lanczos_above, lanczos_eigh
from rmtkernels.laws import spike_to_sample
from rmtkernels.ops.lanczos_basis import Basis
from rmtkernels.ops.lanczos_multiply import LinearMap
from rmtkernels.reference import lanczos_eigh_ref, lanczos_matrix_ref
from tests.helpers import generator, normal, same_bits

DOUBLE, SINGLE = torch.float64, torch.float32
DTYPES = (SINGLE, DOUBLE)
EXACT = {SINGLE: 2e-6, DOUBLE: 1e-13}  # rounding: of eigenvalues and of what the residuals claim, relative to lambda_1


def with_spectrum(eigenvalues: Tensor, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with these eigenvalues: three random reflections of the diagonal one."""
    matrix = eigenvalues.double().diag()
    for step in range(3):
        v = normal(len(eigenvalues), seed=seed + step, dtype=DOUBLE)
        matrix = matrix - 2 * torch.outer(v, v @ matrix) / (v @ v)
        matrix = matrix - 2 * torch.outer(matrix @ v, v) / (v @ v)
    return ((matrix + matrix.mT) / 2).to(dtype)


def true_residuals(matrix: Tensor, result: LanczosResult, scale: float) -> Tensor:
    vectors, values = result.eigenvectors.double(), result.eigenvalues.double()
    return (matrix @ vectors - vectors * values).norm(dim=0) / scale


def check(
    result: LanczosResult, matrix: Tensor, k: int, gram: bool = False, center: bool = False, tol: float | None = None
) -> None:
    """Everything a result promises, against the float64 oracle."""
    dtype, dense = matrix.dtype, lanczos_matrix_ref(matrix, gram, center)
    want, _ = lanczos_eigh_ref(matrix, k, gram=gram, center=center)
    scale = max(float(torch.linalg.eigvalsh(dense).abs().max()), 1e-300)
    tol = rmtkernels.ops.lanczos.TOLERANCE[dtype] if tol is None else tol
    assert result.complete and result.converged.all() and result.steps >= 1
    assert result.eigenvalues.dtype == result.eigenvectors.dtype == dtype and result.residuals.dtype == DOUBLE
    assert result.eigenvalues.shape == (k,) and result.eigenvectors.shape == (matrix.shape[1], k)
    assert (result.eigenvalues.diff() <= 0).all()
    assert (result.eigenvalues.double() - want).abs().max() <= tol * scale
    residuals = true_residuals(dense, result, scale)
    assert (residuals <= tol + EXACT[dtype]).all()
    assert ((result.residuals - residuals).abs() <= EXACT[dtype]).all()
    gram_of_vectors = result.eigenvectors.double().mT @ result.eigenvectors.double()
    assert (gram_of_vectors - torch.eye(k)).abs().max() <= 3 * EXACT[dtype]
    peaks = result.eigenvectors.gather(0, result.eigenvectors.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spectrum",
    [
        torch.arange(1, 401).double() ** -0.5,
        torch.cat([torch.logspace(2, 1, 20), torch.linspace(0, 1, 380)]),
        -torch.arange(1.0, 401),
        torch.linspace(-1, 1, 400),
        1e30 * torch.linspace(0.5, 1, 400),
        1e-30 * torch.linspace(0.5, 1, 400),
        10.0 ** -torch.arange(0, 20, 0.05),
    ],
)
def test_known_spectra(spectrum: Tensor, dtype: torch.dtype, isa: str) -> None:
    matrix = with_spectrum(spectrum, dtype)
    check(lanczos_eigh(matrix, 12), matrix, 12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [3, 8, 20])
def test_every_copy_of_an_eigenvalue_is_found(copies: int, dtype: torch.dtype) -> None:
    """A Krylov space started from eight vectors holds eight copies at most."""
    matrix = with_spectrum(torch.cat([torch.tensor([2.0]), torch.ones(copies), torch.linspace(0, 0.9, 400)]), dtype)
    check(lanczos_eigh(matrix, copies + 5), matrix, copies + 5)
    above = lanczos_above(matrix, 0.95)
    assert len(above.eigenvalues) == copies + 1
    check(above, matrix, copies + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("matrix", "k"),
    [
        (torch.zeros(120, 120), 5),
        (torch.eye(120), 40),
        (torch.ones(120, 120), 9),
        (torch.full((120, 120), -1.0), 3),
        (torch.tensor([[-3.0]]), 1),
        (torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 2),
        (torch.arange(50.0).diag(), 50),
        (torch.arange(150.0).diag(), 149),
        (torch.outer(torch.arange(130.0), torch.arange(130.0)), 4),
    ],
)
def test_degenerate_matrices(matrix: Tensor, k: int, dtype: torch.dtype) -> None:
    check(lanczos_eigh(matrix.to(dtype), k), matrix.to(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("shape", "offset"), [((300, 90), 0.0), ((40, 200), 0.0), ((300, 90), 1e4), ((1, 30), 1.0), ((30, 1), 1.0)]
)
def test_gram_of_samples(shape: tuple[int, int], offset: float, center: bool, dtype: torch.dtype, isa: str) -> None:
    samples = normal(*shape, dtype=dtype) + offset
    k = min(6, shape[1])
    check(lanczos_eigh(samples, k, gram=True, center=center), samples, k, gram=True, center=center)


@pytest.mark.parametrize("center", [False, True])
def test_samples_of_low_rank(center: bool) -> None:
    samples = normal(200, 11) @ normal(11, 150, seed=1) + 3
    check(lanczos_eigh(samples, 25, gram=True, center=center), samples, 25, gram=True, center=center)


@given(
    n=st.integers(1, 70),
    d=st.integers(1, 70),
    rank=st.integers(0, 70),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    gram=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_any_shape_and_rank(n: int, d: int, rank: int, share: float, dtype: torch.dtype, gram: bool, seed: int) -> None:
    samples = (normal(n, rank, seed=seed, dtype=DOUBLE) @ normal(rank, d, seed=seed + 1, dtype=DOUBLE)).to(dtype)
    matrix = samples if gram else (samples.mT @ samples)
    k = 1 + int(share * (d - 1))
    check(lanczos_eigh(matrix, k, gram=gram, seed=seed), matrix, k, gram=gram)


def test_a_tight_tolerance_is_met_or_said_not_to_be() -> None:
    matrix = with_spectrum(torch.arange(1, 501).double() ** -0.5, SINGLE)
    check(lanczos_eigh(matrix, 20, tol=2e-6), matrix, 20, tol=2e-6)
    stopped = lanczos_eigh(matrix, 20, max_steps=6)
    assert stopped.steps == 6 and not stopped.complete and not stopped.converged.all()
    residuals = true_residuals(matrix.double(), stopped, 1.0)
    assert ((stopped.residuals - residuals).abs() <= 1e-5).all()
    assert torch.equal(stopped.converged, stopped.residuals <= 1e-5)
    limit = lanczos_eigh(matrix, 20, tol=1e-6, max_steps=300)
    assert limit.complete == bool((true_residuals(matrix.double(), limit, 1.0) <= 1.1e-6).all())


class NoHost(TorchDispatchMode):
    """Fails where Python would have to wait for a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function._schema.name not in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"), function
        return function(*args, **(kwargs or {}))


def test_nothing_waits_between_two_looks() -> None:
    dense = with_spectrum(torch.arange(200.0), SINGLE)
    for matrix, gram in ((dense, False), (normal(90, 70), True), (torch.eye(99), False)):
        basis = Basis(LinearMap(matrix, gram, gram, None), 64, normal(8, matrix.shape[1]), generator(0))
        with NoHost():
            while not basis.full():
                basis.step()
        assert basis.size == 64
        vectors = basis.vectors.double()
        assert (vectors @ vectors.mT - torch.eye(64)).abs().max() <= 2e-6


def test_fewer_than_k_when_stopped_before_the_basis_holds_k() -> None:
    stopped = lanczos_eigh(with_spectrum(torch.arange(200.0)), 50, max_steps=2)
    assert len(stopped.eigenvalues) == 16 and not stopped.complete


def test_restarts_keep_what_was_found() -> None:
    """A spectrum so dense at its end that the basis fills up several times."""
    matrix = with_spectrum(torch.linspace(0, 1, 1200).double())
    result = lanczos_eigh(matrix, 3)
    assert result.steps * 8 > 2 * rmtkernels.ops.lanczos.room_for(3)
    check(result, matrix, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 17, 60, 200])
def test_everything_above_a_threshold(count: int, dtype: torch.dtype) -> None:
    spectrum = torch.linspace(0, 1, 200).double()
    threshold = float(spectrum[199 - count] + 0.002) if count < 200 else -1.0
    matrix = with_spectrum(spectrum, dtype)
    result = lanczos_above(matrix, threshold)
    assert result.complete and len(result.eigenvalues) == count
    if count:
        check(result, matrix, count)


def test_above_the_edge_of_a_sample_covariance() -> None:
    n, d, spikes = 1200, 300, torch.tensor([9.0, 5.0, 3.0])
    samples = normal(n, d)
    samples[:, :3] *= spikes.sqrt()
    result = lanczos_above(samples, n * rmtkernels.laws.marchenko_pastur_edges(d / n)[1] * 1.02, gram=True)
    assert result.complete and len(result.eigenvalues) == 3
    want = torch.tensor(spike_to_sample(spikes.numpy(), d / n))
    assert ((result.eigenvalues / n - want).abs() <= 0.15 * want).all()


def test_above_says_when_it_was_stopped() -> None:
    stopped = lanczos_above(with_spectrum(torch.linspace(0, 1, 600)), 0.5, max_steps=20)
    assert not stopped.complete and stopped.steps == 20


def test_seeds_and_starts_decide_every_bit() -> None:
    matrix = with_spectrum(torch.arange(1, 301).double() ** -0.5, SINGLE)
    first, again, other = (lanczos_eigh(matrix, 5, seed=seed) for seed in (3, 3, 4))
    for field in fields(LanczosResult):
        a, b = getattr(first, field.name), getattr(again, field.name)
        assert same_bits(a, b) if isinstance(a, Tensor) else a == b
    assert not same_bits(first.eigenvectors, other.eigenvectors)
    wrong = lanczos_eigh_ref(matrix, 20)[1][:, 10:].float()  # an invariant subspace that holds none of the answer
    starts = (torch.zeros(300, 3), torch.ones(300, 2), normal(300, 1), normal(300, 200), first.eigenvectors, wrong)
    for start in starts:
        check(lanczos_eigh(matrix, 5, start=start), matrix, 5)


@pytest.mark.parametrize("start", [[0, 1, 3, 4, 5, 6], list(range(1, 90)), [*range(4), *range(5, 90)], [7], [2, 2, 0]])
@pytest.mark.parametrize("slow", [False, True])
def test_a_start_may_lack_what_is_wanted(start: list[int], slow: bool) -> None:
    """Eigenvectors as a start span an invariant subspace: all in it converges at once, and the rest is not in it."""
    spectrum = torch.arange(1, 401).double() ** -0.5 if slow else torch.linspace(0, 1, 400).flip(0).double()
    matrix = with_spectrum(spectrum, SINGLE)
    vectors = lanczos_eigh_ref(matrix, 100)[1][:, start].float()
    for begin in (vectors, torch.cat([vectors, normal(400, 3)], 1)):
        check(lanczos_eigh(matrix, 5, start=begin), matrix, 5)
        above = lanczos_above(matrix, float(spectrum[5:7].mean()), start=begin)
        check(above, matrix, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tol", [None, 1e-3])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_every_eigenvalue_of_a_cluster_is_found(spread: float, tol: float | None, dtype: torch.dtype) -> None:
    """Closer together than the tolerance, they look like copies when the search ends."""
    width = spread * (tol or rmtkernels.ops.lanczos.TOLERANCE[dtype])
    cluster = 1 + width * torch.linspace(-0.5, 0.5, 20).double()
    matrix = with_spectrum(torch.cat([cluster, torch.linspace(0, 0.9, 400).double()]), dtype)
    for result in (lanczos_eigh(matrix, 23, tol=tol), lanczos_above(matrix, 0.95, tol=tol)):
        check(result, matrix, len(result.eigenvalues), tol=tol)
        assert (result.eigenvalues > 0.95).sum() == 20


@pytest.mark.parametrize("gram", [False, True])
def test_autocast_changes_nothing(gram: bool) -> None:
    matrix = normal(90, 60) if gram else with_spectrum(torch.arange(60.0), SINGLE)
    want = lanczos_eigh(matrix, 4, gram=gram)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = lanczos_eigh(matrix, 4, gram=gram)
    assert same_bits(got.eigenvectors, want.eigenvectors)


def test_threads_do_not_change_a_bit(set_threads) -> None:
    for matrix, gram in ((with_spectrum(torch.arange(400.0), SINGLE), False), (normal(5000, 70), True)):
        block, bits = normal(8, matrix.shape[1], seed=9), []
        for threads in (1, 3):
            set_threads(threads)
            function = rmtkernels.lanczos_multiply_gram if gram else rmtkernels.lanczos_multiply
            bits.append(function(matrix, block))
        assert same_bits(*bits)


def test_layouts_and_inputs_stay() -> None:
    matrix = with_spectrum(torch.arange(90.0), SINGLE)
    want, before = lanczos_eigh(matrix, 4), matrix.clone()
    strided = torch.full((180, 180), torch.nan)
    strided[::2, ::2] = matrix
    for same in (strided[::2, ::2], matrix.mT.contiguous().mT, matrix.requires_grad_()):
        result = lanczos_eigh(same, 4)
        assert same_bits(result.eigenvectors, want.eigenvectors) and not result.eigenvalues.requires_grad
    assert same_bits(matrix.detach(), before)


def test_the_reference_backend_finds_the_same() -> None:
    matrix = with_spectrum(torch.arange(100.0), SINGLE)
    check(lanczos_eigh(matrix, 4, backend="reference"), matrix, 4)
    samples = normal(80, 50) + 7
    check(lanczos_eigh(samples, 4, gram=True, center=True, backend="reference"), samples, 4, gram=True, center=True)
