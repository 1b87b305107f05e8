"""uint8 images to the network's input, on whatever device they are."""

from __future__ import annotations

from typing import Optional

import torch


def to_input(
    images_BHWC: torch.Tensor,
    flip_B: Optional[torch.Tensor] = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    channel_order: str = "rgb",
) -> torch.Tensor:
    """[B, 3, H, W] = (x / 255 - 0.5) / 0.5 of uint8 RGB images [B, H, W, 3], on the images' device.

    flip_B: bool [B], the images to mirror left to right. channel_order: what the network was trained on; "bgr" for
    weights of code that never swapped OpenCV's channels.
    """
    if channel_order == "bgr":
        images_BHWC = images_BHWC.flip(-1)
    if flip_B is not None:
        # uint8 moves a quarter of the bytes that floats would; where() keeps the shapes fixed on every device
        images_BHWC = torch.where(flip_B.view(-1, 1, 1, 1), images_BHWC.flip(2), images_BHWC)
    # Half precision would round between the steps. In fp32 dividing by 127.5 is dividing by 255 and doubling, to the
    # bit, so this is ToTensor + Normalize's result in two passes instead of three.
    exact = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    input_BCHW = images_BHWC.permute(0, 3, 1, 2).to(dtype=exact, memory_format=memory_format)
    return input_BCHW.div_(127.5).sub_(1.0).to(dtype)
