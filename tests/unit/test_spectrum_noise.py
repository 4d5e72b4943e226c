"""Descriptors that compare a window with noise or with its past: closed forms, simulated laws, continuity."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rmtkernels import DESCRIPTORS, laws, spectrum_descriptors
from tests.helpers import gram_of, normal

pytestmark = pytest.mark.usefixtures("isa", "nan_memory")

WIDE = 10**12  # so wide that the law is a point at sigma^2


def of_eigenvalues(lam: list[float], dim: int, **options: Any) -> dict[str, float]:
    """Descriptors, by name, of an uncentred window with these eigenvalues."""
    gram = torch.diag(torch.tensor(lam, dtype=torch.float64) * dim).float()[None, None]
    values, _ = spectrum_descriptors(gram, torch.tensor([len(lam)]), dim, center=False, **options)
    return dict(zip(DESCRIPTORS, values[0, 0].tolist(), strict=True))


def column(values: Tensor, name: str) -> Tensor:
    return values[..., DESCRIPTORS.index(name)].double()


@pytest.mark.parametrize("n", [2, 5, 6, 64, 128])
def test_equal_eigenvalues_are_noise_of_an_infinite_width(n: int) -> None:
    d = of_eigenvalues([3.0] * n, WIDE)
    for name in ("variance", "skewness", "log_median", "early_enrichment", "mp_wasserstein"):
        assert d[name] == pytest.approx(0, abs=2e-5), name
    assert d["mp_kl"] == pytest.approx(-math.log1p(-(2.0**-10) * 63 / 64), abs=1e-4)  # the floor under the law
    assert d["share_top5"] == pytest.approx(min(5, n) / n)


def test_one_outlier_in_closed_form() -> None:
    n, x = 10, math.exp(2.0)  # x lies on a point of the grid
    d = of_eigenvalues([x] + [1.0] * (n - 1), WIDE)
    mean = (x + n - 1) / n
    assert d["variance"] == pytest.approx(((x / mean - 1) ** 2 + (n - 1) * (1 / mean - 1) ** 2) / n, rel=1e-5)
    assert d["skewness"] == pytest.approx((n - 2) / math.sqrt(n - 1), rel=1e-5)  # that of any single outlier
    assert d["log_median"] == pytest.approx(-math.log(mean), rel=1e-5)
    shares = [x] + [1.0] * (n - 1)
    cumulated = [sum(shares[: k + 1]) / sum(shares) for k in range(n)]
    assert d["early_enrichment"] == pytest.approx(2 / n * sum(s - (k + 1) / n for k, s in enumerate(cumulated)))
    assert d["mp_wasserstein"] == pytest.approx(math.log1p((x - 1) / n), rel=1e-5)
    far = 1 / n * math.log(1 / n / (2.0**-10 / 64))
    near = (n - 1) / n * math.log((n - 1) / n / (1 - 2.0**-10 * 63 / 64))
    assert d["mp_kl"] == pytest.approx(far + near, rel=1e-4)


@pytest.mark.parametrize("n", [2, 7, 128])
def test_rank_one_windows(n: int) -> None:
    gram, seen = gram_of(normal(1, 1, 1, 30).expand(1, 1, n, 30))
    values, _ = spectrum_descriptors(gram, seen, 30, center=False)
    d = dict(zip(DESCRIPTORS, values[0, 0].tolist(), strict=True))
    assert d["variance"] == pytest.approx(n - 1, rel=1e-6)
    assert d["skewness"] == pytest.approx((n - 2) / math.sqrt(n - 1), rel=1e-5)
    assert d["early_enrichment"] == pytest.approx(1 - 1 / n, rel=1e-6)
    assert d["log_median"] == pytest.approx(math.log(2.0**-20 * n) if n > 2 else 0, abs=1e-5)
    assert d["overlap"] == pytest.approx(1)  # the newest row is like the others
    assert all(math.isfinite(value) for value in d.values())


@pytest.mark.parametrize("noise", ["median", "trace"])
@pytest.mark.parametrize("dim", [40, 7, 2000])
def test_tracy_widom_statistic_by_its_formula(dim: int, noise: str) -> None:
    lam = [5.0, 2.0, 1.5, 1.25, 1.0, 0.75, 0.5]
    n = len(lam)
    variance = laws.noise_variance(lam, n / dim, noise)
    center, scale = laws.tracy_widom_center_scale(n, dim)
    statistic = (dim * lam[0] / variance - center) / scale
    d = of_eigenvalues(lam, dim, noise=noise)
    assert d["tracy_widom"] == pytest.approx(math.asinh(statistic), rel=1e-5)
    assert d["tracy_widom_log_survival"] == pytest.approx(laws.tracy_widom_log_survival(statistic), rel=1e-5)


@pytest.mark.parametrize("dim", [3, 30, 3000])
def test_eigenvalues_at_the_cell_means_have_no_distance_to_the_law(dim: int) -> None:
    n = 20
    rank = min(n, dim)
    lam = [*laws.marchenko_pastur_cell_means(rank, n / dim).tolist(), *[0.0] * (n - rank)]
    assert of_eigenvalues(lam, dim, noise="trace")["mp_wasserstein"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("rows", "dim"), [(33, 64), (33, 576), (65, 1024), (65, 4096)])
def test_centred_noise_follows_the_laws(rows: int, dim: int) -> None:
    """Over many windows of noise with a large mean, against Tracy-Widom and the floors of the distances."""
    windows = 600
    gram, seen = gram_of(normal(1, windows, rows, dim, seed=rows + dim) + 2)
    by_trace, _ = spectrum_descriptors(gram, seen, dim, noise="trace")
    by_median, _ = spectrum_descriptors(gram, seen, dim)
    for values, bias in ((by_trace, 0.03), (by_median, 0.13)):  # what a finite window and the estimate of sigma^2 add
        statistic = column(values, "tracy_widom").sinh()
        error = float(statistic.std()) / math.sqrt(windows)
        assert float(statistic.mean()) == pytest.approx(laws.TRACY_WIDOM_MEAN, abs=3 * error + bias)
        assert float(statistic.std()) == pytest.approx(
            math.sqrt(laws.TRACY_WIDOM_VARIANCE), abs=0.25 if dim > 100 else 0.35
        )
        rare = (column(values, "tracy_widom_log_survival") < math.log(0.05)).double().mean()
        assert 0.01 < float(rare) < 0.12
        assert float(column(values, "mp_kl").mean()) < (0.06 if dim < 100 else 0.01 if rows < 40 else 0.004)
        if dim > 100:
            assert float(column(values, "mp_wasserstein").mean()) < 0.7 / rows
            above = (column(values, "above_edge") > 0).double().mean()
            assert float(above) == pytest.approx(laws.tracy_widom_survival(0.0), abs=0.06)
    assert float(column(by_trace, "overlap").mean()) == pytest.approx(math.sqrt((rows - 2) / (rows - 1)), abs=2e-2)


@pytest.mark.parametrize(("rows", "dim"), [(33, 64), (33, 576), (65, 1024)])
def test_noise_whose_rows_have_one_length_stays_below_tracy_widom(rows: int, dim: int) -> None:
    """Normalised rows fluctuate less: docs/conventions.md says by how much, and that the tail is then conservative."""
    gram, seen = gram_of(normal(1, 600, rows, dim, seed=rows + dim))
    values, _ = spectrum_descriptors(gram, seen, dim, normalize="rms")
    assert -2.3 < float(column(values, "tracy_widom").sinh().mean()) < -1.5
    rare = (column(values, "tracy_widom_log_survival") < math.log(0.05)).double().mean()
    assert float(rare) < 0.05


def test_a_spike_beyond_the_threshold_moves_every_distance_and_one_below_none() -> None:
    rows, dim, windows = 64, 4096, 60
    noise = normal(1, windows, rows, dim, seed=3)
    direction = torch.nn.functional.normalize(normal(1, windows, rows, 1, seed=4), dim=-2)
    loading = normal(1, windows, 1, dim, seed=5)

    def means(times_threshold: float) -> dict[str, float]:
        strength = times_threshold * math.sqrt(rows / dim)  # population eigenvalue 1 + strength, threshold 1 + sqrt q
        gram, seen = gram_of(noise + direction * loading * math.sqrt(strength))
        values, _ = spectrum_descriptors(gram, seen, dim, center=False)
        return {name: float(column(values, name).mean()) for name in DESCRIPTORS}

    none, below, above = means(0.0), means(0.3), means(5.0)
    for name, grows in (("mp_kl", 1.5), ("mp_wasserstein", 1.2), ("above_edge", 3.0)):
        assert below[name] < 1.2 * none[name] and above[name] > grows * none[name], name
    assert below["tracy_widom"] < none["tracy_widom"] + 0.5 < 3 < above["tracy_widom"]
    assert above["tracy_widom_log_survival"] < -20 < below["tracy_widom_log_survival"]


def test_overlap_by_the_covariances_themselves() -> None:
    window, dim = 6, 40
    rows = normal(1, 1, window, dim, seed=9, dtype=torch.float64) * 10 ** normal(window, 1, seed=10).double() + 3
    gram, _ = gram_of(rows)
    for center in (False, True):
        for seen in (2, 3, 6, 7, 8, 11, 12, 6 * 10**6 + 4):
            used = min(seen, window)
            newest = (seen - 1) % window
            others = [i for i in range(used) if i != newest]
            covariances = []
            for chosen in (list(range(used)), others):
                x = rows[0, 0, chosen]
                x = x - x.mean(0) if center else x
                covariances.append(x.T @ x)
            both = [c / c.norm() if c.norm() > 1e-9 else c * 0 for c in covariances]
            values, _ = spectrum_descriptors(gram, torch.tensor([seen]), dim, center=center)
            got = column(values, "overlap").item()
            assert got == pytest.approx(float((both[0] * both[1]).sum()), abs=2e-5), (center, seen)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("times", [70.0, 2000.0, 7000.0])
def test_overlap_beside_a_newest_row_far_longer_than_the_others(center: bool, times: float) -> None:
    rows = normal(1, 1, 128, 7, seed=2, dtype=torch.float64)
    rows[0, 0, -1] *= times
    gram, seen = gram_of(rows)
    got, _ = spectrum_descriptors(gram, seen, 7, center=center)
    want, _ = spectrum_descriptors(gram, seen, 7, center=center, backend="reference")
    assert column(got, "overlap").item() == pytest.approx(column(want, "overlap").item(), rel=1e-6)


def test_overlap_of_orthonormal_rows_and_of_what_has_no_past() -> None:
    for n in (2, 3, 50):
        assert of_eigenvalues([1.0] * n, 100)["overlap"] == pytest.approx(math.sqrt((n - 1) / n), rel=1e-6)
    assert of_eigenvalues([1.0], 100)["overlap"] == 0
    gram, seen = gram_of(normal(1, 1, 2, 9))
    assert column(spectrum_descriptors(gram, seen, 9)[0], "overlap").item() == 0  # one centred row is none
    rows = torch.zeros(1, 1, 4, 9)
    rows[0, 0, 3] = 1.0
    gram, seen = gram_of(rows)
    assert column(spectrum_descriptors(gram, seen, 9, center=False)[0], "overlap").item() == 0


@pytest.mark.parametrize("noise", ["median", "trace"])
@pytest.mark.parametrize("shape", ["spread", "cliff"])
def test_what_is_called_continuous_is(noise: str, shape: str) -> None:
    """Between two spectra, through bin borders, crossings and vanishing eigenvalues, jumps shrink with the step."""
    n, dim = 12, 300
    start = torch.linspace(3, 0.2, n).double()
    end = torch.full((n,), 1.0).double() if shape == "spread" else torch.tensor([9.0] + [1e-3] * 5 + [0.0] * 6).double()
    names = [name for name in DESCRIPTORS if name != "above_edge"]

    def largest_jumps(steps: int) -> Tensor:
        t = torch.linspace(0, 1, steps + 1).double()[:, None]
        lam = ((1 - t) * start + t * end).sort(-1, descending=True).values
        gram = torch.diag_embed(lam * dim).float()[None]
        values, _ = spectrum_descriptors(gram, torch.full((steps + 1,), n), dim, center=False, noise=noise)
        tail = DESCRIPTORS.index("tracy_widom_log_survival")
        values[..., tail] = values[..., tail].neg().log1p()
        return torch.stack([column(values[0], name).diff().abs().max() for name in names])

    coarse, fine = largest_jumps(500), largest_jumps(8000)
    for name, before, after in zip(names, coarse.tolist(), fine.tolist(), strict=True):
        assert after < 0.6 * before + 5e-4, f"{name}: {before:.3g} -> {after:.3g}"


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("joint", [None, "none", "trace"])
def test_normalising_forgets_the_length_of_every_row(center: bool, joint: str | None) -> None:
    rows = normal(2, 1, 9, 40, dtype=torch.float64)
    lengths = 2.0 ** torch.arange(-9, 9).reshape(2, 1, 9, 1)
    options = {"center": center, "joint": joint, "normalize": "rms"}
    want = spectrum_descriptors(
        *gram_of(rows / rows.square().mean(-1, keepdim=True).sqrt()), 40, **{**options, "normalize": None}
    )
    for scaled in (rows, rows * lengths):
        got = spectrum_descriptors(*gram_of(scaled), 40, **options)
        as_they_are = spectrum_descriptors(*gram_of(scaled), 40, **{**options, "normalize": None})
        trace = DESCRIPTORS.index("log_trace")
        torch.testing.assert_close(got[0][..., trace], as_they_are[0][..., trace])  # the one that keeps the scale
        others = [i for i in range(len(DESCRIPTORS)) if i != trace]
        torch.testing.assert_close(got[0][..., others], want[0][..., others], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(got[1], want[1], rtol=2e-5, atol=1e-6)


def test_normalised_uncentred_rows_have_trace_one_each_and_zero_rows_stay() -> None:
    rows = normal(1, 1, 6, 40)
    rows[0, 0, 2] = 0
    gram, seen = gram_of(rows)
    _, lam = spectrum_descriptors(gram, seen, 40, center=False, normalize="rms")
    assert float(lam.sum()) == pytest.approx(5, rel=1e-5)
    assert lam[0, 0, 5] == 0


@pytest.mark.parametrize("center", [False, True])
def test_the_share_of_the_mean_is_that_of_the_rows(center: bool) -> None:
    rows = (
        normal(2, 1, 9, 40, dtype=torch.float64)
        + normal(2, 1, 1, 40, seed=1) * torch.tensor([0.5, 4.0])[:, None, None, None]
    )
    gram, seen = gram_of(rows)
    in_mean, energy = 9 * rows.mean(-2).square().sum(-1)[:, 0], rows.square().sum((-2, -1))[:, 0]
    wanted = {
        None: in_mean / energy,
        "none": in_mean.sum(0, keepdim=True) / energy.sum(),
        "trace": (in_mean / energy).mean(0, keepdim=True),
    }
    for joint, want in wanted.items():
        values, _ = spectrum_descriptors(gram, seen, 40, center=center, joint=joint)
        torch.testing.assert_close(column(values, "mean_share")[:, 0], want, rtol=1e-5, atol=0)
    assert of_eigenvalues([1.0] * 8, 40)["mean_share"] == pytest.approx(1 / 8)
