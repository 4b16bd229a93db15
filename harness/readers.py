"""Readers of files of any origin: artifacts, ours and those of the published scripts, and weights."""

import dataclasses
import io
import itertools
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from harness.rules import check_settings
from systems.compiled import one_line
from train_gpt import (
    ARTIFACT_MAGIC,
    BANKS,
    FORMS,
    GPT,
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
    flatten_banks,
    read_header,
    stored_arrays,
    unpack_artifact,
)

# No bombs: an artifact may hold so many bytes for each byte of its file, and those of the least limit.
SIZE_FACTOR, LEAST_LIMIT = 16, 1 << 24
MEMBER, MOST_MEMBERS = b"PK\1\2", 1 << 12  # of a published archive, which has one for each array
# What a list of tensors names: their types (those without one, Typed and Untyped, can be called for memory).
PICKLED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (?!Typed|Untyped)\w+Storage"
)
# What wraps a model stands in the names of its tensors: torch.compile, DDP, FSDP, DeepSpeed, checkpointing.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
TORCH_TYPES = {"|i1": torch.int8, "<f2": torch.float16}


def read_artifact(artifact: bytes, cfg: Config) -> tuple[dict[str, object], dict[str, QuantizedTensor]]:
    """Our artifact or a published one -> model settings (none in a published one) and stored tensors.

    The settings include the codec. Raises ArtifactError unless all is as written. Nothing is decoded before
    the header's tensors are known to be in proportion to the file and, by name and shape, those of the model
    that its settings describe.
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
    if good and kind == "fp16":
        good = bits == 16 and len(shape) <= 4 and form == ""
    elif good:
        known = {"int8_rows": (8,), "gptq": range(2, 9), "trellis": (8,)}
        good = bits in known[kind] and len(shape) == 2 and 0 not in shape
    if good and form in ("sym", "asym"):  # no more rank than singular values, as `low_rank_factors` gives
        whole = group > 0 and rank * shape[1] % group == 0 if form == "asym" else group == 0
        good = kind in ("gptq", "trellis") and 1 <= rank <= min(shape) and whole
    elif good:
        fitted = form == "columns" and kind in ("gptq", "trellis")
        good = (form == "" or fitted) and rank == group == 0
    if not good:
        raise ArtifactError(f"artifact declares an impossible tensor: {f'{name} {kind} {bits} {shape}'[:80]}")


def check_header(header: Mapping, file_bytes: int, stream_bytes: int, cfg: Config) -> None:
    """Refuse a header that does not fit its file or its own model, before anything is made of its sizes."""
    settings, tensors = header["model"], header["tensors"]
    for entry in tensors:
        check_entry(*entry)
    streams = artifact_streams(tensors, cfg)
    declared = sum(part.size for parts in streams.values() for part in parts)
    if declared > SIZE_FACTOR * file_bytes + LEAST_LIMIT:
        raise ArtifactError(f"artifact declares {declared} bytes: more than such a file holds")
    lengths = [length for _, length in header["streams"]]
    fits = [key for key, _ in header["streams"]] == list(streams) and sum(lengths) == stream_bytes
    if not fits or min(lengths, default=0) < 0:
        raise ArtifactError("artifact streams do not fit its tensors")
    if not settings.keys() <= {*MODEL_SETTINGS, "enable_looping_at"}:
        raise ArtifactError("artifact has settings that no model has")
    try:
        cfg = dataclasses.replace(cfg, quantizer="scalar", gptq_drift_batches=0)  # are not the artifact's
        check_settings(cfg := dataclasses.replace(cfg, **settings))
    except ConfigError as error:
        raise ArtifactError(f"artifact has settings that are not possible ({str(error)[:200]})") from None
    check_shapes([(name, tuple(shape)) for name, _, _, shape, _ in tensors], cfg)


def check_shapes(declared: Sequence[tuple[str, tuple]], cfg: Config) -> None:
    """Refuse names and shapes that are not those of the model, each once."""
    shapes = dict(declared)
    if len(shapes) < len(declared):
        raise ArtifactError("artifact declares a tensor twice")
    if cfg.num_layers * sum(map(len, BANKS.values())) > len(shapes):  # a table of them would take its time
        raise ArtifactError("artifact declares a model of more layers than it holds")
    wanted = model_shapes(cfg)
    for name in (*wanted, *shapes):
        told, has = (table.get(name, "missing") for table in (shapes, wanted))
        if told != has:
            raise ArtifactError(f"artifact declares {name[:80]} as {told}, in its model it is {has}")


class Unmade(TorchFunctionMode):
    """Sizes of what is joined or drawn; to know more of what has no memory torch imports 900 modules."""

    def __torch_function__(
        self, function: Callable, types: object, args: Sequence = (), kwargs: object = None
    ):
        """Do as torch does, but for these."""
        kwargs = kwargs or {}
        if function is torch.stack:
            return torch.empty(len(args[0]), *args[0][0].shape)
        if function is torch.cat:
            return torch.empty(sum(map(len, args[0])), *args[0][0].shape[1:])
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **kwargs)


def model_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, taken out of their banks; none of them is made."""
    with torch.device("meta"), Unmade():
        state = GPT(cfg).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in flatten_banks(state, cfg.num_layers).items()}


def read_published(artifact: bytes) -> dict[str, QuantizedTensor]:
    """An artifact of the published scripts -> stored tensors (its model settings are not in it).

    Brotli or lzma over a byte-shuffled `torch.save` of {"w": arrays, "m": schemes by name}; read by
    `load_archive`. Shapes are compared when a model takes them. Raises ArtifactError.
    """
    cfg = Config(compressor="lzma" if artifact.startswith(b"\xfd7zXZ") else "brotli")
    check_codec(cfg.compressor)
    try:
        data = byte_unshuffle(decompress(artifact, cfg, SIZE_FACTOR * len(artifact) + LEAST_LIMIT))
        if data.count(MEMBER) > MOST_MEMBERS:  # before anything is made of them
            raise ValueError("more members than a model has arrays")
        content = load_archive(io.BytesIO(data), "w")
        weights = {name: array.detach() for name, array in content["w"].items()}
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
    check_entry(name, kind, bits, shape, correction)
    arrays = {}
    for _, key, dtype, dims, _ in stored_arrays(name, kind, bits, shape, correction):
        array = array_of(key).contiguous()
        if array.dtype != TORCH_TYPES[dtype]:
            raise ValueError(f"{name}: {array.dtype}")
        arrays[key] = array.reshape(dims)
    return QuantizedTensor(kind, bits, shape, arrays, correction)


def load_archive(file: BinaryIO, part: str = "") -> dict:
    """A dictionary that `torch.save` wrote, its tensors in it or in a part of it. Raises errors of any type.

    Checksums of the archive, which torch does not look at, are compared first, then all sizes: a tensor may
    claim more than its bytes.
    """
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive, warnings.catch_warnings(action="ignore"):
        entries = archive.infolist()
        stored = sum(entry.file_size for entry in entries) <= size
        if not stored or any(entry.compress_type for entry in entries) or archive.testzip():
            raise ValueError("damaged archive")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                check_pickle(archive.read(entry), len(entries))
    for device in ("meta", "cpu"):
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols: an error says enough
            content = dict(torch.load(file, map_location=device, weights_only=True))
        tensors = (content[part] if part else content).values()
        if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > size:
            raise ValueError("tensors are larger than their bytes")
    return content


def check_pickle(data: bytes, members: int) -> None:
    """Refuse a list of tensors that grows while it is read: too long, with other objects, or sharing tuples.

    Half a kilobyte is enough for any name and scheme. The hash of a tuple that holds a tuple twice, which
    holds another twice, and so on 40 deep, is never done.
    """
    if len(data) > 4096 + 512 * members:
        raise ValueError("a longer list of tensors than the archive has")
    plain, last = set(), ""
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name.endswith("PUT"):
            (plain.add if last in ("BINUNICODE", "GLOBAL", "REDUCE") else plain.discard)(argument)
        known = name != "GLOBAL" or PICKLED.fullmatch(argument)
        if not known or (name.endswith("GET") and argument not in plain):
            raise ValueError("a list of more than tensors")
        last = name


def load_weights(path: Path) -> dict[str, Tensor]:
    """A full-precision checkpoint: a state dict, read without unpickling anything but tensors."""
    try:
        with open(path, "rb") as file:
            state = load_archive(file)
    except Exception:  # torch raises half a dozen types for a damaged or foreign file
        raise ArtifactError(
            f"MODEL_PATH={path}: not a checkpoint that holds tensors and nothing else"
        ) from None
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ArtifactError(f"MODEL_PATH={path}: {broken[0]} holds values that are not finite")
    return state


def unwrapped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the names that they have in the model alone, and what was taken off.

    Raises ValueError where two would have the same name.
    """
    parts = {name: name.split(".") for name in state}
    names = {name: ".".join(part for part in parts[name] if part not in WRAPPERS) for name in state}
    if len({*names.values()}) < len(names):
        raise ValueError("some tensors differ only by what wraps the model")
    taken = sorted(WRAPPERS.intersection(*[itertools.chain(*parts.values())]))
    return {names[name]: tensor for name, tensor in state.items()}, taken


def model_of_checkpoint(run: Run, path: Path) -> GPT:
    """The full-precision model of an earlier run."""
    model = run.new_model(run.cfg)
    try:
        state, taken = unwrapped(load_weights(path))
        if taken:
            run.result["names_without"] = taken
        model.load_state_dict(state)
    except UserError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        reason = one_line(error)
        raise ArtifactError(f"MODEL_PATH={path}: does not fit the model settings ({reason})") from None
    return model
