"""`_host`: the numerics shared by CPU and CUDA kernels, on NumPy arrays, against the oracle and closed forms."""

import numpy as np
import pytest
import torch

import rmtkernels
from rmtkernels import _host, laws
from rmtkernels.ops.law_table import law_table
from rmtkernels.reference import spectrum_descriptors_ref


@pytest.mark.parametrize("n", [1, 2, 5, 6, 31, 128])
@pytest.mark.parametrize("dim", [16, 576])
def test_descriptors_of_given_eigenvalues(n: int, dim: int) -> None:
    lam = np.sort(np.random.default_rng(n).exponential(size=n))[::-1] * 3.0
    gram = torch.from_numpy(np.diag(lam * dim))[None, None]
    want, _ = spectrum_descriptors_ref(gram, torch.tensor([n]), dim, center=False)
    got = _host.spectral_descriptors(
        lam, dim, n, law_table(n, dim), 0, float(np.log(lam.sum())), 1 / n, float(want[0, 0, -2])
    )
    assert got.shape == (len(rmtkernels.DESCRIPTORS),)
    np.testing.assert_allclose(got, want[0, 0], rtol=1e-6)


def test_noise_and_edge_of_a_marchenko_pastur_spectrum() -> None:
    variance, n, dim = 4.0, 100, 1000
    rows = np.random.default_rng(0).standard_normal((n, dim)) * np.sqrt(variance)
    lam = np.linalg.eigvalsh(rows @ rows.T / dim)[::-1]
    estimate = laws.noise_variance(lam, n / dim)
    assert estimate == pytest.approx(variance, rel=0.02)
    assert _host.upper_edge(variance, n, dim) == pytest.approx(
        variance * laws.marchenko_pastur_edges(n / dim)[1], rel=1e-12
    )
    assert lam[0] == pytest.approx(_host.upper_edge(estimate, n, dim), rel=0.1)


def test_tracy_widom_is_that_of_the_laws() -> None:
    s = np.concatenate([np.linspace(-12, 14, 500), [30.0, 1e3, 1e6, 1e9]])
    got = [_host.tracy_widom_log_survival(x, law_table(2, 4)) for x in s]
    np.testing.assert_allclose(got, laws.tracy_widom_log_survival(s), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("lam", [[1.0, 2.0], [-1.0], [np.nan], [[1.0]], [1.0] * 129])
def test_wrong_eigenvalues_are_refused(lam: list[float]) -> None:
    with pytest.raises(ValueError, match="eigenvalues"):
        _host.spectral_descriptors(np.array(lam), 10, 128, law_table(128, 10), 0, 0.0, 0.0, 0.0)


def test_the_build_report_names_the_shared_limits() -> None:
    report = _host.build_report()
    assert report["descriptors"] == len(rmtkernels.DESCRIPTORS) and report["max_window"] == 128
    assert report["cpp_standard"] >= 201703
