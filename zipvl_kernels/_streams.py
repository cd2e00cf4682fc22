"""Where the next launch goes: torch's current device and stream as plain numbers.

`torch.cuda.current_stream` makes an object at every call, which takes longer than a launch; these are what it asks.
"""

import torch


def current_device() -> int:
    """Number of torch's current CUDA device."""
    return torch._C._cuda_getDevice()


def current_stream(device: torch.device) -> int:
    """Handle of torch's current stream on `device`; 0 names the default stream of the current device."""
    return torch._C._cuda_getCurrentRawStream(device.index)
