"""Processor time of `import rmtkernels` beyond `import torch`, in fresh processes."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import rmtkernels, rmtkernels.laws
took = time.process_time() - start
print(json.dumps({"ms": 1e3 * took, "new": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
                  "compiler": "torch._dynamo" in sys.modules}))
"""


@pytest.fixture(scope="module")
def imports():
    def once() -> dict:
        output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=ROOT)
        return json.loads(output.stdout)

    return [once() for _ in range(3)]  # the first one may have to write bytecode


def test_scipy_is_not_imported(imports):
    assert "scipy" not in imports[0]["new"]


@pytest.mark.timing
def test_it_takes_60_ms(imports):
    assert not any(one["compiler"] for one in imports)
    assert statistics.median(one["ms"] for one in imports) <= 60, imports
