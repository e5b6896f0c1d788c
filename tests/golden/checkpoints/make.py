"""Makes v1.safetensors, a checkpoint of version 1, from the description in src/formats/checkpoint.h alone: it is written by the
safetensors package and its checksum computed by the xxhash package, so that it tests latte's reader and not its writer.

    pip install numpy safetensors xxhash && python make.py
"""

import struct
from pathlib import Path

import numpy as np
import xxhash
from safetensors.numpy import save_file

weights = np.array([[1, 2], [3, 4]], dtype=np.float32)
tensors = {
    "random.cpu": np.array([9, 8, 7, 6, 5], dtype=np.uint8),
    "model.weight": weights,
    "optimizer.exp_avg.model.weight": weights,
}
metadata = {
    "format": "latte.checkpoint",
    "version": "1",
    "config": '{"layers": 2, "vocabulary": "bytes"}',
    "step": "1234",
}


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    encoded = value.encode()
    return number(len(encoded)) + encoded


DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.uint8): "U8"}
covered = number(len(metadata))
for key in sorted(metadata):
    covered += text(key) + text(metadata[key])
covered += number(len(tensors))
for name in sorted(tensors):
    array = tensors[name]
    covered += text(name) + text(DTYPES[array.dtype]) + number(array.ndim)
    covered += b"".join(number(size) for size in array.shape) + number(array.nbytes) + array.tobytes()
metadata["checksum"] = xxhash.xxh3_128_hexdigest(covered)

save_file(tensors, Path(__file__).with_name("v1.safetensors"), metadata)
print(metadata["checksum"])
