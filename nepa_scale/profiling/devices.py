"""Peak rates of known accelerators: dense, without sparsity, from the vendors' data sheets."""

from __future__ import annotations

import torch

# substring of the device's name -> FLOP/s in bf16; the longest match counts
PEAK_BF16 = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that `device` cannot exceed in bf16; None where it is not known (a CPU, fp32, an unlisted device)."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_BF16 if key in name]
    return PEAK_BF16[max(known, key=len)] if known else None
