"""Writes rmtkernels/laws/tracy_widom_table.py: ln(1 - F1(s)) of the Tracy-Widom law for real matrices (beta = 1).

F1(s) = det(I - B_s) on L^2(0, inf), with the kernel B_s(x, y) = Ai(x + y + s) (Ferrari and Spohn, J. Phys. A 38, 2005).
The determinant is that of B_s on the nodes of a Gauss-Legendre rule (Bornemann, Math. Comp. 79, 2010), which converges
exponentially. With the eigenvalues b of this symmetric matrix, ln F1 = sum ln(1 - b), and 1 - F1 = -expm1(ln F1):
the right tail keeps its relative accuracy, since the entries, and with them the eigenvalues, fall off as Ai(s) does.

    python tools/tracy_widom_table.py         writes the file (needs SciPy)

The series behind the table's end is exact. B_s has trace (1/2) int_s^inf Ai, and all else in 1 - F1 is smaller by
exp(-(2/3) s^(3/2)). With int_s^inf Ai = exp(-(2/3) s^(3/2)) / (2 sqrt(pi) s^(3/4)) (1 + c_1 y + c_2 y^2 + ...),
y = s^(-3/2), differentiating and comparing with Ai's own expansion gives
c_k = (-3/2)^k u_k - (6k - 3)/4 c_{k-1}, u_k as in DLMF 9.7.2; the coefficients stored are those of the logarithm.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
from scipy import special

START, STEP, POINTS = -9.0, 1 / 16, 338
TERMS = 6
NODES = 120
TARGET = Path(__file__).resolve().parents[1] / "rmtkernels" / "laws" / "tracy_widom_table.py"


def log_survival(s: float, nodes: int = NODES) -> float:
    """ln(1 - F1(s)), from the determinant."""
    length = 16 + max(-s, 0.0)  # beyond it the kernel is below 1e-22 of its largest entry
    x, weights = np.polynomial.legendre.leggauss(nodes)
    x, roots = 0.5 * length * (x + 1), np.sqrt(0.5 * length * weights)
    matrix = roots[:, None] * special.airy(x[:, None] + x + s)[0] * roots
    log_cdf = np.log1p(-np.linalg.eigvalsh(matrix)).sum()
    return float(np.log(-np.expm1(log_cdf)) if log_cdf > -1 else np.log1p(-np.exp(log_cdf)))


def tail_series(terms: int) -> list[Fraction]:
    """Coefficients of y, y^2, ... in ln(1 + c_1 y + c_2 y^2 + ...)."""
    u, c, log = [Fraction(1)], [Fraction(1)], [Fraction(0)]
    for k in range(1, terms + 1):
        u.append(u[-1] * Fraction((6 * k - 5) * (6 * k - 3) * (6 * k - 1), 216 * k * (2 * k - 1)))
        c.append(Fraction(-3, 2) ** k * u[k] - Fraction(6 * k - 3, 4) * c[-1])
        log.append(c[k] - sum(Fraction(j, k) * log[j] * c[k - j] for j in range(1, k)))
    return log[1:]


def main() -> None:
    values = [log_survival(START + STEP * i) for i in range(POINTS)]
    drift = max(abs(log_survival(START + STEP * i, NODES + 40) - values[i]) for i in range(0, POINTS, 16))
    rows = [", ".join(map(repr, values[i : i + 4])) for i in range(0, POINTS, 4)]
    series = ", ".join(f"{c.numerator} / {c.denominator}" for c in tail_series(TERMS))
    text = f'''"""Made by tools/tracy_widom_table.py, which says how; do not edit. `tracy_widom` has the rule around it.

LOG_SURVIVAL[i] = ln(1 - F1(TABLE_START + i * TABLE_STEP)), {POINTS} points. From the last but one on,
ln(1 - F1(s)) = -(2/3) s^(3/2) - (3/4) ln s - ln(4 sqrt(pi)) + sum_k TAIL_SERIES[k - 1] s^(-3k/2), k = 1 ... {TERMS}.
"""

# fmt: off
TABLE_START = {START!r}
TABLE_STEP = {STEP!r}
TAIL_SERIES = ({series})
LOG_SURVIVAL = (
    {f",{chr(10)}    ".join(rows)},
)
'''
    TARGET.write_text(text, encoding="utf-8")
    print(f"{TARGET.name}: {POINTS} values; another {40} nodes move none of them by more than {drift:.1e}")


if __name__ == "__main__":
    main()
