"""Random bytes, levels and stored tensors through every codec: they come back."""

import math
import random

import numpy as np
import pytest
import torch
from test_codec import round_trip

CODECS = ("brotli", "lzma", "ans")


def draw_levels(rng: random.Random, shape: tuple[int, ...], top: int) -> np.ndarray:
    """Levels -top-1..top: uniform, as GPTQ leaves them, nearly all zero, or all the same."""
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(32)))
    kind = rng.choice(("uniform", "gaussian", "columns", "rare", "same"))
    levels = noise.integers(-top - 1, top + 1, shape)
    if kind in ("gaussian", "columns"):
        spread = np.exp(noise.standard_normal(shape[-1])) if kind == "columns" and shape else 1.0
        levels = np.clip(np.rint(noise.standard_normal(shape) * spread * top / 8), -top - 1, top)
    elif kind == "rare":
        levels = levels * (noise.random(shape) < 0.01)
    elif kind == "same":
        levels = np.full(shape, rng.randint(-top - 1, top))
    return np.asarray(levels).astype(np.int8)


def draw_entry(rng: random.Random, name: str) -> tuple:
    """What a header says of a tensor: name, kind, bits, shape, correction."""
    kind = rng.choice(("fp16", "int8_rows", "gptq", "gptq"))
    sizes = rng.choices((1, 2, 3, 16, 33, 64), k=2) if kind != "fp16" else ()
    shape = tuple(sizes or rng.choices((1, 2, 3, 9), k=rng.randint(0, 4)))
    if kind != "gptq":
        return name, kind, 8 if kind == "int8_rows" else 16, shape, ()
    rank = rng.randint(1, 5)
    groups = [group for group in range(1, 65) if rank * shape[1] % group == 0]
    forms = (), ("columns", 0, 0), ("sym", rank, 0), ("asym", rank, rng.choice(groups))
    return name, kind, rng.randint(2, 8), shape, rng.choice(forms)


def draw_record(tg, rng: random.Random, entry: tuple):
    """A stored tensor of random levels and of float16 numbers of any bits, infinite ones and NaN too."""
    arrays = {}
    for array in tg.stored_arrays(*entry):
        if array.dtype == "|i1":
            arrays[array.key] = torch.from_numpy(draw_levels(rng, array.dims, array.top))
        else:
            data = np.frombuffer(rng.randbytes(2 * math.prod(array.dims)), "<f2").reshape(array.dims)
            arrays[array.key] = torch.from_numpy(data.copy())
    return tg.QuantizedTensor(*entry[1:4], arrays, entry[4])


@pytest.mark.cases(900)
def test_stored_tensors_come_back(tg, rng):
    """Any set of forms, shapes and bits, as an artifact."""
    codec, entries = rng.choice(CODECS), [draw_entry(rng, f"t{i}") for i in range(rng.randint(1, 12))]
    print(codec, entries)
    records = {entry[0]: draw_record(tg, rng, entry) for entry in entries}
    artifact = tg.pack_artifact(records, tg.Config(compressor=codec))
    settings, read = tg.unpack_artifact(artifact, tg.Config())
    assert settings["compressor"] == codec and list(read) == list(records)
    for name, record in records.items():
        other = read[name]
        assert (other.kind, other.bits, other.shape) == (record.kind, record.bits, record.shape)
        assert other.correction == record.correction and other.arrays.keys() == record.arrays.keys()
        for key, array in record.arrays.items():
            assert (other.arrays[key].shape, other.arrays[key].dtype) == (array.shape, array.dtype)
            assert other.arrays[key].numpy().tobytes() == array.numpy().tobytes(), (name, key)


@pytest.mark.cases(450)
def test_levels_come_back_from_the_entropy_coder(tg, rng):
    """Also matrices without rows or columns, and a largest level of their own for each."""
    sizes = [
        tuple(rng.choice((0, 1, 2, 15, 17, 63, 65, 130)) for _ in range(2)) for _ in range(rng.randint(0, 5))
    ]
    layout = [(shape, rng.choice((1, 3, 7, 31, 63, 127))) for shape in sizes]
    print(layout)
    round_trip(tg, [(draw_levels(rng, shape, top), top) for shape, top in layout])


@pytest.mark.cases(900)
def test_bytes_come_back(tg, rng):
    """Of any length, shuffled by any stride, also those that look shuffled."""
    alphabet = rng.choice((b"a", b"\0\xff", b"BSHF\1\2", bytes(range(256))))
    data = bytes(rng.choices(alphabet, k=rng.choice((0, 1, 4, 5, 6, 1000, rng.randrange(20_000)))))
    cfg, stride = tg.Config(compressor=rng.choice(CODECS)), rng.choice((2, 3, 4, 7, 255))
    print(cfg.compressor, stride, len(data), data[:40])
    packed = tg.compress(data, cfg)
    assert tg.decompress(packed, cfg, len(data)) == data
    if len(data) >= stride:
        assert tg.byte_unshuffle(tg.byte_shuffle(data, stride)) == data
    if data:
        with pytest.raises(tg.ArtifactError):
            tg.decompress(packed, cfg, len(data) - 1)


@pytest.mark.cases(300)
def test_a_stored_correction_gives_the_same_weights(tg, rng):
    """GPTQ and LQER of a random matrix: dequantised before and after it was an artifact, bit for bit."""
    rows, columns = rng.choice((16, 24, 33, 64, 100, 256, 512)), rng.choice((16, 24, 48, 64, 200, 384))
    rank, group, bits = rng.randint(1, 8), rng.choice((0, 16, 64)), rng.choice((4, 6, 8))
    print(rows, columns, rank, group, bits)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    weight, inputs = (torch.randn(n, columns, generator=generator) for n in (rows, 500))
    cfg, factor = tg.Config(), tg.factorise(inputs.T @ inputs)
    record = tg.quantize_tensor(weight, tg.Scheme("gptq", 6, 12.85), factor, cfg)
    a, b = tg.low_rank_factors(weight - record.dequantize(), rank)
    record.correction, arrays = tg.pack_low_rank(a, b, group, bits)
    record.arrays |= arrays
    back = tg.unpack_artifact(tg.pack_artifact({"matrix": record}, cfg), cfg)[1]["matrix"]
    assert torch.equal(record.dequantize(), back.dequantize())
