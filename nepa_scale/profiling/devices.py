"""What known accelerators can do: dense, without sparsity, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nepa_scale.config import ConfigError, nearest


@dataclass(frozen=True)
class Device:
    """One accelerator of a usual server.

    name: a substring of what torch calls it; the longest match counts
    peak: FLOP/s in bf16
    memory: bytes
    bandwidth: bytes/s of its memory
    link: bytes/s in one direction to the other accelerators of its host
    network: bytes/s in one direction to other hosts: its share of all the host's cards
    per_host: accelerators of one host
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    per_host: int = 8


DEVICES = {
    "a100-40": Device("A100-SXM4-40GB", 312e12, 40e9, 1.555e12, 300e9, 25e9),
    "a100": Device("A100", 312e12, 80e9, 2.039e12, 300e9, 25e9),
    "a800": Device("A800", 312e12, 80e9, 2.039e12, 200e9, 25e9),
    "h100-pcie": Device("H100 PCIe", 756e12, 80e9, 2.0e12, 64e9, 50e9),
    "h100": Device("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h800": Device("H800", 989e12, 80e9, 3.35e12, 200e9, 50e9),
    "h200": Device("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Device("B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9),
    "l40s": Device("L40S", 362e12, 48e9, 0.864e12, 32e9, 25e9),
    "rtx4090": Device("RTX 4090", 165e12, 24e9, 1.008e12, 32e9, 12.5e9),
    "mi300x": Device("MI300X", 1307e12, 192e9, 5.3e12, 448e9, 50e9),
}


def find_device(name: str) -> Device:
    """The device called `name` on the command line. Raises ConfigError: unknown; the nearest is named."""
    if name.lower() not in DEVICES:
        raise ConfigError(f"unknown device {name}{nearest(name.lower(), list(DEVICES))}; known: {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that `device` cannot exceed in bf16; None where it is not known (a CPU, fp32, an unlisted device)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    found = torch.cuda.get_device_name(device)
    known = [known for known in DEVICES.values() if known.name in found]
    return max(known, key=lambda device: len(device.name)).peak if known else None
