"""What every loader makes of any bytes: something, or a typed error. Nothing else, and no hang.

    pip install atheris
    python -m tests.fuzz.loaders corpus -max_total_time=600 -timeout=30 -rss_limit_mb=4096

runs ten minutes of coverage-guided fuzzing; `corpus` is a folder that is filled with the seeds first and keeps what
led to new paths. tests/fuzz/test_loaders.py runs the seeds and some thousand changes of them without atheris.
"""

import contextlib
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

try:
    import atheris
except ImportError:  # only `main` needs it
    atheris = None

with atheris.instrument_imports(include=["eigentrack", "rmtkd"]) if atheris else contextlib.nullcontext():
    import eigentrack
    import rmtkd
    from rmtkd.checkpoints import Checkpoints
    from rmtkd.plans import Plan
    from rmtkd.texts import read_examples

from rmtkernels.errors import RmtkernelsError
from tests.unit.test_bad_input_files import KINDS
from tests.unit.test_rmtkd_files import Small, small

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-loaders-"))
BASE = Small()


def _file(name: str, load: Callable[[Path], object]) -> Callable[[bytes], object]:
    def one(content: bytes) -> None:
        path = FOLDER / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        load(path)

    return one


def _framed(load: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """A safetensors file whose first eight bytes fit: the header ends at the first line break."""

    def one(content: bytes) -> None:
        header, _, tensors = content.partition(b"\n")
        load(struct.pack("<Q", len(header)) + header + tensors)

    return one


recording = _file("recording", eigentrack.load)
reference = _file("reference", eigentrack.Reference.load)
detector = _file("detector/detector.safetensors", lambda path: eigentrack.Detector.from_pretrained(path.parent))
weights = _file("model/weights.safetensors", lambda path: rmtkd.load(path.parent, model=BASE))
TARGETS: dict[str, Callable[[bytes], object]] = {
    "recording": recording,
    "recording, framed": _framed(recording),
    "reference": reference,
    "reference, framed": _framed(reference),
    "detector": detector,
    "detector, framed": _framed(detector),
    "weights": weights,
    "weights, framed": _framed(weights),
    "description": _file("described/rmtkd.json", lambda path: rmtkd.load(path.parent, model=BASE)),
    "run": _file("run/run.json", lambda path: Checkpoints(path.parent, BASE, rmtkd.Config())),
    "plan": lambda content: Plan.from_json(content.decode(errors="replace")),
    "config": lambda content: rmtkd.Config.from_json(content.decode(errors="replace")),
    "texts": _file("texts.jsonl", read_examples),
}
NAMES = list(TARGETS)


def prepare() -> None:
    """Folders of which one file is replaced by each input."""
    for folder in ("model", "described"):
        if not (FOLDER / folder).exists():
            rmtkd.save(small(), FOLDER / folder)


def one_input(data: bytes) -> str:
    """The first byte chooses the loader. Returns what came of it; raises what no loader may raise."""
    if not data:
        return "nothing"
    try:
        TARGETS[NAMES[data[0] % len(NAMES)]](data[1:])
    except RmtkernelsError as error:
        return type(error).__name__
    return "loaded"


def seeds() -> dict[str, bytes]:
    """A file of each kind that can be loaded, as an input of each loader that reads it."""
    prepare()
    contents: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, name in (("recording", ""), ("reference", ""), ("detector", "detector.safetensors")):
            path = Path(folder) / kind
            KINDS[kind].save(path, 0)
            contents[kind] = (path / name if name else path).read_bytes()
        model = Path(folder) / "model"
        rmtkd.save(small(), model)
        contents["weights"] = (model / "weights.safetensors").read_bytes()
        contents["description"] = (model / "rmtkd.json").read_bytes()
        Checkpoints(Path(folder) / "run", BASE, rmtkd.Config())
        contents["run"] = (Path(folder) / "run" / "run.json").read_bytes()
    contents["config"] = rmtkd.Config().to_json().encode()
    torch.manual_seed(0)
    dense, rows = torch.nn.Sequential(torch.nn.Linear(32, 32)), [torch.randn(64, 32)]
    contents["plan"] = rmtkd.plan(dense, rows, rmtkd.Config(mode="factor", keep_slower=True)).to_json().encode()
    contents["texts"] = b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
    for kind in ("recording", "reference", "detector", "weights"):
        end = 8 + struct.unpack("<Q", contents[kind][:8])[0]
        contents[f"{kind}, framed"] = contents[kind][8:end].rstrip() + b"\n" + contents[kind][end:]
    return {name: bytes([NAMES.index(name)]) + content for name, content in contents.items()}


def main() -> None:
    if atheris is None:
        raise SystemExit("pip install atheris")
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        Path(sys.argv[1]).mkdir(exist_ok=True)
        for name, seed in seeds().items():
            (Path(sys.argv[1]) / name.replace(", ", "-")).write_bytes(seed)
    prepare()
    atheris.Setup(sys.argv, lambda data: one_input(data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
