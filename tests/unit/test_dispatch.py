"""Which backend runs: argument over context over environment, no silent fallback, one warning for an automatic one."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch

import rmtkernels
from rmtkernels import BackendError, _native, dispatch
from tests.helpers import covariance_of, empty_covariance, empty_state, gram_of, normal

CPU = torch.device("cpu")
OPERATOR = "spectrum_eigvalsh"


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been compiled."""
    monkeypatch.setitem(_native.STATUS, "_C", "not built")
    monkeypatch.setattr(dispatch, "_available", {})
    monkeypatch.setattr(dispatch, "_warned", set())


def in_subprocess(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RMTKERNELS_")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=120
    )


def test_the_compiled_kernel_is_the_automatic_choice() -> None:
    for operator in dispatch.OPERATORS:
        assert dispatch.select(operator, CPU) == "cpu"
        assert dispatch.backends(operator)["cpu"] == "available"
        assert dispatch.backends(operator)["reference"] == "available"


def test_every_operator_of_the_list_exists() -> None:
    for operator in dispatch.OPERATORS:
        assert hasattr(torch.ops.rmtkernels, operator)


def test_argument_beats_context_and_contexts_nest() -> None:
    with rmtkernels.use_backend("reference"):
        assert dispatch.select(OPERATOR, CPU) == "reference"
        assert dispatch.select(OPERATOR, CPU, "cpu") == "cpu"
        with rmtkernels.use_backend("cpu"):
            assert dispatch.select(OPERATOR, CPU) == "cpu"
        assert dispatch.select(OPERATOR, CPU) == "reference"
    assert dispatch.select(OPERATOR, CPU) == "cpu"


def test_a_context_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="mine"), rmtkernels.use_backend("reference"):
        raise RuntimeError("mine")
    assert dispatch.select(OPERATOR, CPU) == "cpu"


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(BackendError, match="unknown backend 'gpu'"), rmtkernels.use_backend("gpu"):
        pass
    with pytest.raises(BackendError, match="reference"):
        rmtkernels.spectrum_eigvalsh(torch.eye(3), backend="fast")
    assert dispatch.select(OPERATOR, CPU) == "cpu"


def test_a_forced_backend_never_falls_back(without_kernels: None) -> None:
    with pytest.raises(BackendError, match="not built"):
        rmtkernels.spectrum_eigvalsh(torch.eye(3), backend="cpu")
    with rmtkernels.use_backend("cpu"), pytest.raises(BackendError):
        rmtkernels.window_gram(normal(1, 3, 4), 2)


def test_a_backend_of_another_device_is_refused() -> None:
    with pytest.raises(BackendError, match="'cuda' was asked for"):
        rmtkernels.spectrum_eigvalsh(torch.eye(3), backend="cuda")


def test_an_automatic_downgrade_warns_once_per_operator_and_computes(without_kernels: None) -> None:
    with pytest.warns(RuntimeWarning, match="window_gram runs on its slow float64 reference: cpu: .*not built"):
        gram, _ = rmtkernels.window_gram(normal(1, 3, 4), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rmtkernels.window_gram(normal(1, 3, 4), 2)
    assert gram.shape == (1, 3, 2, 2)
    with pytest.warns(RuntimeWarning, match="spectrum_eigvalsh"):
        assert rmtkernels.spectrum_eigvalsh(torch.eye(3)).tolist() == [1, 1, 1]


def push() -> None:
    rmtkernels.window_push_(*empty_state(1, 1, 2, 4), [normal(1, 4)])


def describe() -> None:
    gram, seen = gram_of(normal(1, 1, 3, 4))
    rmtkernels.spectrum_descriptors_(
        torch.zeros(1, 1, len(rmtkernels.DESCRIPTORS)), torch.zeros(1, 1, 3), gram, seen, 4
    )


@pytest.mark.parametrize(
    "call",
    [
        push,
        describe,
        lambda: rmtkernels.window_gram(normal(1, 3, 4), 2),
        lambda: rmtkernels.spectrum_eigvalsh(torch.eye(3)),
        lambda: rmtkernels.covariance_update_(*empty_covariance(3), normal(4, 3)),
        lambda: rmtkernels.lowrank_linear(normal(1, 4), normal(2, 4), normal(3, 2)),
    ],
)
def test_the_downgrade_warning_points_at_the_caller(without_kernels: None, call: Callable[[], object]) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        call()
    assert [warning.filename for warning in caught] == [__file__]


def test_the_reference_backend_agrees_with_the_kernels() -> None:
    hidden = normal(2, 9, 40)
    gram, seen = rmtkernels.window_gram(hidden, 4, 3)
    reference_gram, reference_seen = rmtkernels.window_gram(hidden, 4, 3, backend="reference")
    torch.testing.assert_close(gram, reference_gram, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen, reference_seen)
    for joint in (None, "trace", "none"):
        torch.testing.assert_close(
            rmtkernels.spectrum_descriptors(gram, seen[:, 0].repeat(2)[:3], 40, joint=joint),
            rmtkernels.spectrum_descriptors(gram, seen[:, 0].repeat(2)[:3], 40, joint=joint, backend="reference"),
            rtol=1e-5,
            atol=1e-6,
        )
    eigenvalues = rmtkernels.spectrum_eigvalsh(gram, backend="reference")
    assert eigenvalues.dtype == torch.float32
    torch.testing.assert_close(rmtkernels.spectrum_eigvalsh(gram), eigenvalues, rtol=1e-5, atol=1e-5)
    state, batch = covariance_of(normal(30, 40)), normal(20, 40, seed=1)
    reference_state = state.copy()
    rmtkernels.covariance_update_(*state, batch, decay=0.5)
    rmtkernels.covariance_update_(*reference_state, batch, decay=0.5, backend="reference")
    torch.testing.assert_close(state.scatter.tril(), reference_state.scatter.tril(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(state.totals, reference_state.totals)


@pytest.mark.parametrize("name", ["", "sse9", "AVX2", "none"])
def test_an_instruction_set_that_is_not_there_is_refused_and_changes_nothing(name: str) -> None:
    before = rmtkernels.cpu_isa()
    with pytest.raises(BackendError, match="baseline"):
        rmtkernels.set_cpu_isa(name)
    assert rmtkernels.cpu_isa() == before


def test_auto_is_the_best_instruction_set(isa: str) -> None:
    assert rmtkernels.cpu_isa() == isa
    rmtkernels.set_cpu_isa("auto")
    assert rmtkernels.cpu_isa() == rmtkernels.cpu_isas()[0]


def test_environment_chooses_backend_and_instruction_set() -> None:
    code = (
        "import torch, rmtkernels as r\n"
        "from rmtkernels.dispatch import select\n"
        "cpu = torch.device('cpu')\n"
        "inner = r.use_backend('cpu')\n"
        "print(r.cpu_isa(), select('window_gram', cpu), select('window_gram', cpu, 'cpu'))\n"
        "with inner: print(select('window_gram', cpu))\n"
    )
    result = in_subprocess(code, RMTKERNELS_ISA="baseline", RMTKERNELS_BACKEND="reference")
    assert result.stdout.split() == ["baseline", "reference", "cpu", "cpu"], result.stderr
    result = in_subprocess(code, RMTKERNELS_ISA="", RMTKERNELS_BACKEND="")
    assert result.stdout.split() == [rmtkernels.cpu_isas()[0], "cpu", "cpu", "cpu"], result.stderr


def test_a_wrong_instruction_set_in_the_environment_is_refused_until_a_right_one_is_set() -> None:
    code = (
        "import torch, rmtkernels as r\n"
        "print(r._native.STATUS['_C'], r.dispatch.backends('spectrum_eigvalsh')['cpu'])\n"
        "for backend in (None, 'cpu'):\n"
        "    try: r.spectrum_eigvalsh(torch.eye(2), backend=backend)\n"
        "    except r.BackendError as error: print(error)\n"
        "r.set_cpu_isa('baseline')\n"
        "print(r.spectrum_eigvalsh(torch.eye(2)).tolist(), r.cpu_isa())\n"
    )
    result = in_subprocess(code, RMTKERNELS_ISA="bogus")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("loaded RMTKERNELS_ISA=bogus is not one of auto"), result.stderr
    assert all("RMTKERNELS_ISA=bogus is not one of auto" in line for line in lines[1:3])
    assert lines[3] == "[1.0, 1.0] baseline"


def test_blocks_that_do_not_end_in_order() -> None:
    one, other = rmtkernels.use_backend("reference"), rmtkernels.use_backend("cpu")
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert dispatch.select("window_gram", torch.device("cpu")) == "cpu" and _forced_names() == ["cpu"]
    other.__exit__(None, None, None)
    assert _forced_names() == []


def _forced_names() -> list[str | None]:
    return [choice[0] for choice in dispatch._forced[1:]]


def test_a_wrong_backend_in_the_environment_is_refused_at_first_use() -> None:
    result = in_subprocess(
        "import torch, rmtkernels as r; r.spectrum_eigvalsh(torch.eye(2))", RMTKERNELS_BACKEND="bogus"
    )
    assert "unknown backend 'bogus'" in result.stderr.splitlines()[-1]
