"""One view of a cache in the memory of a device, where a batch is one upload of its positions and one gather of rows.

In: the open files of the view, which may be closed afterwards. Out: rows (rows.py), equal to those of the files.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.view_files import ViewFiles


class DeviceView:
    """Rows of all samples of one view in the memory of a device.

    Args:
        files: Files of the view, whose samples are copied to their device.
    """

    def __init__(self, files: ViewFiles) -> None:
        self._rows = torch.zeros(files.matrix_shape, dtype=torch.int64, device=files.device)
        files.copy_to(self._rows)
        self._scales = files.scales

    def fetch(self, positions: np.ndarray) -> tuple[Tensor, ...]:
        """Copy rows into new memory of the device; see `ViewFiles.fetch`."""
        on_device = torch.from_numpy(positions).to(self._rows.device, non_blocking=True)
        return self._rows.index_select(0, on_device), *self._scales
