"""Images that are hard to resize, and their resizing by Pillow."""

import numpy as np
import torch
from PIL import Image


def noise(size, samples=2):
    """Return uint8 images [samples, 3, size, size] of noise and of black and white stripes, the hardest to resize."""
    images = torch.randint(0, 256, (samples, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    images[0, :, :, ::2], images[0, :, ::3] = 255, 0
    return images


def pillow(images, size, interpolation, crop_pct, dtype):
    """Return images resized and cropped with Pillow, in 8 bits, or in float32 with clipping where 8-bit images have it."""
    side, filter_ = int(size / crop_pct), Image.Resampling[interpolation.upper()]
    first = round((side - size) / 2)

    def resized(channel):
        for shape in ((side, len(channel)), (side, side)):
            image = Image.fromarray(channel, mode="L" if dtype == np.uint8 else "F")
            channel = np.asarray(image.resize(shape, filter_)).clip(0, 255).astype(dtype)
        return channel[first : first + size, first : first + size]

    return np.stack([[resized(channel) for channel in image] for image in images.numpy().astype(dtype)])
