"""Damage artifacts at random and read them: an ArtifactError or the identical model, nothing else.

    python bench/fuzz_artifact.py [--cases 100000] [--seed 0] [--json]

Every format in turn: our container with each codec and quantiser, and the published one. A third of the
cases are forged: damaged inside the checksum (of the container) or inside compression and archive (of the
published format), which are then made to fit. A forged file that is read may be another model, as its author
could have written one. Ends with exit code 1 at the first case that raises anything else, takes over 5
seconds or lets the process grow by more than 4 times the declared size (at least 64 MiB: the codecs' own
windows).
"""

import argparse
import hashlib
import io
import json
import lzma
import random
import resource
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import brotli
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg
from harness.readers import read_artifact

TINY = {
    "vocab_size": 64,
    "num_layers": 2,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2.0,
    "rope_dims": 4,
    "num_loops": 0,
    "parallel_start_layer": 1,
    "xsa_last_n": 2,
    "float16_max_elements": 1024,
    "gated_attn_quant_gate": True,
}
FORMATS = ("brotli", "lzma", "ans", "trellis", "published")
MOST_SECONDS, LEAST_GROWTH = 5.0, 64 << 20


def format_config(kind: str) -> tg.Config:
    """Settings of a small model that is stored in a format; `trellis` is ans with that QUANTIZER."""
    chosen = {"published": {}, "trellis": {"compressor": "ans", "quantizer": "trellis"}}
    return tg.Config(**TINY, **chosen.get(kind, {"compressor": kind}))


def small_records(config: tg.Config) -> dict[str, tg.QuantizedTensor]:
    """Stored tensors of a small model with random weights: every kind of scheme is among them."""
    model = tg.GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    flat = tg.flatten_banks(model.state_dict(), config.num_layers)
    hessians = {name: torch.eye(tensor.shape[-1]) for name, tensor in flat.items() if tensor.ndim == 2}
    return tg.quantize_state(flat, hessians, config)


def published_artifact(records: dict[str, tg.QuantizedTensor], codec: str = "brotli") -> bytes:
    """The same tensors in the published format, as SPEC section 5 and DESIGN describe it."""
    weights = {
        f"{name}.{key}" if key else name: array
        for name, record in records.items()
        for key, array in record.arrays.items()
    }
    buffer = io.BytesIO()
    torch.save({"w": weights, "m": {name: record.category for name, record in records.items()}}, buffer)
    return tg.compress(tg.byte_shuffle(buffer.getvalue()), tg.Config(compressor=codec))


def damaged(original: bytes, rng: random.Random) -> bytes:
    """A copy of some bytes with one to three changes: bits, bytes, runs, cuts, insertions, repeats."""
    data = bytearray(original)
    for _ in range(rng.randint(1, 3)):
        place, span = rng.randrange(len(data) + 1), rng.randint(1, 40)
        kind = rng.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + 1] = rng.randbytes(1)
        elif kind == 2:
            data[place : place + span] = bytes([rng.choice((0, 255))]) * span
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            del data[place : place + span]
        elif kind == 5:
            data[place:place] = rng.randbytes(span)
        else:
            start = rng.randrange(len(data) + 1)
            data[place:place] = data[start : start + span]
    return bytes(data)


def forged(artifact: bytes, rng: random.Random) -> bytes:
    """Damage that the outermost check does not see."""
    size = tg.PREFIX.size
    if not artifact.startswith(tg.ARTIFACT_MAGIC):
        return _forged_published(artifact, rng)
    _, version, codec, head_len, _ = tg.PREFIX.unpack_from(artifact)
    head = tg.decompress(artifact[size : size + head_len], tg.Config(compressor=tg.CODECS[codec]))
    streams = artifact[size + head_len :]
    if rng.random() < 0.5:
        head = damaged(head, rng)
    else:
        streams = damaged(streams, rng)
    fast = tg.CODECS[codec] == "lzma"
    head = lzma.compress(head, preset=0) if fast else brotli.compress(head, quality=1)
    digest = hashlib.sha256(head + streams).digest()
    return tg.PREFIX.pack(tg.ARTIFACT_MAGIC, version, codec, len(head), digest) + head + streams


def _forged_published(artifact: bytes, rng: random.Random) -> bytes:
    """Damage under the compression, or under the archive's checksums too."""
    data = tg.byte_unshuffle(tg.decompress(artifact, tg.Config()))
    if rng.random() < 0.3:
        data = damaged(data, rng)
    else:
        out, target = io.BytesIO(), rng.choice(("data.pkl", "data.pkl", "data/0", "version", "byteorder"))
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            for entry in old.namelist():
                content = old.read(entry)
                hit = entry.endswith(target)
                new.writestr(zipfile.ZipInfo(entry), damaged(content, rng) if hit else content)
        data = out.getvalue()
    return brotli.compress(data, quality=0)


def contents(artifact: bytes) -> str:
    """Digest of all that is read from an artifact."""
    settings, records = read_artifact(artifact, tg.Config())
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, record in records.items():
        digest.update(f"{name} {record.kind} {record.bits} {record.shape}".encode())
        for key, array in record.arrays.items():
            digest.update(f"{key} {tuple(array.shape)}".encode() + array.numpy().tobytes())
    return digest.hexdigest()


def build(artifact: bytes) -> None:
    """Go on from a forged artifact that was read, as a run does: its model is built, or refused."""
    settings, records = read_artifact(artifact, tg.Config())
    try:
        model = tg.GPT(tg.Config(**settings or TINY))
        model.load_state_dict(tg.dequantize_state(records, model.cfg.num_layers))
    except (tg.UserError, TypeError, RuntimeError, KeyError):  # `Run` says these in one line
        pass


def fuzz(artifact: bytes, cases: int, seed: int) -> Counter:
    """Read `cases` damaged copies. Returns how they ended; raises AssertionError at one that must not be."""
    before = contents(artifact)
    ends, slowest = Counter(), 0.0
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        forge = case % 3 == 2
        bad = forged(artifact, rng) if forge else damaged(artifact, rng)
        start = time.perf_counter()
        try:
            after = contents(bad)
        except tg.ArtifactError:
            end = "refused"
        else:
            end = "identical" if after == before else "other model, forged"
            if after != before:
                build(bad)
            assert forge or after == before, f"case {case} of seed {seed}: read as another model"
        slowest = max(slowest, time.perf_counter() - start)
        assert slowest < MOST_SECONDS, f"case {case} of seed {seed}: {slowest:.1f} s"
        ends[end] += 1
    return ends


def memory_growth() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Run all formats and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="damaged files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = {}
    for kind in FORMATS:
        config = format_config(kind)
        records = small_records(config)
        artifact = published_artifact(records) if kind == "published" else tg.pack_artifact(records, config)
        fuzz(artifact, 300, arguments.seed - 1)  # what the libraries allocate once
        before, start = memory_growth(), time.perf_counter()
        ends = fuzz(artifact, -(-arguments.cases // len(FORMATS)), arguments.seed)
        grown = memory_growth() - before
        declared = sum(a.numel() * a.element_size() for r in records.values() for a in r.arrays.values())
        assert grown <= max(4 * declared, LEAST_GROWTH), f"{kind}: grew by {grown} bytes"
        seconds = time.perf_counter() - start
        report[kind] = dict(ends) | {
            "bytes": len(artifact),
            "grown_bytes": grown,
            "seconds": round(seconds, 1),
        }
        report[kind]["cases"] = sum(ends.values())
        if not arguments.json:
            print(kind, *(f"{key}:{value}" for key, value in report[kind].items()), flush=True)
    if arguments.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
