"""One small call of every operator that has a kernel on a device, for compute-sanitizer: `python -m tools.gpu_calls`.

The arguments are those that opcheck has (tests/compile), and some that fill warps and more than one block. Results must
be what the CPU gives. On the CPU (--device cpu) it compares kernels with themselves: only to see that it still runs.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rmtkernels import dispatch
from rmtkernels.ops.law_table import law_table
from tests.compile.test_compile import OPCHECKS, F
from tests.helpers import covariance_of, empty_state, gram_of, normal, pushed

Call = tuple[str, tuple[Any, ...]]


def larger() -> list[Call]:
    """Sizes that are no multiple of anything."""
    half = torch.bfloat16
    state = pushed(empty_state(3, 5, 33, 520, half), [normal(5, 7, 520, seed=s, dtype=half) for s in range(3)])
    gram, seen = gram_of(normal(2, 3, 65, 100))
    laws = torch.tensor(law_table(65, 100))
    weights = normal(37, 263), normal(70, 37), normal(70)
    return [
        ("window_push_", (*state, [normal(5, 520, seed=s, dtype=half) for s in range(3)], None)),
        ("window_gram", (normal(2, 150, 523, dtype=half), 33, 7, normal(2, 150, seed=1) > -1)),
        ("window_gram", (normal(1, 140, 72), 128, 35)),
        ("spectrum_eigvalsh", (gram_of(normal(1, 3, 128, 200))[0][0],)),
        (
            "spectrum_descriptors_",
            (torch.zeros(2, 3, F), torch.zeros(2, 3, 65), gram, seen - 2, laws, 100, True, 0, True, 1),
        ),
        ("covariance_update_", (*covariance_of(normal(20, 133)), normal(300, 133), None, None, 1.0)),
        ("lowrank_linear", (normal(17, 263), *weights)),
        ("lowrank_linear", (normal(3, 512), normal(64, 512), normal(640, 64), None)),
        ("lanczos_multiply", (normal(131, 260), normal(8, 260))),
        ("lanczos_multiply_gram", (normal(300, 133), normal(2, 133), normal(8, 133))),
    ]


def forms(operator: str, device: str) -> Iterator[str]:
    """Names of the operator's forms that can run on the device: its own, and Triton's (rmtkernels.triton.FORMS)."""
    backends = dispatch.backends(operator)
    if backends[device] == "available":
        yield operator
    forms = importlib.import_module("rmtkernels.triton").FORMS
    if device == "cuda" and backends.get("triton") == "available" and operator in forms:
        yield forms[operator]


def moved(argument: Any, device: str) -> Any:
    """A copy on the device, of the same layout."""
    if isinstance(argument, Tensor):
        copy = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=device)
        return copy.copy_(argument)
    return [moved(item, device) for item in argument] if isinstance(argument, list) else argument


def outcome(form: str, arguments: tuple[Any, ...], device: str) -> list[Tensor]:
    """What the call returned, and its arguments as it left them."""
    copies = [moved(argument, device) for argument in arguments]
    results = getattr(torch.ops.rmtkernels, form)(*copies)
    tensors = [results] if isinstance(results, Tensor) else list(results or [])
    return [tensor.cpu() for tensor in [*tensors, *(copy for copy in copies if isinstance(copy, Tensor))]]


def main() -> int:
    """Exit status 1 if a result was wrong, or no operator had a kernel."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_calls", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    calls = [call for call in [*OPCHECKS, *larger()] if call[0] in dispatch.OPERATORS]
    ran: dict[str, int] = {}
    for operator, arguments in calls:
        for form in forms(operator, device):
            want = outcome(operator, arguments, "cpu")
            for got, right in zip(outcome(form, arguments, device), want, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3, equal_nan=True)
            ran[form] = ran.get(form, 0) + 1
    missing = sorted({operator for operator, _ in calls} - ran.keys())
    print(json.dumps({"called": ran, "without a kernel": missing}))
    return int(not ran)


if __name__ == "__main__":
    sys.exit(main())
