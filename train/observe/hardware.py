"""Peak speeds of known devices, for the share of them that a run uses."""

import torch

# Dense bf16 FLOP/s by a part of the device's name. Source: NVIDIA's data sheets, without sparsity.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Returns a device's dense bf16 peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """Returns the peak for a device name; the first entry that occurs in it counts."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)
