"""Readers of files of any origin: artifacts, ours and those of the published scripts, and weights."""

import dataclasses
import io
import itertools
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.rules import check_settings
from train_gpt import (
    ARTIFACT_MAGIC,
    FORMS,
    GPT,
    HEADER_LIMIT,
    MODEL_SETTINGS,
    ArtifactError,
    Config,
    ConfigError,
    QuantizedTensor,
    Run,
    UserError,
    artifact_streams,
    byte_unshuffle,
    check_codec,
    codec_of,
    decompress,
    one_line,
    read_header,
    stored_arrays,
    unpack_artifact,
)

SIZE_FACTOR = 16  # an artifact declares at most so many bytes per byte of its file: no bombs
TORCH_TYPES = {"|i1": torch.int8, "<f2": torch.float16}


def read_artifact(artifact: bytes, cfg: Config) -> tuple[dict[str, object], dict[str, QuantizedTensor]]:
    """Our artifact or a published one -> model settings (none in a published one) and stored tensors.

    The settings include the codec. Raises ArtifactError unless all is as written; nothing is decoded before
    the sizes that the header declares are known to be in proportion to the file.
    """
    if not artifact.startswith(ARTIFACT_MAGIC[:3]):
        return {}, read_published(artifact)
    cfg = dataclasses.replace(cfg, compressor=codec_of(artifact))
    check_codec(cfg.compressor)
    try:
        header, start = read_header(artifact, cfg)
        check_header(header, len(artifact), len(artifact) - start, cfg)
        return unpack_artifact(artifact, cfg)
    except UserError:
        raise
    except Exception as error:  # a header that was made by hand ends in any error, and so does each codec
        raise ArtifactError(f"damaged artifact ({one_line(error)})") from None


def check_entry(name: str, kind: str, bits: int, shape: Sequence[int], correction: Sequence) -> None:
    """Refuse a tensor's entry in the header that `pack_artifact` cannot have written."""
    form, rank, group = correction or ("", 0, 0)
    good = type(name) is str and all(type(n) is int and n >= 0 for n in (bits, *shape, rank, group))
    good = good and kind in ("fp16", "int8_rows", "gptq") and bits <= 16
    good = good and (len(shape) <= 4 if kind == "fp16" else len(shape) == 2)
    good = good and form in (("", "columns", "sym", "asym") if kind == "gptq" else ("",))
    if not good or (form == "asym" and (not group or rank * shape[1] % group)):
        raise ArtifactError(f"artifact declares an impossible tensor: {f'{name} {kind} {bits} {shape}'[:80]}")


def check_header(header: Mapping, file_bytes: int, stream_bytes: int, cfg: Config) -> None:
    """Refuse a header that does not fit its file or has no model, before anything is made of its sizes."""
    settings, tensors, index = header["model"], header["tensors"], dict(header["streams"])
    for entry in tensors:
        check_entry(*entry)
    streams = artifact_streams(tensors, cfg)
    declared = sum(part.size for parts in streams.values() for part in parts)
    if declared > SIZE_FACTOR * file_bytes + HEADER_LIMIT:
        raise ArtifactError(f"artifact declares {declared} bytes: more than such a file holds")
    if list(index) != list(streams) or min(index.values()) < 0 or sum(index.values()) != stream_bytes:
        raise ArtifactError("artifact streams do not fit its tensors")
    if not settings.keys() <= {*MODEL_SETTINGS, "enable_looping_at"}:
        raise ArtifactError("artifact has settings that no model has")
    try:
        check_settings(dataclasses.replace(cfg, **settings))
    except ConfigError as error:
        raise ArtifactError(f"artifact has settings that are not possible ({error})") from None
    layers, dim, shapes = settings["num_layers"], settings["model_dim"], {t[0]: t[3] for t in tensors}
    if layers > len(shapes) or settings["num_loops"] > HEADER_LIMIT >> 8:
        raise ArtifactError("artifact declares a model of more layers than it holds")
    wanted = {"tok_emb.weight": [settings["vocab_size"], dim]}
    for layer in range(layers):
        wanted[f"blocks.{layer}.attn.c_q.weight"] = [dim, dim]
        wanted[f"blocks.{layer}.mlp.fc.weight"] = [int(settings["mlp_mult"] * dim), dim]
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ArtifactError(f"{name} has shape {shapes[name]}, not {shape}")


def read_published(artifact: bytes) -> dict[str, QuantizedTensor]:
    """An artifact of the published scripts -> stored tensors (its model settings are not in it).

    Brotli or lzma over a byte-shuffled `torch.save` of {"w": arrays, "m": schemes by name}; read with
    `weights_only=True`, after checksums and sizes have been looked at. Raises ArtifactError.
    """
    cfg = Config(compressor="lzma" if artifact.startswith(b"\xfd7zXZ") else "brotli")
    check_codec(cfg.compressor)
    try:
        data = byte_unshuffle(decompress(artifact, cfg, SIZE_FACTOR * len(artifact) + HEADER_LIMIT))
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
        records = {name: _published_tensor(name, form, weights) for name, form in content["m"].items()}
        if sum(len(record.arrays) for record in records.values()) != len(weights):
            raise ValueError("tensors without a scheme")
    except Exception as error:  # zipfile and torch raise a dozen types for a damaged or foreign file
        reason = " ".join(str(error).split())[:80]
        raise ArtifactError(f"not an artifact of this script, nor a published one ({reason})") from None
    return records


def published_forms() -> dict[str, tuple[str, int, str]]:
    """Name of a form in published artifacts -> kind, bits and form of the correction."""
    forms = {FORMS["int8_rows"][0]: ("int8_rows", 8, "")}
    for bits, correction in itertools.product(range(2, 9), ("", "sym", "asym")):
        name = FORMS["gptq"][0].format(bits) + (FORMS[correction][0] if correction else "")
        forms[name] = "gptq", bits, correction
    return forms


def _published_tensor(name: str, category: str, weights: Mapping[str, Tensor]) -> QuantizedTensor:
    """A tensor of a published artifact by its category, every array in the type and shape of its form."""
    passthrough = category.startswith("passthrough")
    kind, bits, form = ("fp16", 16, "") if passthrough else published_forms()[category]

    def array_of(key: str) -> Tensor:
        return weights[f"{name}.{key}" if key else name]

    shape, correction = tuple(array_of(next(iter(FORMS[kind][1]))).shape), ()
    if form:
        *_, b, b_scale = map(array_of, FORMS[form][1])
        correction = form, len(b), b.numel() // b_scale.numel() if form == "asym" else 0
    arrays = {}
    for _, key, dtype, dims, _ in stored_arrays(name, kind, bits, shape, correction):
        array = array_of(key).contiguous()
        if array.dtype != TORCH_TYPES[dtype]:
            raise ValueError(f"{name}: {array.dtype}")
        arrays[key] = array.reshape(dims)
    return QuantizedTensor(kind, bits, shape, arrays, correction)


def load_weights(path: Path) -> dict[str, Tensor]:
    """A full-precision checkpoint: a state dict, read without unpickling anything but tensors.

    Checksums of the archive, which torch does not look at, are compared first.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("checksum differs")
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols: the error below says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises half a dozen types for a damaged or foreign file
        raise ArtifactError(
            f"MODEL_PATH={path}: not a checkpoint that holds tensors and nothing else"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ArtifactError(f"MODEL_PATH={path}: not a state dict of tensors")
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ArtifactError(f"MODEL_PATH={path}: {broken[0]} holds values that are not finite")
    return state


def model_of_checkpoint(run: Run, path: Path) -> GPT:
    """The full-precision model of an earlier run."""
    model = run.new_model(run.cfg)
    try:
        model.load_state_dict(load_weights(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = one_line(error)
        raise ArtifactError(f"MODEL_PATH={path}: does not fit the model settings ({reason})") from None
    return model
