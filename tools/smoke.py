"""What an installed package must do, with nothing but its own dependencies: `python tools/smoke.py`.

Calls every operator through the compiled kernels and through the float64 oracles. The path is cleared of this
repository first, so that the installed package answers."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tools")]

import torch  # noqa: E402

import rmtkernels  # noqa: E402
from rmtkernels import _native, laws  # noqa: E402


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def both(compute: "object") -> tuple[torch.Tensor, torch.Tensor]:
    return compute("cpu"), compute("reference")  # type: ignore[operator]


def main() -> None:
    if _native.STATUS["_C"] != "loaded" or _native.STATUS["_host"] != "loaded":
        raise SystemExit(f"the libraries are not there: {_native.STATUS}")
    torch.manual_seed(0)
    gram = rmtkernels.window_gram(torch.randn(2, 20, 16), 8)[0]
    close(*both(lambda backend: rmtkernels.spectrum_eigvalsh(gram, backend=backend)), 1e-4)
    window = rmtkernels.SlidingWindow(2, 3, 8, 16)
    for _ in range(10):
        window.update([torch.randn(3, 16) for _ in range(2)])
    close(window.gram, window.ring @ window.ring.mT, 1e-4)
    assert window.descriptors()[0].isfinite().all()
    x, down, up = torch.randn(3, 12), torch.randn(4, 12), torch.randn(5, 4)
    close(*both(lambda backend: rmtkernels.lowrank_linear(x, down, up, backend=backend)), 1e-5)
    samples = torch.randn(400, 64)
    covariance = rmtkernels.StreamingCovariance(64)
    covariance.update(samples)
    close(covariance.covariance(ddof=1), samples.T.cov(), 1e-4)
    top = rmtkernels.lanczos_eigh(covariance.covariance(), 4)
    assert top.complete
    close(top.eigenvalues, torch.linalg.eigvalsh(covariance.covariance()).flip(0)[:4], 1e-4)
    assert laws.marchenko_pastur_edges(0.25)[1] == 2.25
    print(f"rmtkernels {rmtkernels.__version__} with torch {torch.__version__}: {_native.STATUS}")


if __name__ == "__main__":
    main()
