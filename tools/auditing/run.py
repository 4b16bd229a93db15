"""The run under audit: its files, script, data, ledger and artifact, and how a check says what it found."""

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import os
import random
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lossless_caps  # noqa: E402
from auditing.house import AuditedHouse  # noqa: E402
from auditing.records import AuditError, check_settings, read_json, read_lines, read_result  # noqa: E402
from auditing.verdict import (  # noqa: E402, F401 - the checks take them from here
    CONSISTENT,
    FAIL,
    NOT_CHECKED,
    STATUSES,
    VERIFIED,
    Verdict,
    evaluator_of,
)
from command import Mistake  # noqa: E402
from dataprep.fusion import pairs_of, unfused  # noqa: E402
from scripts import CORE, HouseError, hash_told, house_beside, logged_house  # noqa: E402

BOS, HEADER_BYTES, SHARD_MAGIC = 1, 1024, 20240520
UNTOLD = "its log does not hold it"  # the script that ran
SAMPLE_DOCUMENTS = 10_000  # of which bytes are counted and round trips made
FEWEST_DOCUMENTS = 12  # of any kind, for a spread to be known


class NotChecked(Exception):
    """A check lacks what it needs; the reason."""


class Failed(Exception):
    """A rule is broken; the figure that shows it."""


# What a check that passes proves: by code of the repository; by the run's own script; by the run's word.
RECOMPUTED, REPLAYED, RECORDS = "recomputed", "replayed", "records"


class Check(NamedTuple):
    """A rule, what a pass of it proves, and the function of the audit that looks."""

    rule: str
    proof: str
    function: Callable[["Audit"], str | Verdict]


CHECKS: dict[str, Check] = {}


def check(name: str, rule: str, proof: str) -> Callable:
    """Register a check: a function of the audit that returns its evidence, or raises Failed or NotChecked.

    It may return a Verdict where it proves less than `proof`.
    """

    def register(function: Callable[["Audit"], str | Verdict]) -> Callable[["Audit"], str | Verdict]:
        CHECKS[name] = Check(rule, proof, function)
        return function

    return register


def proven(proof: str, known: bool) -> str:
    """Status of a check that passes; `known`: the house that ran is the repository's."""
    return VERIFIED if proof == RECOMPUTED or proof == REPLAYED and known else CONSISTENT


def require(holds: bool, evidence: str) -> None:
    """Raise Failed unless a condition holds."""
    if not holds:
        raise Failed(evidence)


def verdict_of(look: Callable[[], str | Verdict], passed: str) -> Verdict:
    """What a look finds: its own verdict, or `passed` with its evidence.

    One that cannot be carried out because of an error has failed: nothing is hidden. Mistakes are raised.
    """
    try:
        found = look()
        return found if isinstance(found, Verdict) else Verdict(passed, found)
    except NotChecked as reason:
        return Verdict(NOT_CHECKED, str(reason))
    except (Failed, HouseError) as reason:
        return Verdict(FAIL, str(reason))
    except Mistake:
        raise
    except Exception as error:  # whatever what is judged makes go wrong
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Verdict(FAIL, f"could not be carried out ({text[:300]})")


def carry_out(audit: "Audit", name: str) -> Verdict:
    """One check in this process."""
    _, proof, look = CHECKS[name]
    return verdict_of(lambda: look(audit), proven(proof, audit.known))


class Opened:
    """Python's audit hook, used by us: files opened while `watch` is entered."""

    def __init__(self) -> None:
        self.files: list[str] | None = None
        sys.addaudithook(self._notice)

    def _notice(self, event: str, arguments: tuple) -> None:
        if self.files is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
            self.files.append(os.path.abspath(os.fsdecode(arguments[0])))

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[str]]:
        """Collect the names of the files opened inside the block."""
        self.files = files = []
        try:
            yield files
        finally:
            self.files = None


@functools.cache
def opened() -> Opened:
    """The one hook of this process (hooks cannot be removed)."""
    return Opened()


def read_values(path: Path) -> np.ndarray:
    """Values of a shard, uint16; our own reader, not the script's. Raises Failed where the file is none."""
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
    require(len(header) == 256 and header[0] == SHARD_MAGIC, f"{path.name}: not a shard")
    count, size = int(header[2]), path.stat().st_size
    require(size == HEADER_BYTES + 2 * count, f"{path.name}: {size} bytes for {count} tokens")
    return np.memmap(path, "<u2", "r", HEADER_BYTES) if count else np.empty(0, np.uint16)


def write_values(path: Path, values: np.ndarray) -> None:
    """Write a shard."""
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, 1, len(values)
    path.write_bytes(header.tobytes() + np.asarray(values, "<u2").tobytes())


def digest(*parts: object) -> str:
    """Hash of nested dictionaries and lists of tensors and plain values, bit for bit."""
    found = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(part, Mapping):
            for key, value in part.items():
                found.update(repr(key).encode())
                add(value)
        elif isinstance(part, (list, tuple)):
            for value in part:
                add(value)
        else:
            found.update(repr(part).encode())

    for part in parts:
        add(part)
    return found.hexdigest()


def short(checksum: str) -> str:
    """Enough of a checksum to recognise it."""
    return checksum[:12]


def printable(text: str) -> str:
    """Text that a run or program chose, for a line of ours: no line ends, terminal codes, odd characters."""
    return text if text.isprintable() else ascii(" ".join(text.split()))[1:-1]


def state_of_files(folder: Path) -> dict[str, tuple[int, ...]]:
    """Node, size and times of every file of a run: other ones where it was written to, by whatever name.

    Raises AuditError unless all are its own: a link leads elsewhere, and reading a pipe may never end.
    """
    state = {}
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in [*folders, *files]):
            found = path.lstat()
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                what = "a link" if stat.S_ISLNK(found.st_mode) else "a pipe or a device"
                raise AuditError(f"{printable(str(path))}: {what}, must be a file of its own")
            if stat.S_ISREG(found.st_mode):
                name = printable(str(path.relative_to(folder)))
                state[name] = found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return state


@functools.cache
def repository() -> dict[str, bytes]:
    """The house that lies here: sources by path, the core first."""
    script = ROOT / CORE
    return {path: file.read_bytes() for path, file in {CORE: script, **house_beside(script)}.items()}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command asks for, see tools/audit.py."""

    data: Path | None = None
    docs: str = ""
    full: bool = False
    seeds: Sequence[Path] = ()
    sample: int = 0
    sample_seed: int | None = None
    retrain: bool = False
    blackbox: bool = False
    fresh: Sequence[Path] = ()
    anchored: str = ""


class Audit:
    """A run's files, data and ledger; what is expensive is made once, when a check first asks.

    `script` is the house that judges: the repository's, whatever the run brought. Inside the box (`boxed`) it
    is the one that ran, out of the log, and what it finds of itself is not believed further than its FAILs.
    """

    def __init__(self, folder: Path, *, boxed: bool = False, **options: object):
        self.folder, self.boxed, self.options = folder, boxed, Options(**options)
        if not folder.is_dir():
            raise AuditError(f"{folder}: no such folder")
        self._began = state_of_files(folder)
        self.result = read_result(folder / "result.json")
        self._need_whole_records()
        self._temporary = tempfile.TemporaryDirectory(prefix="audit-")
        self.work = Path(self._temporary.name)
        try:
            self.script = AuditedHouse(self.sources if boxed else repository(), self.work)
            self._prepare()
        except HouseError as error:
            raise AuditError(f"{folder}: {error}") from None
        except Mistake:
            raise
        except Exception as error:  # whatever settings of another kind make go wrong
            text = f"its settings make no run ({type(error).__name__}: {error})"
            raise AuditError(f"{folder / 'result.json'}: {text}") from None

    def _need_whole_records(self) -> None:
        """Read the records that there are. One that is damaged is a mistake, before anything is judged."""
        readers = {
            "ledger.jsonl": lambda _: self.ledger,
            "metrics.jsonl": lambda _: self.metrics,
            "documents.json": read_json,
            "submission.json": read_json,
        }
        for path in map(self.folder.joinpath, readers):
            if path.is_file():
                readers[path.name](path)

    def _prepare(self) -> None:
        """Settings, ranks and backends as the run had them, as far as this machine has the like."""
        defaults = {field.name.upper(): field.default for field in dataclasses.fields(self.script.Config)}
        check_settings(self.folder / "result.json", self.result["settings"], defaults)
        here = {"data_path": str(self.data_folder), "audit": False, "compile_backend": "off"}
        here |= {"checkpoint_seconds": 0.0, "wandb_project": "", "tensorboard_dir": ""}  # nobody watches
        if not torch.cuda.is_available():
            here |= {"device": "auto", "attention_backend": "auto"}
        self.cfg = self.run_settings(**here)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.ranks = self.script.Ranks.from_env(self.cfg, {})
        self.backends = self.script.choose_backends(self.cfg, self.ranks)
        if self.ranks.device.type == "cuda":  # bits are compared
            torch.use_deterministic_algorithms(True, warn_only=True)

    def need_data(self) -> None:
        """Raise AuditError where validation data or tokenizer are not there, or the manifest is none."""
        folder = printable(str(self.data_folder))
        try:
            if (manifest := self.data_folder / "manifest.json").is_file():
                read_json(manifest)
            tokenizer = self.script.tokenizer_file(self.cfg)
            if not self.shards("val"):
                raise AuditError(f"{folder}: no fineweb_val_*.bin, the run's data: --data says where")
            if not tokenizer.is_file():
                where = "--data says where it lies beside the data"
                raise AuditError(f"{printable(str(tokenizer))}: no such tokenizer: {where}")
        except OSError as error:  # as of a name that is too long
            raise AuditError(f"{folder[:200]}: cannot be read ({error.strerror})") from None
        except self.script.DataError as error:
            raise AuditError(str(error)) from None

    def unchanged(self) -> None:
        """Raise AuditError where a file of the run changed, came or went since the audit began."""
        before, after = self._began, state_of_files(self.folder)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed:
            raise AuditError(f"{self.folder}: {changed[0]} changed while it was judged: judge it again")

    def close(self) -> None:
        """Remove the temporary files, and the script from this process."""
        self._temporary.cleanup()
        self.script.forget()

    # -- script and log

    @functools.cached_property
    def log(self) -> str:
        """The run's log."""
        logs = sorted((self.folder / "logs").glob("*.txt"))
        if len(logs) != 1:
            raise HouseError(f"{self.folder / 'logs'} holds {len(logs)} logs, must be the one of the run")
        return logs[0].read_text(encoding="utf-8", errors="replace")

    @functools.cached_property
    def sources(self) -> dict[str, bytes]:
        """The house that ran, out of the log: sources by path, the core first. Raises HouseError."""
        told = self.result["environment"]
        return logged_house(self.log, told["source_sha256"], told["house_sha256"])

    @property
    def script_sha256(self) -> str:
        """The checksum of the script and its house, as `RunRecord` has it."""
        return hash_told(self.result["environment"])

    @functools.cached_property
    def strange_files(self) -> list[str]:
        """Files in which the house that ran is not the repository's, or that the log does not hold."""
        ours = repository()
        try:
            ran = self.sources
            return [path for path in {**ran, **ours} if ours.get(path) != ran.get(path)]
        except HouseError:
            return [UNTOLD]

    @property
    def known(self) -> bool:
        """The house that ran, as it says, is the repository's."""
        return not self.strange_files

    @functools.cached_property
    def ledger(self) -> list[dict]:
        """Head and records of the ledger."""
        path = self.folder / "ledger.jsonl"
        if not path.is_file():
            raise NotChecked("the run wrote no ledger.jsonl (AUDIT=1)")
        return read_lines(path, "kind")

    @property
    def head(self) -> dict:
        """What the ledger says about the run: its first line, and what its last one knows better."""
        last = self.ledger[-1]
        known = ("environment", "accesses") if last["kind"] == "close" else ()
        return self.ledger[0] | {name: last[name] for name in known}

    def records(self, *kinds: str) -> list[dict]:
        """The ledger's records of some kinds, in order: those of the stage that gives the score."""
        final = self.result["final_stage"]
        every = [record for record in self.ledger[1:] if record["kind"] in kinds]
        found = [record for record in every if record.get("stage", final) == final]
        if not found:
            raise NotChecked(f"the ledger holds no record of kind {' or '.join(kinds)}")
        return found

    @functools.cached_property
    def metrics(self) -> list[dict]:
        """The events of the run."""
        path = self.folder / "metrics.jsonl"
        require(path.is_file(), "metrics.jsonl is missing")
        return read_lines(path, "stage")

    @functools.cached_property
    def imports(self) -> set[str]:
        """Top-level names of the modules that the script and its house import."""
        nodes = [node for source in self.sources.values() for node in ast.walk(ast.parse(source))]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        return {name.partition(".")[0] for name in names}

    @property
    def trained(self) -> bool:
        """The run trained its model itself."""
        return "steps" in self.result and not (self.cfg.quantize_only or self.cfg.ttt_eval_only)

    @property
    def evaluator(self) -> str:
        """What gives the score: lora (`ScoreFirstTTT`), sgd or sliding (on the stream), or standard."""
        return evaluator_of(self.result["final_stage"], self.cfg.ttt_sgd)

    @property
    def adapted(self) -> bool:
        """The score is that of `ScoreFirstTTT`."""
        return self.evaluator == "lora"

    @property
    def streams(self) -> bool:
        """The score is that of windows which slide over the stream, with or without SGD between chunks."""
        return self.evaluator in ("sgd", "sliding")

    def accesses(self, kind: str, *stages: str) -> list[tuple[str, str, float]]:
        """(stage, name, first time) of what the run read, wrote, started or connected to."""
        rows = [row for row in self.head["accesses"] if row[1] == kind and (not stages or row[0] in stages)]
        return [(stage, name, seconds) for stage, _, name, seconds in rows]

    # -- data and artifact

    @functools.cached_property
    def data_folder(self) -> Path:
        """Where the run's data lie."""
        if self.options.data:
            return self.options.data
        with contextlib.suppress(NotChecked):
            return Path(self.head["data_folder"])
        return self.run_settings().data_folder

    def run_settings(self, **changes: object):
        """The run's settings, as its script's `Config`; what that does not know is left out."""
        told = {name.lower(): value for name, value in self.result["settings"].items()} | changes
        known = {name: value for name, value in told.items() if name in self._setting_names}
        return self.script.Config(**known)

    @property
    def _setting_names(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self.script.Config)}

    @functools.cached_property
    def manifest(self) -> dict:
        """The manifest beside the data, {} where there is none."""
        path = self.data_folder / "manifest.json"
        return read_json(path) if path.is_file() else {}

    def shards(self, split: str) -> list[Path]:
        """Shards of a split in order."""
        found = self.data_folder.glob(f"fineweb_{split}_*.bin")
        return sorted(path for path in found if split != "val" or "_bytes_" not in path.name)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """The validation stream."""
        return self._stream("val")

    @functools.cached_property
    def sidecar(self) -> np.ndarray:
        """Original bytes of each validation token."""
        if self.cfg.caseops_enabled:
            return self._stream("val_bytes")
        tables = self.script.ByteTables.from_sentencepiece(
            self.script.load_tokenizer(self.cfg), self.cfg.vocab_size
        )
        return np.append([0], tables.target_bytes(torch.from_numpy(self.tokens)).numpy())

    def _stream(self, split: str) -> np.ndarray:
        paths = self.shards(split)
        if not paths:
            raise NotChecked(f"{self.data_folder}: no fineweb_{split}_*.bin there (--data)")
        return np.concatenate([read_values(path) for path in paths]).astype(np.int64)

    @functools.cached_property
    def documents(self) -> list[tuple[int, int]]:
        """(start, tokens) of each validation document, its BOS included, the next one's not."""
        starts = np.flatnonzero(self.tokens == BOS)
        return [(int(a), int(b - a)) for a, b in itertools.pairwise([*starts, len(self.tokens)])]

    @functools.cached_property
    def sample_seed(self) -> int:
        """--sample-seed, or a number of the operating system's, that the run could not know."""
        given = self.options.sample_seed
        return int.from_bytes(os.urandom(4), "big") if given is None else given

    @functools.cached_property
    def drawn_documents(self) -> list[tuple[int, int]]:
        """SAMPLE_DOCUMENTS of the documents: a quarter those with most bytes a token, the others drawn."""
        starts, lengths = (np.array(column) for column in zip(*self.documents, strict=True))
        ratios = np.add.reduceat(self.sidecar[starts[0] :], starts - starts[0]) / lengths
        order = np.argsort(-ratios, kind="stable").tolist()
        most, rest = order[: SAMPLE_DOCUMENTS // 4], order[SAMPLE_DOCUMENTS // 4 :]
        drawn = random.Random(self.sample_seed).sample(rest, min(len(rest), SAMPLE_DOCUMENTS - len(most)))
        return [self.documents[number] for number in sorted([*most, *drawn])]

    @functools.cached_property
    def texts(self) -> list[tuple[str, int]]:
        """(original text, bytes charged) of `drawn_documents`, decoded from their tokens."""
        processor = self.script.load_tokenizer(self.cfg)
        decode = lossless_caps.decode if self.cfg.caseops_enabled else str
        texts = []
        for start, length in self.drawn_documents:
            spelt, _ = unfused(self.tokens[start + 1 : start + length], pairs_of(self.manifest))
            text = processor.decode(spelt.tolist())
            try:
                texts.append((decode(text), int(self.sidecar[start + 1 : start + length].sum())))
            except lossless_caps.LosslessCapsError as error:
                raise Failed(f"the document at token {start:,} cannot be decoded: {error}") from None
        return texts

    @functools.cached_property
    def artifact(self) -> Path:
        """The model half of the artifact."""
        path = self.folder / Path(self.cfg.quantized_model_path).name
        given = Path(self.cfg.quantized_model_path)
        found = next((p for p in (path, given) if p.is_file()), None)
        if found is None:
            raise NotChecked(f"{path.name}: the run made no artifact")
        return found

    @functools.cached_property
    def artifact_model(self):
        """The artifact's model, built by `script`; not to be changed."""
        return self.model_of(self.artifact.read_bytes())

    def model_of(self, artifact: bytes):
        """The model of an artifact."""
        strange = self.result["settings"].keys() - {name.upper() for name in self._setting_names}
        if strange:
            names = ", ".join(sorted(strange)[:3])
            raise NotChecked(f"{names}: no setting of this repository, it cannot build the model")
        settings, records = self.script.read_artifact(artifact, self.cfg)
        model = self.script.GPT(dataclasses.replace(self.cfg, **settings), self.backends)
        model.load_state_dict(self.script.dequantize_state(records, model.cfg.num_layers))
        return self.backends.move_and_compile(model, self.ranks.device)

    def model(self, noise: float = 0.0):
        """A new copy of the artifact's model; noise opens gates and adapters that training left closed."""
        model = copy.deepcopy(self.artifact_model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters() if noise else ():
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator).to(parameter.device))
        return model

    def watch(self, see: Callable[..., None]):
        """A watch of the script's that is told all that happens: `see(kind, **facts)`."""
        watch = self.script.Watch()
        watch.see = see
        return watch

    @property
    def looping(self) -> bool:
        """The artifact's model is evaluated with its loops, unless it was trained without them."""
        cfg = self.artifact_model.cfg
        return cfg.num_loops > 0 and cfg.enable_looping_at < 1

    @property
    def tolerance(self) -> float:
        """Relative difference that rounding explains: float32 on a CPU, bfloat16 products on CUDA."""
        on_gpu = self.ranks.device.type == "cuda" or "NVIDIA" in self.result["environment"]["device"]
        return 5e-3 if on_gpu else 1e-5
