"""How often spike_count is right: `python -m bench.experiments.spike_count [--trials 100]` prints a table.

Spikes are planted in white, two-level and autoregressive noise, below and above the smallest population eigenvalue that
leaves the bulk (their factors are relative to it).
"""

import argparse
import math
from collections import Counter

import torch
from torch import Tensor

import rmtkernels

SHAPES = ((1024, 2048), (512, 1024), (512, 400))
FACTORS = ((), (0.8, 0.8), (1.2,), (1.5,), (1.3, 2.0, 4.0))


def noise(kind: str, d: int) -> Tensor:
    """Population eigenvalues."""
    if kind == "half 1, half 3":
        return torch.where(torch.arange(d) < d // 2, 1.0, 3.0).double()
    if kind == "autoregressive, 0.5":
        return 0.75 / (1.25 - ((torch.arange(d).double() + 0.5) * math.pi / d).cos())
    return torch.ones(d, dtype=torch.float64)


def smallest_seen(population: Tensor, q: float) -> float:
    """Solves q mean((t / (a - t))^2) = 1 for a."""
    low, high = float(population.max()) * (1 + 1e-9), 20 * float(population.max())
    for _ in range(100):
        middle = (low + high) / 2
        seen = q * float((population / (middle - population)).square().mean()) < 1
        low, high = (low, middle) if seen else (middle, high)
    return high


def counts(population: Tensor, n: int, trials: int) -> Counter[int]:
    """Count -> how often it was counted."""
    found: Counter[int] = Counter()
    for seed in range(trials):
        samples = torch.randn(n, len(population), generator=torch.Generator().manual_seed(seed))
        samples *= population.sqrt().float()
        found[rmtkernels.spike_count(samples.mT @ samples / n, seed=seed).count] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.spike_count", description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    trials = parser.parse_args().trials
    for d, n in SHAPES:
        for kind in ("white", "half 1, half 3", "autoregressive, 0.5"):
            population = noise(kind, d)
            smallest = smallest_seen(population, d / n)
            cells = []
            for factors in FACTORS:
                spiked = population.clone()
                spiked[: len(factors)] = smallest * torch.tensor(factors, dtype=torch.float64)
                found = counts(spiked, n, trials)
                want = len(factors) if not factors or min(factors) > 1 else 0
                cells.append(f"{found[want]} {dict(sorted(found.items()))}")
            print(f"| {kind} | {d}, {n} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
