"""A run of RMT-KD for torchrun, or for one process; a program for the test.

    torchrun --nproc-per-node 2 several_processes.py MODE FOLDER [STAGE]

With a STAGE, process 1 dies while that stage is scored.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import rmtkd

CONFIGS = {
    "width": {"quantile": 0.3},
    "factor": {"modules": ("*.dense",), "quantile": 0.7, "keep_slower": True, "teacher": "average", "noise": "median"},
}
SETTINGS = {"stages": 2, "epochs": 2, "multiple": 4, "max_drop": 1.0, "learning_rate": 1e-3, "min_ratio": 0.1}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def model() -> Any:
    torch.manual_seed(0)
    nothing_random = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=32, max_position_embeddings=8, num_labels=3, **SIZES, **nothing_random)
    return BertForSequenceClassification(config)


def main(mode: str, folder: Path, dies: int | None) -> None:
    """Batches of 10, and a last one with one row: no multiple of the processes, and fewer than they are."""
    torch.set_num_threads(1)
    tokens = torch.randint(0, 32, (41, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": ids, "labels": ids[0] % 3} for ids in tokens]
    train = torch.utils.data.DataLoader(rows, 10, shuffle=True)  # type: ignore[arg-type]
    calibration = [{"input_ids": part} for part in tokens.split(7)]
    asked = 0

    def evaluate(scored: Any) -> float:
        nonlocal asked
        asked += 1
        if dies is not None and os.environ["RANK"] == "1" and (folder / f"stage-{dies - 1}").exists():
            sys.exit("process 1 was told to die")
        right = scored(tokens).logits.argmax(1) == tokens[:, 0] % 3
        return float(right.float().mean()) + asked * 1e-9 * int(os.environ.get("RANK", 0))  # machines differ

    config = rmtkd.Config(mode=mode, **CONFIGS[mode], **SETTINGS)
    rmtkd.run(model(), calibration, train, evaluate, config, folder=folder, progress=False)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
