"""spectrum_descriptors: against the oracle, against closed forms, and at the edges of their definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmtkernels import DESCRIPTORS, spectrum_descriptors
from rmtkernels.laws import marchenko_pastur_median
from rmtkernels.reference import spectrum_descriptors_ref
from tests.helpers import gram_of, normal, same_bits

pytestmark = pytest.mark.usefixtures("isa", "nan_memory")

SHARES = slice(0, 5)
RATIOS = slice(6, 10)
BASIC = [i for i, name in enumerate(DESCRIPTORS) if not name.startswith("mp_")]
ZERO_WINDOW = [0.0] * 6 + [1.0] * 4 + [math.log(torch.finfo(torch.float32).tiny)] + [0.0] * 13
EQUAL_ROWS = [*ZERO_WINDOW[:11], 1.0, *ZERO_WINDOW[12:]]  # centred: all of the energy was in the mean


def named(descriptors: Tensor) -> dict[str, Tensor]:
    return dict(zip(DESCRIPTORS, descriptors.unbind(-1), strict=True))


def assert_near_oracle(result: tuple[Tensor, Tensor], oracle: tuple[Tensor, Tensor]) -> None:
    """One rounding to float32 of what float64 arithmetic gives; the smallest eigenvalues to 1e-13 of the largest."""
    (descriptors, eigenvalues), (want, want_eigenvalues) = result, oracle
    assert descriptors.shape == want.shape
    assert eigenvalues.shape == want_eigenvalues.shape
    largest = want_eigenvalues[..., :1]
    assert ((eigenvalues - want_eigenvalues).abs() <= 1e-7 * want_eigenvalues + 1e-13 * largest + 2.0**-149).all()
    torch.testing.assert_close(descriptors[..., BASIC].double(), want[..., BASIC], rtol=3e-7, atol=1e-12)
    # Distances to the law: the oracle's own quadrature is good to 1e-7
    torch.testing.assert_close(descriptors.double(), want, rtol=3e-7, atol=3e-7)


@settings(max_examples=150)
@given(
    layers=st.integers(1, 3),
    window=st.sampled_from((1, 2, 3, 4, 5, 6, 8, 13, 32, 65, 128)),
    seen=st.lists(st.sampled_from((0, 1, 2, 3, 5, 7, 31, 127, 128, 10**6)), max_size=10),
    dim=st.sampled_from((1, 2, 3, 7, 64, 1000)),
    center=st.booleans(),
    joint=st.sampled_from((None, "none", "trace")),
    normalize=st.sampled_from((None, "rms")),
    noise=st.sampled_from(("median", "trace")),
    scale=st.sampled_from((1e-15, 1e-3, 1.0, 1e12)),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_oracle(
    layers: int,
    window: int,
    seen: list[int],
    dim: int,
    center: bool,
    joint: str | None,
    normalize: str | None,
    noise: str,
    scale: float,
    seed: int,
) -> None:
    rows = normal(layers, len(seen), window, dim, seed=seed, dtype=torch.float64) * scale
    rows *= 10.0 ** normal(layers, 1, 1, 1, seed=seed + 1, dtype=torch.float64)
    gram, _ = gram_of(rows)
    counts = torch.tensor(seen, dtype=torch.int64)
    options = {"center": center, "joint": joint, "normalize": normalize, "noise": noise}
    oracle = spectrum_descriptors_ref(gram, counts, dim, **options)
    for b, count in enumerate(seen):  # what is not in use is not read
        gram[:, b, count:] = torch.nan
        gram[:, b, :, count:] = torch.nan
    assert_near_oracle(spectrum_descriptors(gram, counts, dim, **options), oracle)


@pytest.mark.parametrize("n", [2, 5, 6, 64, 128])
def test_orthonormal_rows_have_equal_eigenvalues(n: int) -> None:
    values, eigenvalues = spectrum_descriptors(4 * torch.eye(n)[None, None], torch.tensor([n]), 2 * n, center=False)
    d = named(values[0, 0])
    assert torch.equal(eigenvalues[0, 0], torch.full((n,), 4 / (2 * n)))
    torch.testing.assert_close(values[0, 0, SHARES], torch.tensor([1 / n if i < n else 0.0 for i in range(5)]))
    assert (values[0, 0, RATIOS][: n - 1] == 1).all()
    assert d["entropy"] == pytest.approx(math.log(n), rel=1e-6)
    assert d["participation"] == pytest.approx(n, rel=1e-6)
    assert d["log_trace"] == pytest.approx(math.log(2.0), rel=1e-6)
    assert d["above_edge"] == 0


@pytest.mark.parametrize("n", [3, 6, 64, 128])
def test_orthonormal_rows_centred_lose_one_eigenvalue(n: int) -> None:
    values, eigenvalues = spectrum_descriptors(torch.eye(n)[None, None], torch.tensor([n]), 2 * n)
    d = named(values[0, 0])
    assert eigenvalues[0, 0, n - 1] == 0
    torch.testing.assert_close(eigenvalues[0, 0, : n - 1], torch.full((n - 1,), 1 / (2 * n)))
    assert d["entropy"] == pytest.approx(math.log(n - 1), rel=1e-6)
    assert d["log_trace"] == pytest.approx(math.log((n - 1) / (2 * n)), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 16, 17, 40, 128])
def test_equal_rows_are_rank_one_uncentred_and_zero_centred(n: int) -> None:
    gram, seen = gram_of(normal(1, 1, 1, 30).expand(1, 1, n, 30))
    values, eigenvalues = spectrum_descriptors(gram, seen, 30, center=False)
    d = named(values[0, 0])
    assert eigenvalues[0, 0, 0] == pytest.approx(n * gram[0, 0, 0, 0].item() / 30, rel=1e-6)
    assert (eigenvalues[0, 0, 1:] <= 1e-14 * eigenvalues[0, 0, 0]).all()
    assert (d["share_1"], d["participation"], d["above_edge"]) == pytest.approx((1, 1, 1 if n > 1 else 0), rel=1e-6)
    assert d["entropy"] == pytest.approx(0, abs=1e-11)
    assert d["ratio_1"] == pytest.approx(2.0**20 if n > 1 else 1, rel=1e-6)
    values, eigenvalues = spectrum_descriptors(gram, seen, 30)
    assert (eigenvalues == 0).all()
    assert values[0, 0].tolist() == pytest.approx(EQUAL_ROWS)


def test_two_level_spectrum_in_closed_form() -> None:
    gram = torch.diag(torch.tensor([9.0] * 2 + [1.0] * 8))[None, None]
    values, eigenvalues = spectrum_descriptors(gram, torch.tensor([10]), 1000, center=False)
    d = named(values[0, 0])
    torch.testing.assert_close(eigenvalues[0, 0], torch.tensor([9e-3] * 2 + [1e-3] * 8))
    shares = [9 / 26] * 2 + [1 / 26] * 8
    assert values[0, 0, SHARES].tolist() == pytest.approx(shares[:5], rel=1e-6)
    assert values[0, 0, RATIOS].tolist() == pytest.approx([1, 9, 1, 1], rel=1e-6)
    assert d["entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-6)
    assert d["participation"] == pytest.approx(26**2 / (2 * 81 + 8), rel=1e-6)
    assert d["log_trace"] == pytest.approx(math.log(26e-3), rel=1e-6)
    assert (1 + math.sqrt(0.01)) ** 2 / marchenko_pastur_median(0.01) < 9
    assert d["above_edge"] == 2


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("joint", [None, "none", "trace"])
def test_windows_without_rows_are_zero_windows(center: bool, joint: str | None) -> None:
    gram = torch.full((2, 2, 5, 5), torch.nan)
    gram[:, 1] = 0
    seen = torch.tensor([0, 5])
    values, eigenvalues = spectrum_descriptors(gram, seen, 7, center=center, joint=joint)
    assert (eigenvalues == 0).all()
    torch.testing.assert_close(values, torch.tensor(ZERO_WINDOW).expand_as(values))


def test_one_centred_row_is_a_zero_window_and_two_are_rank_one() -> None:
    gram, _ = gram_of(normal(1, 2, 4, 9))
    values, eigenvalues = spectrum_descriptors(gram, torch.tensor([1, 2]), 9)
    torch.testing.assert_close(values[0, 0], torch.tensor(EQUAL_ROWS))
    g = gram[0, 1].double()
    assert eigenvalues[0, 1, 0] == pytest.approx((g[0, 0] + g[1, 1] - 2 * g[0, 1]).item() / 2 / 9, rel=1e-6)
    assert (eigenvalues[0, 1, 1:] == 0).all()
    assert named(values[0, 1])["share_1"] == 1


@pytest.mark.parametrize("dim", [1, 3, 9])
def test_narrow_rows_have_rank_dim(dim: int) -> None:
    gram, seen = gram_of(normal(1, 1, 20, dim))
    values, eigenvalues = spectrum_descriptors(gram, seen, dim, center=False)
    assert (eigenvalues[0, 0, :dim] > 1e-3).all()
    assert (eigenvalues[0, 0, dim:] <= 1e-6 * eigenvalues[0, 0, 0]).all()
    assert named(values[0, 0])["above_edge"] <= dim
    primal = torch.linalg.svdvals(normal(20, dim).double()) ** 2 / dim
    torch.testing.assert_close(eigenvalues[0, 0, :dim].double(), primal, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ratio", [1.0, 10.0, 100.0])
def test_a_large_mean_costs_float32_rounding_of_the_uncentred_energy(ratio: float) -> None:
    rows = normal(1, 1, 32, 2048, dtype=torch.float64) + ratio
    gram, seen = gram_of(rows)
    _, eigenvalues = spectrum_descriptors(gram, seen, 2048)
    exact = torch.linalg.svdvals(rows - rows.mean(-2, keepdim=True)).square() / 2048
    assert ((eigenvalues - exact).abs() <= 2.0**-23 * (1 + ratio**2) * 32).all()
    torch.testing.assert_close(
        eigenvalues[..., :31].double(), exact[..., :31], rtol=1e-3 if ratio < 100 else 0.02, atol=0
    )


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("joint", [None, "none", "trace"])
def test_scaling_the_activations_moves_the_log_trace_alone(center: bool, joint: str | None) -> None:
    gram, seen = gram_of(normal(2, 1, 12, 40))
    small, _ = spectrum_descriptors(gram, seen, 40, center=center, joint=joint)
    for factor in (2.0**-80, 2.0**60):
        scaled, _ = spectrum_descriptors(gram * factor, seen, 40, center=center, joint=joint)
        trace = DESCRIPTORS.index("log_trace")
        torch.testing.assert_close(scaled[..., trace], small[..., trace] + math.log(factor), rtol=1e-6, atol=0)
        scaled[..., trace] = small[..., trace]
        torch.testing.assert_close(scaled, small, rtol=1e-6, atol=1e-9)


def test_the_order_of_slots_does_not_matter() -> None:
    gram, seen = gram_of(normal(1, 1, 21, 40))
    order = [*torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist(), 20]  # the newest stays known
    values = spectrum_descriptors(gram, seen, 40)
    torch.testing.assert_close(
        spectrum_descriptors(gram[:, :, order][..., order], seen, 40), values, rtol=1e-6, atol=1e-9
    )


def test_pure_noise_stays_below_the_edge_and_a_planted_spike_above_bbp_does_not() -> None:
    n, dim, windows = 64, 4096, 60
    noise = normal(1, windows, n, dim, seed=3)
    strength = math.sqrt(n / dim)  # the BBP threshold in units of sigma^2: a spike of covariance 1 + s needs s > sqrt q

    def spikes(times_threshold: float) -> Tensor:
        direction = torch.nn.functional.normalize(normal(1, windows, n, 1, seed=4), dim=-2)
        loading = normal(1, windows, 1, dim, seed=5) * math.sqrt(times_threshold * strength)
        gram, seen = gram_of(noise + direction * loading)
        return named(spectrum_descriptors(gram, seen, dim, center=False)[0])["above_edge"][0]

    assert (spikes(0) <= 1).float().mean() > 0.95
    assert (spikes(0) == 0).float().mean() > 0.6
    assert (spikes(0.2) <= 1).float().mean() > 0.95
    assert (spikes(0.2) == 0).float().mean() > 0.6
    assert (spikes(4) >= 1).all()


@pytest.mark.parametrize("center", [False, True])
def test_joint_none_is_the_gram_matrix_of_the_concatenated_activations(center: bool) -> None:
    layers = (
        normal(3, 2, 9, 20, dtype=torch.float64)
        * torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)[:, None, None, None]
    )
    gram, seen = gram_of(layers)
    joined, _ = gram_of(torch.cat(layers.unbind(0), -1)[None])
    got = spectrum_descriptors(gram, seen, 20, center=center, joint="none")
    want = spectrum_descriptors(joined, seen, 60, center=center)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("center", [False, True])
def test_joint_trace_does_not_see_the_scale_of_a_layer(center: bool) -> None:
    gram, seen = gram_of(normal(3, 2, 9, 20))
    plain = spectrum_descriptors(gram, seen, 20, center=center, joint="trace")
    gram[1] *= 2.0**40
    loud = spectrum_descriptors(gram, seen, 20, center=center, joint="trace")
    assert same_bits(loud[1], plain[1])
    others = [i for i, name in enumerate(DESCRIPTORS) if name != "log_trace"]
    assert same_bits(loud[0][..., others], plain[0][..., others])
    log_trace = DESCRIPTORS.index("log_trace")
    torch.testing.assert_close(loud[0][..., log_trace], plain[0][..., log_trace] + 40 / 3 * math.log(2))


def test_joint_trace_leaves_out_a_layer_without_energy() -> None:
    gram, seen = gram_of(normal(2, 1, 6, 20))
    gram[1] = 3.0  # equal rows: nothing is left when they are centred
    joint = spectrum_descriptors(gram, seen, 20, joint="trace")[1]
    alone = spectrum_descriptors(gram[:1], seen, 20, joint="trace")[1]
    torch.testing.assert_close(joint * 2, alone, rtol=1e-6, atol=1e-12)
    assert joint.sum() == pytest.approx(1 / 40, rel=1e-6)
