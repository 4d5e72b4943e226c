"""CIFAR-10 (JPEG copies) for the experiment with a ResNet: a subset in memory, flips and shifts, enlarged twofold."""

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.experiments.texts import data_dir

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 128  # the paper's
PAD = 4


def images(part: str, count: int) -> tuple[Tensor, Tensor]:
    """(count, 3, 32, 32) float32, normalised per channel, and labels: the first of a fixed random order of the part."""
    from PIL import Image

    with np.load(data_dir() / "cifar10" / f"{part}.npz") as file:
        labels, offsets, jpeg = file["labels"], file["offsets"], file["jpeg"]
    chosen = random.Random(0).sample(range(len(labels)), count)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()))) for i in chosen])
    found = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (found - mean) / deviation, torch.from_numpy(labels[chosen].astype(np.int64))


def enlarged(pixels: Tensor) -> Tensor:
    """Each pixel as a block of two by two: transformers' ResNet begins by shrinking fourfold."""
    return pixels.repeat_interleave(2, -1).repeat_interleave(2, -2)


class Loader:
    """Batches of a pass in random order, each image flipped or not and shifted by up to four pixels (the paper's)."""

    def __init__(self, pixels: Tensor, labels: Tensor, seed: int) -> None:
        self.pixels, self.labels = pixels, labels
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.labels) // BATCH)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        for chosen in order.split(BATCH):
            yield {"pixel_values": enlarged(self.augmented(self.pixels[chosen])), "labels": self.labels[chosen]}

    def augmented(self, batch: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(batch, (PAD,) * 4)
        shifts = torch.randint(0, 2 * PAD + 1, (len(batch), 2), generator=self.generator)
        flips = torch.rand(len(batch), generator=self.generator) < 0.5
        y, x = (shifts[:, i, None] + torch.arange(batch.shape[-1]) for i in range(2))
        moved = padded[torch.arange(len(batch))[:, None, None], :, y[:, :, None], x[:, None, :]].movedim(-1, 1)
        return torch.where(flips[:, None, None, None], moved.flip(-1), moved).contiguous()


@torch.no_grad()
def correct(model: Any, pixels: Tensor, labels: Tensor) -> list[int]:
    """1 for every image whose label the model finds, else 0; the mode is put back."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    parts = [model(pixel_values=enlarged(part).to(device)).logits.argmax(1) for part in pixels.split(256)]
    found = torch.cat(parts).cpu()
    model.train(training)
    return [int(hit) for hit in found == labels]
