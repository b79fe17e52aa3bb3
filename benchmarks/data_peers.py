"""Stock loaders for benchmarks/data.py to race: each gives (batch, labels) without end, from the same images.

All are used as their documentation has it, with torch's DataLoader processes. Those not installed are left out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2 as T
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg

SIZE = 224
Batches = Iterator[tuple[Any, Any]]
Peer = Callable[[int, int], Batches]  # (workers, batch size) -> batches


def stock_transform() -> T.Compose:
    """The usual one: from a PIL image to a normalised float32 tensor."""
    return T.Compose(
        [
            T.RandomResizedCrop(SIZE, antialias=True),
            T.RandomHorizontalFlip(),
            T.ToImage(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def uint8_transform() -> T.Compose:
    """The fastest that torchvision offers: uint8 tensors, to be normalised on the device."""
    return T.Compose([T.RandomResizedCrop(SIZE, antialias=True), T.RandomHorizontalFlip()])


def _to_tensor(data: bytes) -> torch.Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def _endless(loader: Any) -> Batches:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def webdataset_pil(shards: list[str]) -> Peer:
    """Stock webdataset, PIL and torchvision v2."""

    def batches(workers: int, batch: int) -> Batches:
        data = (
            wds.WebDataset(shards, shardshuffle=100)
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg", "cls")
            .map_tuple(stock_transform())
            .batched(batch)
            .repeat()
        )
        return iter(wds.WebLoader(data, batch_size=None, num_workers=workers))

    return batches


def webdataset_uint8(shards: list[str]) -> Peer:
    """webdataset with torchvision's decoder and uint8 tensors: not stock, but the best one can make of it."""

    def batches(workers: int, batch: int) -> Batches:
        data = (
            wds.WebDataset(shards, shardshuffle=100)
            .shuffle(1000)
            .to_tuple("jpg", "cls")
            .map_tuple(_to_tensor, int)
            .map_tuple(uint8_transform())
            .batched(batch)
            .repeat()
        )
        return iter(wds.WebLoader(data, batch_size=None, num_workers=workers))

    return batches


def image_folder(folder: Path) -> Peer:
    """torchvision's ImageFolder and DataLoader."""

    def batches(workers: int, batch: int) -> Batches:
        data = ImageFolder(folder, stock_transform())
        return _endless(DataLoader(data, batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0))

    return batches


def _for_litdata(path: tuple[str, int]) -> dict[str, Any]:
    return {"image": Image.open(path[0]), "label": path[1]}


class _LitTransform:
    """litdata decodes JPEGs to uint8 tensors, grey ones to one channel."""

    def __init__(self) -> None:
        self.steps = T.Compose([T.RGB(), *uint8_transform().transforms])

    def __call__(self, sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        return self.steps(sample["image"]), sample["label"]


def litdata_stream(folder: Path, made: Path) -> Peer:
    """litdata's StreamingDataset of JPEGs."""
    import litdata

    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    litdata.optimize(
        fn=_for_litdata, inputs=ImageFolder(folder).samples, output_dir=str(made), num_workers=1, chunk_bytes="16MB"
    )

    def batches(workers: int, batch: int) -> Batches:
        data = litdata.StreamingDataset(str(made), shuffle=True, transform=_LitTransform())
        loader = litdata.StreamingDataLoader(
            data, batch_size=batch, num_workers=workers, persistent_workers=workers > 0
        )
        return _endless(loader)

    return batches


def mosaic_stream(folder: Path, made: Path) -> Peer:
    """MosaicML's StreamingDataset of JPEGs."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    with MDSWriter(out=str(made), columns={"image": "jpeg", "label": "int"}, size_limit="16MB") as out:
        for path, label in ImageFolder(folder).samples:
            out.write({"image": Image.open(path), "label": label})

    class Data(StreamingDataset):
        def __init__(self, batch: int) -> None:
            super().__init__(local=str(made), shuffle=True, batch_size=batch)
            self.transform = stock_transform()

        def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(at)
            return self.transform(sample["image"].convert("RGB")), sample["label"]

    def batches(workers: int, batch: int) -> Batches:
        clean_stale_shared_memory()
        return _endless(DataLoader(Data(batch), batch, num_workers=workers, persistent_workers=workers > 0))

    return batches
