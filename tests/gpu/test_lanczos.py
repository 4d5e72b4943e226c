"""lanczos on a GPU: products and block step against float64, whole searches against eigh, and nothing that waits."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import rmtkernels
from rmtkernels import (
    BackendError,
    DeviceError,
    LanczosResult,
    MatrixError,
    lanczos_above,
    lanczos_density,
    lanczos_eigh,
    lanczos_multiply,
    lanczos_multiply_gram,
    spike_count,
)
from rmtkernels.ops.lanczos_basis import Basis
from rmtkernels.ops.lanczos_multiply import LinearMap, column_mean, two_parts
from rmtkernels.reference import (
    lanczos_density_ref,
    lanczos_eigh_ref,
    lanczos_matrix_ref,
    lanczos_multiply_gram_ref,
    lanczos_multiply_ref,
    lanczos_orthonormalize_ref,
)
from tests.helpers import generator, normal, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        rmtkernels.dispatch.backends("lanczos_multiply")["cuda"] != "available", reason="no CUDA device or kernel"
    ),
]

SINGLE, DOUBLE = torch.float32, torch.float64
DTYPES = (SINGLE, DOUBLE)
ROUNDING = {SINGLE: 3e-7, DOUBLE: 1e-15}  # of products, relative to the sum of their magnitudes
EXACT = {SINGLE: 2e-6, DOUBLE: 1e-13}  # rounding: of eigenvalues and of what the residuals claim, relative to lambda_1
OPS = torch.ops.rmtkernels


def with_spectrum(eigenvalues: Tensor, dtype: torch.dtype = SINGLE) -> Tensor:
    """A dense symmetric matrix on the GPU with these eigenvalues."""
    d = len(eigenvalues)
    vectors = torch.linalg.qr(normal(d, d, dtype=DOUBLE).cuda())[0]
    matrix = vectors * eigenvalues.double().cuda() @ vectors.mT
    return ((matrix + matrix.mT) / 2).to(dtype)


def check(result: LanczosResult, matrix: Tensor, k: int, tol: float | None = None, **options: bool) -> None:
    """Everything a result promises, against the float64 oracle on the CPU."""
    dtype, dense = matrix.dtype, lanczos_matrix_ref(matrix.cpu(), **options)
    want, _ = lanczos_eigh_ref(matrix.cpu(), k, **options)
    scale = max(float(torch.linalg.eigvalsh(dense).abs().max()), 1e-300)
    tol = rmtkernels.ops.lanczos.TOLERANCE[dtype] if tol is None else tol
    assert all(x.is_cuda for x in (result.eigenvalues, result.eigenvectors, result.residuals, result.converged))
    assert result.complete and result.eigenvectors.shape == (matrix.shape[1], k)
    values, vectors = result.eigenvalues.cpu().double(), result.eigenvectors.cpu().double()
    assert (values - want).abs().max() <= tol * scale
    residuals = (dense @ vectors - vectors * values).norm(dim=0) / scale
    assert (residuals <= tol + EXACT[dtype]).all()
    assert ((result.residuals.cpu() - residuals).abs() <= EXACT[dtype]).all()
    assert (vectors.mT @ vectors - torch.eye(k)).abs().max() <= 3 * EXACT[dtype]


@pytest.fixture(params=["off", "allow_tf32", "fp32_precision"])
def tf32(request: pytest.FixtureRequest) -> Any:
    """TensorFloat-32 for the whole process, by the older and by the newer switch; it must be as it was afterwards."""
    matmul = torch.backends.cuda.matmul
    if request.param == "allow_tf32":
        matmul.allow_tf32 = True
    elif request.param == "fp32_precision":
        matmul.fp32_precision = "tf32"
    before = matmul.fp32_precision
    yield
    assert matmul.fp32_precision == before
    if request.param == "allow_tf32":
        assert matmul.allow_tf32
        matmul.allow_tf32 = False
    elif request.param == "fp32_precision":
        matmul.fp32_precision = "none"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vectors", [0, 1, 8, 20])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (13, 255), (256, 256), (30, 700), (2500, 3001)])
def test_products(rows: int, cols: int, vectors: int, dtype: torch.dtype, tf32: None) -> None:
    matrix, block = normal(rows, cols, dtype=dtype).cuda(), normal(vectors, cols, seed=1, dtype=dtype).cuda()
    bound = block.double().abs() @ matrix.double().abs().mT
    got = lanczos_multiply(matrix, block, backend="cuda")
    assert got.shape == (vectors, rows) and got.dtype == dtype
    assert ((got - lanczos_multiply_ref(matrix, block)).abs() <= ROUNDING[dtype] * bound).all()
    assert same_bits(got, lanczos_multiply(matrix, block))
    padded = torch.full((rows, cols + 7), torch.nan, dtype=dtype).cuda()
    padded[:, 3:-4] = matrix
    assert ((lanczos_multiply(padded[:, 3:-4], block) - got).abs() <= 2 * ROUNDING[dtype] * bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [None, 0.0, 1e4])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (300, 505), (1009, 17), (70000, 300)])
def test_gram_products(rows: int, cols: int, offset: float | None, dtype: torch.dtype, tf32: None) -> None:
    samples = (normal(rows, cols, dtype=dtype) + (offset or 0.0)).cuda()
    block, mean = normal(8, cols, seed=1, dtype=dtype).cuda(), None if offset is None else column_mean(samples)
    centred = (samples.double() if mean is None else samples.double() - mean).abs()
    bound = block.double().abs() @ centred.mT @ centred
    want = lanczos_multiply_gram_ref(samples, None if mean is None else two_parts(mean, DOUBLE), block)
    got = lanczos_multiply_gram(samples, block, mean=mean, backend="cuda")
    slack = 1e-11 if offset == 1e4 and dtype == DOUBLE else 0.0  # float64 holds the mean itself to 1e-12
    oracle = 6e-17 * rows**0.5
    assert ((got - want).abs() <= (2 * ROUNDING[dtype] + oracle + slack) * bound + slack * rows).all()


def orthonormalize_arguments(count: int, size: int, dim: int, dtype: torch.dtype) -> tuple[Any, ...]:
    basis = torch.linalg.qr(normal(dim, size, dtype=DOUBLE))[0].mT
    rows = 5 * normal(count, size, seed=1, dtype=DOUBLE) @ basis + normal(count, dim, seed=2, dtype=DOUBLE)
    noise = normal(count, dim, seed=3, dtype=DOUBLE) / dim**0.5
    tensors = (x.to(dtype).contiguous().cuda() for x in (rows, basis, noise))
    return *tensors, torch.tensor(64 * torch.finfo(dtype).eps, dtype=DOUBLE).cuda(), 3 % dim


def check_orthonormal(arguments: tuple[Any, ...], unit: Tensor, triangle: Tensor, products: Tensor) -> None:
    rows, basis = (x.double() for x in arguments[:2])
    eps, unit = torch.finfo(arguments[0].dtype).eps, unit.double()
    largest = float(rows.norm(dim=1).max())
    assert (unit @ unit.mT - torch.eye(len(unit)).cuda()).abs().max() <= 24 * eps
    if len(basis):
        assert (unit @ basis.mT).abs().max() <= 64 * eps
    lost = rows - products @ basis - triangle[: len(unit)].mT @ unit
    assert lost.abs().max() <= 64 * eps * largest + float(arguments[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 0, 1), (8, 0, 64), (8, 40, 131), (20, 9, 4096), (8, 448, 4096), (3, 2047, 2048), (208, 5, 300)]
)
def test_the_block_step_matches_the_oracle(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments = orthonormalize_arguments(*shape, dtype)
    got = OPS.lanczos_orthonormalize(*arguments)
    check_orthonormal(arguments, *got)
    if shape[0] < shape[2] - shape[1]:
        eps = torch.finfo(dtype).eps
        for one, other in zip(got, lanczos_orthonormalize_ref(*arguments[:2]), strict=True):
            assert (one - other).abs().max() <= 3000 * eps * max(1.0, float(other.abs().max())) if one.numel() else True
    again = OPS.lanczos_orthonormalize(*arguments)
    assert all(map(same_bits, got, again))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_depend_on_others_give_way_to_random_ones(dtype: torch.dtype) -> None:
    arguments = orthonormalize_arguments(8, 100, 3000, dtype)
    rows, basis = arguments[:2]
    rows[3], rows[5], rows[6] = rows[1], 0, basis[:8].sum(0)
    unit, triangle, products = OPS.lanczos_orthonormalize(*arguments)
    check_orthonormal(arguments, unit, triangle, products)
    assert (triangle.diagonal()[[3, 5, 6]] <= arguments[3]).all()


def test_the_block_step_passes_opcheck() -> None:
    for shape in ((8, 9, 70), (8, 66, 70)):
        torch.library.opcheck(OPS.lanczos_orthonormalize.default, orthonormalize_arguments(*shape, SINGLE))
    torch.library.opcheck(OPS.lanczos_multiply.default, (normal(7, 300).cuda(), normal(3, 300).cuda()))
    mean = two_parts(normal(9, dtype=DOUBLE).cuda(), SINGLE)
    torch.library.opcheck(OPS.lanczos_multiply_gram.default, (normal(7, 9).cuda(), mean, normal(3, 9).cuda()))


def test_the_kernel_checks_before_it_touches_memory() -> None:
    rows, basis, noise, negligible, shift = orthonormalize_arguments(8, 9, 70, SINGLE)
    for wrong in (
        (rows.cpu(), basis, noise, negligible, shift),
        (rows, basis.cpu(), noise, negligible, shift),
        (rows, basis, noise, negligible.cpu(), shift),
        (rows, basis.double(), noise, negligible, shift),
        (rows, basis[:, :60], noise, negligible, shift),
        (rows, basis, noise[:7], negligible, shift),
        (rows, basis, noise, negligible.float(), shift),
        (rows, basis, noise, negligible, 70),
        (rows.half(), basis.half(), noise.half(), negligible, shift),
    ):
        with pytest.raises(RuntimeError, match="lanczos_orthonormalize"):
            OPS.lanczos_orthonormalize(*wrong)


def test_a_basis_of_more_than_2_to_the_31_entries() -> None:
    dim, size = 1 << 21, 1100
    basis = torch.zeros(size, dim, device="cuda")
    basis[torch.arange(size), torch.arange(size) + dim - size] = 1  # the last columns
    rows, noise = normal(8, dim).cuda(), normal(8, dim, seed=1).cuda()
    unit, triangle, products = OPS.lanczos_orthonormalize(rows, basis, noise, torch.zeros((), dtype=DOUBLE).cuda(), 0)
    assert torch.equal(products.float(), rows[:, -size:])
    assert not unit[:, -size:].any()
    assert (unit.double() @ unit.double().mT - torch.eye(8).cuda()).abs().max() <= 1e-6
    assert (triangle.float().mT @ unit - rows)[:, :-size].abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spectrum",
    [
        torch.arange(1, 401) ** -0.5,
        torch.cat([torch.logspace(2, 1, 20), torch.linspace(0, 1, 380)]),
        -torch.arange(1.0, 401),
        torch.linspace(-1, 1, 400),
        1e30 * torch.linspace(0.5, 1, 400).double(),
        1e-30 * torch.linspace(0.5, 1, 400).double(),
        10.0 ** -torch.arange(0, 20, 0.05).double(),
        torch.cat([torch.ones(11), torch.zeros(300)]),
    ],
)
def test_known_spectra(spectrum: Tensor, dtype: torch.dtype) -> None:
    matrix = with_spectrum(spectrum, dtype)
    check(lanczos_eigh(matrix, 12, backend="cuda"), matrix, 12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_every_eigenvalue_of_a_cluster_is_found(spread: float, dtype: torch.dtype) -> None:
    tol = rmtkernels.ops.lanczos.TOLERANCE[dtype]
    cluster = 1 + spread * tol * torch.linspace(-0.5, 0.5, 20).double()
    matrix = with_spectrum(torch.cat([cluster, torch.linspace(0, 0.9, 400).double()]), dtype)
    for result in (lanczos_eigh(matrix, 23), lanczos_above(matrix, 0.95)):
        check(result, matrix, len(result.eigenvalues))
        assert (result.eigenvalues > 0.95).sum() == 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("matrix", "k"),
    [(torch.zeros(120, 120), 5), (torch.eye(120), 40), (torch.ones(120, 120), 9), (torch.tensor([[-3.0]]), 1),
     (torch.arange(50.0).diag(), 50), (torch.arange(150.0).diag(), 149)],
)  # fmt: skip
def test_degenerate_matrices(matrix: Tensor, k: int, dtype: torch.dtype) -> None:
    matrix = matrix.to(dtype).cuda()
    check(lanczos_eigh(matrix, k), matrix, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("shape", "offset"), [((900, 90), 0.0), ((40, 200), 1e4), ((900, 90), 1e4), ((1, 30), 1.0)])
def test_gram_of_samples(shape: tuple[int, int], offset: float, center: bool, dtype: torch.dtype, tf32: None) -> None:
    samples = (normal(*shape, dtype=dtype) + offset).cuda()
    check(lanczos_eigh(samples, 6, gram=True, center=center), samples, 6, gram=True, center=center)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 17, 60])
def test_everything_above_a_threshold(count: int, dtype: torch.dtype) -> None:
    spectrum = torch.linspace(0, 1, 200).double()
    matrix = with_spectrum(spectrum, dtype)
    result = lanczos_above(matrix, float(spectrum[199 - count] + 0.002))
    assert result.complete and len(result.eigenvalues) == count
    if count:
        check(result, matrix, count)


def test_starts() -> None:
    matrix = with_spectrum(torch.arange(1, 301) ** -0.5)
    wrong = lanczos_eigh_ref(matrix.cpu(), 20)[1][:, 10:].float()  # an invariant subspace that holds none of the answer
    for start in (torch.zeros(300, 3), torch.ones(300, 2), normal(300, 200), wrong, wrong[:, [0, 0, 1]]):
        check(lanczos_eigh(matrix, 5, start=start.cuda()), matrix, 5)
    with pytest.raises(DeviceError):
        lanczos_eigh(matrix, 5, start=wrong)


def test_restarts_keep_what_was_found() -> None:
    matrix = with_spectrum(torch.linspace(0, 1, 1200))
    result = lanczos_eigh(matrix, 3)
    assert result.steps * 8 > 2 * rmtkernels.ops.lanczos.room_for(3)
    check(result, matrix, 3)


def test_the_same_bits_again(tf32: None) -> None:
    matrix = with_spectrum(torch.arange(1, 1001) ** -0.5)
    first, again = lanczos_eigh(matrix, 20), lanczos_eigh(matrix, 20)
    for field in fields(LanczosResult):
        a, b = getattr(first, field.name), getattr(again, field.name)
        assert same_bits(a.cpu(), b.cpu()) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_between_two_looks(dtype: torch.dtype) -> None:
    dense = with_spectrum(torch.arange(600.0), dtype)
    for matrix, gram in ((dense, False), (normal(90, 700, dtype=dtype).cuda(), True), (torch.eye(99).cuda(), False)):
        start = normal(8, matrix.shape[1], dtype=matrix.dtype).cuda()
        basis = Basis(LinearMap(matrix, gram, gram, "cuda"), 96, start, generator(0))
        basis.step()  # libraries may wait when they are first used
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            while not basis.full():
                basis.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        vectors = basis.vectors[: basis.size].double()
        assert basis.size == 96
        assert (vectors @ vectors.mT - torch.eye(96).cuda()).abs().max() <= EXACT[matrix.dtype]


def test_runs_on_the_current_stream() -> None:
    matrix = with_spectrum(torch.arange(1, 501) ** -0.5)
    want, late = lanczos_eigh(matrix, 5), torch.zeros_like(matrix)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # another stream would read zeros meanwhile
        late.copy_(matrix)
        got = lanczos_eigh(late, 5)
        torch.cuda.current_stream().synchronize()
    check(got, matrix, 5)
    assert (got.eigenvalues - want.eigenvalues).abs().max() <= 1e-5


def test_density_and_spikes(tf32: None) -> None:
    samples = normal(1200, 600)
    samples[:, :3] *= torch.tensor([9.0, 5.0, 4.0]).sqrt()
    matrix = samples.mT @ samples / 1200
    nodes, weights = lanczos_density(matrix.cuda(), steps=40)
    want, share = lanczos_density_ref(matrix)
    assert abs(float((nodes * weights).sum() - (want * share).sum())) <= 0.02
    count = spike_count(matrix.cuda(), backend="cuda")
    assert count.count == 3
    assert (count.eigenvalues - want.flip(0)[:3]).abs().max() <= 1e-4 * want[-1]


def test_what_is_refused() -> None:
    matrix = with_spectrum(torch.arange(60.0))
    for bad in (torch.nan, torch.inf):
        spoilt = matrix.clone()
        spoilt[3, 7] = spoilt[7, 3] = bad
        with pytest.raises(MatrixError, match="NaN, infinite"):
            lanczos_eigh(spoilt, 3)
    with pytest.raises(MatrixError, match="not symmetric"):
        lanczos_eigh(normal(60, 60).cuda(), 3)
    with pytest.raises(BackendError):
        lanczos_eigh(matrix.cpu(), 3, backend="cuda")
    with pytest.raises(BackendError):
        lanczos_eigh(matrix, 3, backend="cpu")
    check(lanczos_eigh(matrix, 3, backend="reference"), matrix, 3)


def test_autocast_changes_nothing() -> None:
    matrix = with_spectrum(torch.arange(60.0))
    want = lanczos_eigh(matrix, 4)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert same_bits(lanczos_eigh(matrix, 4).eigenvectors, want.eigenvectors)
