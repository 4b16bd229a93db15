"""An unknown script, asked from outside: it is run on validation sets that were made up, and says totals.

Nothing is known of the script but how it is run and that it prints a score of the lineage (`logbook/`). It
sees each set in a place of its own, under new names, beside copies of the files that are counted, in the box
(`auditing/box.py`). What it says comes to one number a run: the nats of all targets, `Total`.
"""

import functools
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import runs
from auditing import box
from auditing.run import BOS, Audit, AuditError, NotChecked, read_json, write_values
from scripts import sha256_of
from systems.layout import CASEOPS_SUFFIX, tokenizer_name

PRINTED_DECIMALS = (4, 6, 8)  # of a score in logs; result.json has all digits
OF_THE_MACHINE = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")  # as they are here
Charge = Callable[[np.ndarray], np.ndarray]  # tokens (N,) -> bytes charged to each, (N,)


class Total(NamedTuple):
    """What a script says of a set."""

    nats: float  # of all targets together
    slack: float  # nats that the digits printed and the rounding of sums explain
    bytes: float  # what nats and bits per byte make them
    targets: int  # that it says it scored; all, where it does not say

    def bytes_are(self, expected: int) -> bool:
        """Whether the bytes are those, as far as the digits tell."""
        return math.isclose(self.bytes, expected, rel_tol=1e-6 + 3 * self.slack / max(self.nats, 1e-9))


class Answer(NamedTuple):
    """A set that a script was asked about, and what it said."""

    targets: int
    bytes: int
    total: Total


@dataclass(eq=False)
class Subject:
    """A script with its artifact, and the validation set that its score is claimed for."""

    files: Sequence[Path]  # that are counted; the script first
    tokens: np.ndarray  # validation stream (N,), each document begins with BOS
    sizes: np.ndarray  # original bytes of each token (N,), 0 for BOS
    vocab: int
    charge: Charge | None = None  # bytes of plain text; None: the script reads them from a sidecar (CaseOps)
    tokenizer: Path | None = None
    command: Sequence[str] = ()  # default: Python and the script
    environment: Mapping[str, str] = field(default_factory=dict)
    claim: Mapping[str, float] = field(default_factory=dict)  # val_loss and val_bpb that it is said to have
    fresh: Sequence[Path] = ()  # documents (JSONL) that no training can have seen
    noise: float = 1e-6  # of a sum, relative: rounding of float32; 1e-3 where it computes in bfloat16
    drift: float = 1e-5  # of the claimed score, relative: the machine that it was computed on
    timeout: float = 600.0  # seconds of one run
    whole: int = 64  # vocabularies up to so many tokens are asked whole: a run for each token and place
    many: int = 8  # candidates of a larger one, a run each
    seed: int | None = None  # of all that is drawn; None: one that nobody can know
    answers: list[Answer] = field(default_factory=list, init=False)
    outside: dict[str, None] = field(default_factory=dict, init=False)  # what it reached for, in order

    def __post_init__(self) -> None:
        self.dice = np.random.default_rng(secrets.randbits(128) if self.seed is None else self.seed)
        self._known: dict[str, Total] = {}

    @functools.cached_property
    def alphabet(self) -> np.ndarray:
        """The tokens of the validation set, without BOS: a text of others may not be one for the script."""
        found = np.unique(self.tokens)
        return found[found != BOS]

    @functools.cached_property
    def documents(self) -> list[np.ndarray]:
        """Each validation document, BOS included."""
        return np.split(self.tokens, np.flatnonzero(self.tokens == BOS)[1:])

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Bytes of each token where the validation set first has it, (vocab,)."""
        table = np.ones(self.vocab, np.int64)
        found, first = np.unique(self.tokens, return_index=True)
        table[found] = self.sizes[first]
        table[BOS] = 0
        return table

    def charged(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of each token of a made-up text."""
        return self.charge(tokens) if self.charge else self._table[tokens]

    def ask(self, *documents: np.ndarray, sizes: np.ndarray | None = None) -> Total:
        """The script's total over documents (with BOS each). The same question is asked once.

        Raises NotChecked where the script ends without a score, or the box cannot be made.
        """
        tokens = np.concatenate(documents).astype(np.int64)
        sizes = self.charged(tokens) if sizes is None else sizes
        key = sha256_of(tokens.tobytes() + np.asarray(sizes, np.int64).tobytes())
        if key not in self._known:
            self._known[key] = self._run(tokens, sizes)
            self.answers.append(Answer(len(tokens) - 1, int(sizes[1:].sum()), self._known[key]))
        return self._known[key]

    def _run(self, tokens: np.ndarray, sizes: np.ndarray) -> Total:
        with tempfile.TemporaryDirectory(prefix="") as place:
            here, root = (Path(place).resolve() / secrets.token_hex(6) for _ in range(2))
            here.mkdir()
            for path in self.files:
                (here / path.name).write_bytes(path.read_bytes())
            environment = self._lay_out(root, tokens, sizes) | dict(self.environment)
            command = self.command or (sys.executable, self.files[0].name)
            ran = box.run(command, here, readable=[root], environment=environment, timeout=self.timeout)
            mine = (f"{here}/", f"{root}/", "socket AF_UNIX")  # which leads nowhere in the box
            reached = [name for name in (*ran.refused, *ran.opened) if not name.startswith(mine)]
            self.outside |= dict.fromkeys(reached)
            return self._total(_score(here, ran), len(tokens) - 1)

    def _lay_out(self, root: Path, tokens: np.ndarray, sizes: np.ndarray) -> dict[str, str]:
        """Write a data set as the lineage's scripts look for it; returns the variables that name it."""
        name = f"fineweb10B_sp{self.vocab}{'' if self.charge else CASEOPS_SUFFIX}"
        data, model = root / "datasets" / name, root / "tokenizers" / tokenizer_name(name)
        data.mkdir(parents=True)
        write_values(data / "fineweb_val_000000.bin", tokens)
        if self.charge is None:
            write_values(data / "fineweb_val_bytes_000000.bin", sizes)
        if self.tokenizer:
            model.parent.mkdir()
            model.write_bytes(self.tokenizer.read_bytes())
        places = {"DATA_DIR": root, "DATA_PATH": data, "DATASETS_DIR": data, "TOKENIZER_PATH": model}
        named = {variable: str(path) for variable, path in places.items()}
        machine = {name: os.environ[name] for name in OF_THE_MACHINE if name in os.environ}
        return machine | named | {"RUN_ID": secrets.token_hex(6), "TTT_EVAL_ONLY": "1"}

    def _total(self, stage: Mapping[str, float], targets: int) -> Total:
        loss, bpb = stage["val_loss"], stage["val_bpb"]
        if not (0 < loss < math.inf and 0 < bpb < math.inf):
            raise NotChecked(f"the script says val_loss {loss}, val_bpb {bpb} of a made-up set")
        nats = loss * targets
        slack = targets * _half_unit(loss) + self.noise * nats
        return Total(nats, slack, nats / math.log(2) / bpb, int(stage.get("targets", targets)))


def subject_of(audit: Audit) -> Subject:
    """The counted script of a run, with what the run says of itself as the claim."""
    cfg, charge = audit.cfg, None
    if not cfg.caseops_enabled:
        tables = audit.script.ByteTables.from_sentencepiece(audit.script.load_tokenizer(cfg), cfg.vocab_size)

        def charge(tokens: np.ndarray) -> np.ndarray:
            return np.append([0], tables.target_bytes(torch.from_numpy(tokens)).numpy())

    switches = {"TTT_ENABLED": cfg.ttt_enabled, "SLIDING_WINDOW_ENABLED": cfg.sliding_window_enabled}
    names = {"QUANTIZED_MODEL_PATH": audit.artifact.name, "ARTIFACT_DIR": "out", "SEED": str(cfg.seed)}
    return Subject(
        [audit.folder / "train_gpt.packed.py", audit.artifact],
        audit.tokens,
        audit.sidecar,
        cfg.vocab_size,
        charge,
        audit.script.tokenizer_file(cfg),
        environment=names | {name: str(int(on)) for name, on in switches.items()},
        claim={name: audit.result[name] for name in ("val_loss", "val_bpb")},
        noise=1e-6 if audit.ranks.device.type == "cpu" else 1e-3,
        drift=audit.tolerance,
    )


def _half_unit(value: float) -> float:
    """Half of the last decimal with which a log prints a value; 0 where it has all digits."""
    decimals = next((count for count in PRINTED_DECIMALS if round(value, count) == value), None)
    return 0.5 * 10.0**-decimals if decimals else 0.0


def _score(here: Path, ran: box.Ran) -> Mapping[str, float]:
    """The final stage of a run: out of the result.json that it wrote, else of what it printed."""
    results = sorted(here.rglob("result.json"))
    try:
        return _told(read_json(results[0])) if results else _printed(here, ran.output)
    except (runs.ReadError, AuditError, KeyError, TypeError) as error:
        ended = f"it ran for over {ran.seconds:.0f} s" if ran.timed_out else f"exit code {ran.code}"
        last = (ran.errors.strip().splitlines() or [str(error).rpartition(": ")[2]])[-1][:200]
        raise NotChecked(f"the script says no score of a made-up set ({ended}: {last})") from None


def _told(result: Mapping) -> dict[str, float]:
    """The final stage of a result.json, also of the short one that a counted script writes."""
    stage = result["stages"][result["final_stage"]]
    return {name: float(stage[name]) for name in ("val_loss", "val_bpb", "targets") if name in stage}


def _printed(here: Path, output: str) -> Mapping[str, float]:
    log = here / f"{secrets.token_hex(6)}.log"
    log.write_text(f"TTT_EVAL_ONLY=1\n{output}", encoding="utf-8")  # other scores need not be there
    record = runs.read_log(log)
    return record.stages[record.final_stage]
