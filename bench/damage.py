"""Damage every kind of input file at random: refused with its name, or the identical data and model.

    python bench/damage.py [--cases 2000] [--seed 0] [--json]

Flipped bits, cut and longer files, zeroed and overwritten blocks, swapped, empty and missing files; shards,
sidecar, tokenizer, manifest, artifact (each codec) and full-precision weights in turn. Each case goes through
what a run does before it trains, then everything that was loaded is compared. `refused`: a UserError whose
text names a damaged file. `harmless`: the same tokens, bytes, pieces and weights. All else is `wrong`: exit
code 1.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg
from bench.settings import TINY, make_data
from harness.preflight import Preflight
from harness.settings import read_settings
from harness.watched import Watches
from systems.plain_text import load_tokenizer

KINDS = ("bits", "cut", "longer", "zeros", "overwritten", "swapped", "empty", "missing")
ENDS = ("damaged", "refused", "harmless", "wrong")


class Target(NamedTuple):
    """One kind of input."""

    files: Sequence[Path]  # one of these is damaged
    load: Callable[[], str]  # reads it as a run does: digest of what was read, or raises UserError


class Halted(Exception):
    """A run has read its inputs, and has made no folder yet."""


class Halt(tg.Watch):
    """Ends a run as soon as it has its first model."""

    def see(self, kind: str, **facts: object) -> None:
        """Keep the run in what is raised."""
        if kind == "model":
            raise Halted(facts["run"])


def read_inputs(environ: Mapping[str, str]) -> tuple[tg.Run, Preflight]:
    """What a run does before it trains, with the harness's checks. Raises UserError as it does."""
    cfg = read_settings(environ)
    preflight = Preflight(cfg, tg.CPU)
    try:
        tg.Run(cfg, tg.CPU, preflight.backends(), tg.read_sources(), Watches([preflight, Halt()]))
    except Halted as halted:
        run = halted.args[0]
    if run.trains:
        preflight.wait_for_hashes()
    return run, preflight


def digest_of(run: tg.Run) -> str:
    """Of all tokens, bytes and weights, and of the pieces of the tokenizer."""
    digest = hashlib.sha256()
    if run.trains:
        for path in tg.shard_paths(run.cfg.data_folder, "train"):
            digest.update(tg.read_shard(path).tobytes())
    digest.update(run.val.tokens.numpy().tobytes() + run.val.target_bytes.numpy().tobytes())
    tokenizer = load_tokenizer(run.cfg)
    for i in range(tokenizer.get_piece_size()):
        digest.update(f"{tokenizer.id_to_piece(i)!r} {tokenizer.get_score(i)!r}".encode())
    for name, tensor in run.model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _loader(folder: Path, **settings: str) -> Callable[[], str]:
    """A function that reads the inputs of a run with these settings."""
    environ = TINY | {"DATA_PATH": str(folder / "data"), "ARTIFACT_DIR": str(folder / "out")} | settings

    return lambda: digest_of(read_inputs(environ)[0])


def targets(folder: Path) -> dict[str, Target]:
    """Inputs of every kind, made in a folder: a small data set, weights and artifacts of a small model."""
    data, text = folder / "data", io.StringIO()
    with contextlib.redirect_stdout(text):
        make_data(data)
    train = sorted(data.glob("fineweb_train_*"))
    (train_shard,), (val,), (sidecar,) = train, data.glob("fineweb_val_0*"), data.glob("fineweb_val_bytes_*")
    everything = _loader(folder)
    found = {
        "train": Target([train_shard], everything),
        "val": Target([val], everything),
        "sidecar": Target([sidecar], everything),
        "tokenizer": Target([data / "tokenizer.model"], everything),
        "manifest": Target([data / "manifest.json"], everything),
    }
    cfg = tg.Config.from_env(TINY)
    torch.manual_seed(1)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    weights = folder / "weights.pt"
    torch.save(model.state_dict(), weights)
    found["weights"] = Target([weights], _loader(folder, QUANTIZE_ONLY="1", MODEL_PATH=str(weights)))
    flat = tg.flatten_banks(model.state_dict(), cfg.num_layers)
    hessians = {name: torch.eye(tensor.size(-1)) for name, tensor in flat.items() if tensor.ndim == 2}
    for codec in tg.CODECS:
        coded = tg.Config.from_env(TINY | {"COMPRESSOR": codec})
        path = folder / f"artifact.{codec}"
        path.write_bytes(tg.pack_artifact(tg.quantize_state(flat, hessians, coded), coded))
        only = {"TTT_EVAL_ONLY": "1", "QUANTIZED_MODEL_PATH": str(path)}
        found[f"artifact-{codec}"] = Target([path], _loader(folder, **only))
    return found


def damage(path: Path, rng: random.Random, others: Sequence[Path]) -> list[Path]:
    """Damage a file on the disk; returns the files that are now other than before."""
    data, kind = bytearray(path.read_bytes()), rng.choice(KINDS)
    place, span = rng.randrange(len(data)), rng.choice((1, 2, 16, 512, 4096))
    if kind == "swapped":
        other = rng.choice(others)
        replace(path, other.read_bytes()), replace(other, bytes(data))
        return [path, other]
    if kind == "missing":
        path.unlink()
        return [path]
    if kind == "bits":
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "longer":
        data += rng.choice((bytes(span), rng.randbytes(span), data[:span]))
    elif kind == "zeros":
        data[place : place + span] = bytes(len(data[place : place + span]))
    elif kind == "overwritten":
        data[place : place + span] = rng.randbytes(len(data[place : place + span]))
    elif kind == "empty":
        data.clear()
    replace(path, bytes(data))
    return [path]


def replace(path: Path, data: bytes) -> None:
    """New contents in a new file: what was mapped into memory stays as it was."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(data)
    os.replace(new, path)


def names(path: Path) -> set[str]:
    """How a message may name a file: by its name, or as one of a split's shards."""
    return {path.name, f"{path.name.rpartition('_')[0]}_*"}


def attempt(target: Target, before: str, changed: Sequence[Path]) -> tuple[str, str]:
    """How reading damaged input ended, and what was said."""
    try:
        after = target.load()
    except tg.UserError as error:
        named = any(name in str(error) for path in changed for name in names(path))
        return "refused" if named else "wrong", str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    return ("harmless", "") if after == before else ("wrong", "read as other data")


def run_damage(
    cases: int, seed: int = 0, make: Callable[[Path], Mapping[str, Target]] = targets, report: bool = False
) -> dict[str, object]:
    """Damage and read `cases` times, the targets in turn.

    Returns counts of all cases (`damaged`, `refused`, `harmless`, `wrong`), for each target too (`kinds`),
    and the first wrong ones (`examples`).
    """
    counts: dict[str, Counter] = {}
    examples = []
    with tempfile.TemporaryDirectory() as scratch:
        made = make(Path(scratch))
        contents = {path: path.read_bytes() for target in made.values() for path in target.files}
        digests = {name: target.load() for name, target in made.items()}
        for case in range(cases):
            name = list(made)[case % len(made)]
            rng = random.Random(f"{seed} {case}")
            path = rng.choice(made[name].files)
            changed = damage(path, rng, [other for other in contents if other != path])
            if all(p.is_file() and p.read_bytes() == contents[p] for p in changed):
                end, said = "harmless", "not changed"  # zeros over zeros
            else:
                end, said = attempt(made[name], digests[name], changed)
            for p in changed:
                replace(p, contents[p])
            counts.setdefault(name, Counter()).update(["damaged", end])
            if end == "wrong":
                examples.append(f"case {case} of seed {seed}, {name}: {said[:300]}")
            if report and case % 100 == 99:
                print(f"{case + 1}/{cases}", file=sys.stderr, flush=True)
    total = sum(counts.values(), Counter())
    kinds = {name: {end: count[end] for end in ENDS} for name, count in counts.items()}
    return {end: total[end] for end in ENDS} | {"kinds": kinds, "examples": examples[:20]}


def main() -> int:
    """Run and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = run_damage(arguments.cases, arguments.seed, report=not arguments.json)
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, ends in {"all": {end: result[end] for end in ENDS}, **result["kinds"]}.items():
            print(name, *(f"{end}:{count}" for end, count in ends.items()))
        print(*result["examples"], sep="\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
