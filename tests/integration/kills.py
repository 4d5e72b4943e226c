"""Work that is killed at a random moment and started again, each time in a process of its own; a program for the test.

    python -m tests.integration.kills FOLDER JOB:TIMES:STRIDE ...

kills each job so many times at a random moment, and then in the middle of a file: of the first, and of every STRIDE-th
operation on files after it (0: of none). Prints JSON: {JOB: {"nobody": what a process that nobody killed left, "0.123
s": what was left by one that was killed after that time and then started again, "file 7": by one killed in mid-file}},
names of files with hashes of their content; or {JOB: why it was given up}, where after a kill a file could not be read
in which a reader would look, or the work did not go on. Processes are forked, so that what takes longest, the imports,
is done once.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

import rmtkd
from bench.experiments.detector import store
from bench.experiments.detector.extract import SHARD, extract
from bench.experiments.detector.items import Item
from bench.experiments.detector.reading import Reader
from eigentrack import Detector
from eigentrack.files import write_whole
from rmtkd import cli
from tests.integration import several_processes
from tests.integration.conftest import tiny_llama
from tests.integration.killed_runs import fork, start
from tests.unit.test_detector import NAMES, planted
from tests.unit.test_rmtkd_cli import WORDS, labelled_texts, tokenizer

SMALLEST = 16  # bytes of the file in which a process is killed in mid-file


def run(output: Path) -> None:
    """The command: warms up, narrows in two stages, and writes the end of it."""
    arguments = ["run", "--model", "model", "--data", "texts.jsonl", "--dev", "texts.jsonl", "--output", str(output)]
    settings = ["--stages", "2", "--epochs", "1", "--batch", "4", "--baseline", "1"]
    settings += ["--quantile", "0.3", "--multiple", "4", "--max-drop", "1"]
    with contextlib.redirect_stdout(sys.stderr):
        if cli.main([*arguments, *settings, "--threads", "1", "--quiet"]) != 0:
            raise RuntimeError("rmtkd run failed")


def distil(output: Path) -> None:
    """A student is trained on its teacher and saved, as a user's own program would."""
    rows = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part, "labels": part[:, 0] % 3} for part in rows.split(8)]
    student, teacher = several_processes.model(), several_processes.model()
    with torch.no_grad():
        teacher.classifier.weight.mul_(3)
    rmtkd.distill(student, teacher, batches, rmtkd.Config(epochs=8, learning_rate=1e-2), progress=False)
    rmtkd.save(student, output / "model")


def fit(output: Path) -> None:
    """A detector is fitted, calibrated and saved."""
    detector = Detector(NAMES, hidden=8, projection=4)
    detector.fit(*planted(400), items=range(400), epochs=20, patience=20, progress=False)
    detector.calibrate(*planted(400, seed=9))
    detector.save_pretrained(output)


def cache(output: Path) -> None:
    """The detector's experiments keep what a model says of each item."""
    model = tiny_llama(initializer_range=0.3, attn_implementation="eager")
    words = [" ".join(random.Random(index).choices(WORDS[3:], k=12)) for index in range(3 * SHARD)]
    items = [Item(f"item {i}", f"item {i}", text, (text[:20], text[-20:]), (0, 1)) for i, text in enumerate(words)]
    output.mkdir(exist_ok=True)
    store.write_items(output, items)
    with contextlib.redirect_stderr(io.StringIO()):  # no bar
        extract(Reader(model), tokenizer(), items, output, "cache")


def torn(output: Path) -> None:
    """Planted: a file that is not written aside."""
    output.mkdir(exist_ok=True)
    (output / "numbers.json").write_text(json.dumps(list(range(100))))


def counting(output: Path) -> None:
    """Planted: what is left depends on how often it was begun."""
    begun = output / "begun.json"
    output.mkdir(exist_ok=True)
    write_whole(begun, json.dumps(json.loads(begun.read_text()) + 1 if begun.exists() else 1).encode())
    time.sleep(0.3)


JOBS: dict[str, Callable[[Path], None]] = {
    "run": run,
    "distil": distil,
    "fit": fit,
    "cache": cache,
    "torn": torn,
    "counting": counting,
}


def prepare(folder: Path) -> None:
    """What the jobs read, in the folder where they run."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer(pad_token="[PAD]").save_pretrained(folder / "model")
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in labelled_texts()))


def readable(folder: Path) -> None:
    """Raises if there is a file, other than those that are being written aside, that its reader cannot read."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or aside(path.relative_to(folder)):
            continue
        if path.suffix == ".safetensors":
            content(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            raise RuntimeError(f"{path} is in a place where nothing reads it")
    for description in folder.rglob("rmtkd.json"):
        if not aside(description.relative_to(folder)):
            rmtkd.load(description.parent)
            if description.parent.name == "model":
                transformers.AutoTokenizer.from_pretrained(description.parent)
    if (folder / "detector.safetensors").exists():
        Detector.from_pretrained(folder)
    if list(folder.glob("0*.safetensors")):
        list(store.read_answers(folder))


def aside(path: Path) -> bool:
    """What is not yet in its place: a hidden file or folder, or a shard's."""
    return any(part.startswith(".") for part in path.parts) or path.suffix == ".partial"


def content(path: Path) -> dict[str, Any]:
    """A safetensors file; its header lists the description in random order, unless eigentrack wrote it."""
    with safe_open(path, "pt") as file:
        return {"": file.metadata()} | {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def fingerprint(folder: Path) -> dict[str, str]:
    """Of every file, what is left aside included. What was timed is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        data = path.read_bytes()
        if path.suffix == ".json" and not aside(path.relative_to(folder)):
            data = json.dumps(untimed(json.loads(data))).encode()
        elif path.suffix == ".safetensors" and path.name[0] == "0":
            tensors = content(path)
            data = json.dumps(tensors.pop(""), sort_keys=True).encode()
            data += b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def untimed(found: Any) -> Any:
    """JSON without seconds and milliseconds."""
    if isinstance(found, list):
        return [untimed(value) for value in found]
    if isinstance(found, dict):
        return {name: None if "seconds" in name else untimed(value) for name, value in found.items()}
    return found


def die_in_mid_file(number: int, folder: Path) -> None:
    """From the number-th operation on files in the folder on, the kernel ends the process where a file grows."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename") and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == number:
                resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST, SMALLEST))

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it otherwise
    sys.addaudithook(watch)


def killed_after(seconds: float, work: Callable[[], None]) -> bool:
    """Whether the work was still going on then."""
    child = start(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def again(folder: Path, work: Callable[[], None]) -> dict[str, str]:
    """What is left once the work has been done to its end, after a kill."""
    readable(folder)
    if fork(work) != 0:
        raise RuntimeError("it did not go on")
    readable(folder)
    return fingerprint(folder)


def kill(job: str, times: int, stride: int) -> dict[str, dict[str, str]]:
    """What the program prints for a job."""
    output, draw = Path(job), random.Random(job)

    def work() -> None:
        JOBS[job](output)

    found = again(output, work)
    shutil.rmtree(output)
    begun = time.monotonic()
    results = {"nobody": again(output, work)}  # what it reads is in memory by now, as it will be for those below
    whole = time.monotonic() - begun
    if results["nobody"] != found:
        names = sorted(name for name, _ in results["nobody"].items() ^ found.items())
        raise RuntimeError(f"it does not leave the same twice: {', '.join(names)}")
    while len(results) <= times:
        shutil.rmtree(output, ignore_errors=True)
        moment = draw.uniform(0, whole)
        if killed_after(moment, work):
            results[f"{moment:.3f} s"] = again(output, work)
    for number in itertools.count(1, stride) if stride else ():
        shutil.rmtree(output, ignore_errors=True)

        def to_be_killed(number: int = number) -> None:
            die_in_mid_file(number, output)
            work()

        status = fork(to_be_killed)
        if status == 0:  # there are no more files
            break
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGXFSZ:
            raise RuntimeError(f"file {number} ended the work in another way: {status}")
        results[f"file {number}"] = again(output, work)
    return results


def main(place: str, *asked: str) -> None:
    torch.set_num_threads(1)
    os.chdir(place)
    prepare(Path())
    results: dict[str, Any] = {}
    for one in asked:
        job, times, stride = one.split(":")
        try:
            results[job] = kill(job, int(times), int(stride))
        except (RuntimeError, ValueError) as error:
            results[job] = repr(error)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
