"""Program that loads an image folder in each process of a launch, and prints what each has read and found.

accelerate launch ... -m tests.support.shared_inventory DIRECTORY [DIRECTORY OF RANK 1]
"""

import json
import sys

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.encoded import EncodedImages
from kd_accel.distributed import leave_processes, start_processes
from kd_accel.errors import UserError

seen, read = [], EncodedImages._read


def recorded(self, cell):
    seen.append(cell)
    return read(self, cell)


if __name__ == "__main__":
    EncodedImages._read = recorded
    accelerator = start_processes("float32")
    directories = [*sys.argv[1:], sys.argv[1]]
    directory = directories[accelerator.process_index]
    config = DataConfig(source=f"imagefolder:{directory}", image_size=64, memory_limit_mib=1)
    try:
        data = load_data(config, accelerator)
    except UserError as error:
        line = str(error)
    else:
        found = {"train": data.fingerprint_fields(), "test": data.fields_of_test_split(), "mean": data.mean}
        line = json.dumps({"reads": len(seen), **found})
    # One write for each line, so that the lines of two processes do not mix.
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    leave_processes(accelerator)
