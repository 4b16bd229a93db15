"""Reader of artifacts that the published scripts wrote."""

import io
import re
import warnings
import zipfile
from collections.abc import Mapping

import torch
from torch import Tensor

from train_gpt import (
    HEADER_LIMIT,
    SIZE_FACTOR,
    ArtifactError,
    QuantizedTensor,
    array_layout,
    byte_unshuffle,
    decompress,
)

PUBLISHED_SCHEME = re.compile(
    r"passthrough.*|(?P<gate>gate_int8_row)|gptq \(int(?P<bits>[2-8])\)(?P<correction>\+lqer(_asym)?)?"
)


def read_published(blob: bytes) -> dict[str, QuantizedTensor]:  # noqa: F811
    """An artifact of the published scripts -> stored tensors (its model settings are not in it).

    Brotli or lzma over a byte-shuffled `torch.save` of {"w": arrays, "m": schemes by name}; read with
    `weights_only=True`, after checksums and sizes have been looked at. Raises ArtifactError.
    """
    codec = "lzma" if blob.startswith(b"\xfd7zXZ") else "brotli"
    data = byte_unshuffle(decompress(blob, codec, SIZE_FACTOR * len(blob) + HEADER_LIMIT))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            stored = sum(entry.file_size for entry in entries) <= len(data)
            if not stored or any(entry.compress_type for entry in entries) or archive.testzip():
                raise ValueError("damaged archive")
        for device in ("meta", "cpu"):  # sizes first: a tensor may claim more than its bytes
            with warnings.catch_warnings(action="ignore"):
                content = dict(torch.load(io.BytesIO(data), map_location=device, weights_only=True))
            weights = {name: array.detach() for name, array in content["w"].items()}
            if sum(array.numel() * array.element_size() for array in weights.values()) > len(data):
                raise ValueError("tensors are larger than their bytes")
        records = {name: _published_record(name, kind, weights) for name, kind in content["m"].items()}
        if sum(len(record.arrays) for record in records.values()) != len(weights):
            raise ValueError("tensors without a scheme")
    except Exception as error:  # zipfile and torch raise a dozen types for a damaged or foreign file
        reason = " ".join(str(error).split())[:80]
        raise ArtifactError(f"not an artifact of this script, nor a published one ({reason})") from None
    return records


def _published_record(name: str, category: str, weights: Mapping[str, Tensor]) -> QuantizedTensor:
    """A tensor of a published artifact by its category, every array in the type and shape of its layout."""
    found = PUBLISHED_SCHEME.fullmatch(category)
    kind = "fp16" if category.startswith("pass") else "int8_rows" if found["gate"] else "gptq"
    base = {"fp16": name, "int8_rows": f"{name}.gq", "gptq": f"{name}.q"}[kind]
    shape, correction = tuple(weights[base].shape), []
    if found["correction"] == "+lqer":
        correction = ["sym", weights[f"{name}.lqB"].size(0), 0]
    elif found["correction"]:
        b, scales = weights[f"{name}.lqB_a"], weights[f"{name}.lqBs_a"]
        correction = ["asym", b.size(0), b.numel() // scales.numel()]
    arrays = {}
    for key, (dtype, dims) in array_layout(kind, shape, correction).items():
        array = weights[f"{name}.{key}" if key else name].contiguous()
        if array.dtype != {"|i1": torch.int8, "<f2": torch.float16}[dtype]:
            raise ValueError(f"{name}: {array.dtype}")
        arrays[key] = array.reshape(dims)
    return QuantizedTensor(kind, int(found["bits"] or {"fp16": 16, "int8_rows": 8}[kind]), shape, arrays)
