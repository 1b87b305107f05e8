"""uint8 images to the network's input, on whatever device they are."""

from __future__ import annotations

from typing import Optional

import torch
from torch.nn import functional as F


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


AUGMENTATIONS = ("crop", "low_resolution", "photometric")


def augment(images_BHWC: torch.Tensor, kinds=AUGMENTATIONS) -> torch.Tensor:
    """uint8 images [B, H, W, 3] changed at random, where they are, each by itself; the device's own generator decides.

    crop: every image is scaled by 0.85 to 1.15 and moved by up to a sixteenth. low_resolution: a fifth of them lose
    what a half or a quarter of the pixels cannot show. photometric: brightness, contrast and colour by 0.8 to 1.2 each.
    """
    x = images_BHWC.permute(0, 3, 1, 2).float()
    count, device = len(x), x.device

    def uniform(low, high):
        return torch.rand(count, 1, 1, 1, device=device) * (high - low) + low

    if "crop" in kinds:
        scale, zero = uniform(0.85, 1.15), torch.zeros(count, 1, 1, 1, device=device)
        # affine_grid counts from -1 to 1: an eighth is a sixteenth of the side
        row_x = torch.cat([scale, zero, uniform(-0.125, 0.125)], -1)
        row_y = torch.cat([zero, scale, uniform(-0.125, 0.125)], -1)
        grid = F.affine_grid(torch.cat([row_x, row_y], 2)[:, 0], list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    if "low_resolution" in kinds:
        for factor in (2, 4):  # shapes stay fixed: all are made, some are taken
            small = F.interpolate(F.avg_pool2d(x, factor), size=x.shape[2:], mode="bilinear", align_corners=False)
            x = torch.where(uniform(0, 1) < 0.1, small, x)
    if "photometric" in kinds:
        x = x * uniform(0.8, 1.2)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * uniform(0.8, 1.2) + mean
        grey = x.mean(1, keepdim=True)
        x = (x - grey) * uniform(0.8, 1.2) + grey
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
