"""The ledger of an audited run: the evidence that `tools/audit.py` judges."""

import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.chain import Link, anchor, line_hash
from harness.hashes import NO_HASHES, Hashes
from systems.layout import file_sha256
from systems.plain_text import tokenizer_file
from train_gpt import Ranks, Run, Watch, shard_paths, write_whole, writing

NETWORK = ("socket.connect", "socket.getaddrinfo", "urllib.Request")
NOTICED = {"open", "subprocess.Popen", *NETWORK}


class Ledger(Watch):
    """What a run read and scored and learnt, in order: the evidence that `tools/audit.py` judges.

    `ledger.jsonl`: first a line about the run (kind "run"), then the records of all ranks, by base version,
    rank and order, each with the hash of the one before it (harness/chain.py), and at last the line "close".
    It grows while the run goes on, that of another rank than 0 as `ledger.RANK.jsonl` until the end.

    Of the run tell "joined" (a rank begins or goes on: its machine), "line" (an event, as in metrics.jsonl),
    "weights" (trained) and "artifact" (made and counted).

    A record says which adapters ("lora": [number on this rank, updates since]) and which base weights
    ("base": global phases or trained chunks so far) it used ("score", "slide") or left behind ("adapt",
    "global", "sgd", "reset"); "spans" are [document, first target in the stream, targets], those of windows
    on the stream [first target, targets]; "b_zero": new adapters still added nothing.

    `documents.json`: start and tokens of each validation document, its loss (nats, summed) in each stage.
    """

    def __init__(self, ranks: Ranks, hashes: Hashes = NO_HASHES):
        self._ranks, self._hashes = ranks, hashes
        self._run: Run | None = None
        self.records: list[dict] = []
        self.accesses: dict[tuple[str, str, str], float] = {}  # stage, kind and name -> when first
        self.order, self.base, self.lora, self._adapters = 0, 0, [-1, 0], None
        self.losses: dict[str, np.ndarray] = {}  # stage -> loss of each document
        self._scored: list[tuple[list[int], Tensor]] = []  # the batch's chunks: places and losses
        self.head: dict[str, object] = {}  # the first line, which rank 0 writes
        self._ends = [""]  # hash of this rank's last line, then those of ranks that are gone
        self._file, self._early = None, []  # events of before the file was there
        self.start = time.perf_counter()
        self._hook()[:] = [self]

    @property
    def _stage(self) -> str:
        return self._run.clock.current if self._run else "between stages"

    @staticmethod
    @functools.cache
    def _hook() -> "list[Ledger]":
        """The ledger that is being written, or none: what this process's only audit hook tells of.

        Python cannot take a hook out again, and calls all of them thousands of times a second.
        """
        written: list[Ledger] = []

        def hook(event: str, arguments: tuple) -> None:
            for ledger in written if event in NOTICED else ():
                ledger.notice(event, arguments)

        sys.addaudithook(hook)
        return written

    def notice(self, event: str, arguments: tuple) -> None:
        """Files opened, connections made and processes started, with the stage."""
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            written = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            kind, name = "write" if written else "read", os.path.abspath(os.fsdecode(arguments[0]))
        elif event in NETWORK:
            kind, name = "network", f"{event} {arguments[1 if event == 'socket.connect' else 0]}"
        elif event == "subprocess.Popen":
            kind, name = "process", os.fsdecode(arguments[0])
        else:
            return
        elapsed = time.perf_counter() - self.start
        self.accesses.setdefault((self._stage, kind, name), elapsed)

    def see(self, kind: str, **data: object) -> None:
        """Take an event of the run or of an evaluator."""
        if kind == "inputs":
            self._run = data["run"]
        elif kind == "opened":
            self._open()
        elif kind == "line":
            self._tell({"stage": data["stage"], **data["values"]})
        elif kind == "finished":
            self._finish(data["stage"])
        elif kind == "row":
            self.charge(self._stage, np.arange(data["start"], data["end"]), data["losses"])
        elif kind == "result":
            self.write()
        elif kind == "loaded":
            self._stand_at(self.records[-1]["seconds"])
        else:
            self._record(kind, data)

    # -- the file

    def _open(self) -> None:
        """Begin the file: the head, and what has been told before there was one.

        It is not opened again: an evaluation opens nothing that training wrote (check S4).
        """
        run, main = self._run, self._ranks.is_main
        found = run.ranks.gather((str(run.log.folder), self._head() if main else {}))
        folder, self.head = Path(found[0][0]), found[0][1]
        self._path = folder / ("ledger.jsonl" if main else f"ledger.{self._ranks.rank}.jsonl")
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115 - `close` does
        self._ends = [line_hash(json.dumps(self.head))]
        self._begin()
        for event in self._early:
            self._tell(event)

    def _begin(self, clock: float | None = None) -> None:
        """Write head and records that there are; with another one this process joins in, at its old clock."""
        with writing(self._path):
            self._file.seek(0)
            self._file.truncate()
        for line in (self.head, *self.records):
            self._append(json.dumps(line))
        environment = self._environment()
        del environment["house_sha256"]  # the head has it
        if clock is not None:
            self._stand_at(clock)
        self._add("joined", environment=environment)

    def _stand_at(self, seconds: float) -> None:
        """Let the clock go on from here: what a run does to be resumed is in no stage's seconds either."""
        self.start = time.perf_counter() - seconds

    def _append(self, line: str) -> None:
        with writing(self._path):
            print(line, file=self._file, flush=True)

    def _environment(self) -> dict[str, object]:
        more = {"numpy": np.__version__, "cuda": torch.version.cuda}
        return {**self._run.result["environment"], **more}

    def _tell(self, event: Mapping[str, object]) -> None:
        """Take an event of the log, as metrics.jsonl has it: of rank 0."""
        if self._ranks.is_main:
            self._add("line", event=event) if self._file else self._early.append(event)

    def _finish(self, stage: str) -> None:
        """Bind what a stage has made: trained weights; the artifact, with a line to be posted."""
        run = self._run
        if not self._ranks.is_main:
            return
        if stage == "train":
            path = run.output("model_path")
            self._add("weights", model_sha256=self._model_digest(), file_sha256=file_sha256(path))
        elif stage == "count_bytes":
            sums = [hashlib.sha256(data).hexdigest() for data in (run.artifact, run.packed_code[0])]
            self._add("artifact", artifact_sha256=sums[0], code_sha256=sums[1])
            run.log.text(anchor(self.head, Link(0, self.records[-1], self._ends[0])), said=True)

    # -- what is scored and learnt

    def _record(self, kind: str, data: Mapping[str, object]) -> None:
        if kind in ("scored", "trained"):
            part, learns = data["part"], kind == "trained"
            self.lora[1] += learns
            rows = zip(part.documents, part.spans, part.trains.tolist(), strict=True)
            spans = [[number, *span] for number, span, trains in rows if trains or not learns]
            chunk = {"batch": data["batch_number"], "chunk": data["chunk"], "spans": spans}
            if not learns:
                losses = data["losses"].detach()
                sums = (losses * part.valid.to(losses.device)).sum(1)
                self._scored.append(([first for first, _ in part.spans], sums))
            if not self.lora[1]:
                learnt = [low_rank.B.any() for low_rank in self._adapters.maps()]
                chunk["b_zero"] = not bool(torch.stack(learnt).any())  # the device is waited for once
            self._add("adapt" if learns else "score", **chunk)
        elif kind in ("lora_constructed", "lora_reset"):
            self.lora, self._adapters = [self.lora[0] + 1, 0], data["lora"]
            self._add("reset", a="carried" if kind == "lora_reset" else "drawn")
        elif kind == "batch_done":
            for places, losses in self._scored:
                self.charge("ttt", places, losses)
            self._scored.clear()
            self._add("batch", batch=data["batch_number"], chunks=data["chunks"], diverged=data["diverged"])
        elif kind == "global_sgd":
            self.base += 1
            tokens, steps = data["tokens"], len(data["grad_norms"])
            self._add("global", tokens=len(tokens), tokens_sha256=self._token_digest(tokens), steps=steps)
        elif kind == "slid":
            windows, loss_sum = data["windows"], float(data["losses"].double().sum())
            spans = [[window.start + window.offset, window.targets] for window in windows]
            places = [place for first, count in spans for place in range(first, first + count)]
            self.charge(self._stage, places, data["losses"])
            self._add("slide", spans=spans, loss_sum=loss_sum)
        elif kind == "trained_span":
            self.base += 1
            tokens, facts = data["tokens"], {"first": data["first"], "steps": data["steps"]}
            self._add("sgd", tokens=len(tokens), tokens_sha256=self._token_digest(tokens), **facts)
        elif kind in ("start", "end"):
            self._add(kind, **data, model_sha256=self._model_digest())

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Where each validation document starts in the stream."""
        return np.array([start for start, _ in self._run.val.documents])

    def charge(self, stage: str, places: Sequence[int], losses: Tensor) -> None:
        """Add losses to the documents that hold these places of the stream; the others are not looked at."""
        owners = np.searchsorted(self._starts, places, "right") - 1
        owners, rows = np.unique(owners, return_inverse=True)
        if stage not in self.losses:
            self.losses[stage] = np.zeros(len(self._starts))
        self.losses[stage][owners] += np.bincount(rows, losses.double().cpu().flatten())

    def _add(self, kind: str, **values: object) -> None:
        rank, seconds = self._ranks.rank, round(time.perf_counter() - self.start, 6)
        place = {"rank": rank, "order": self.order, "stage": self._stage}
        head = place | {"kind": kind, "seconds": seconds} | {"base": self.base, "lora": list(self.lora)}
        self.records.append(head | values | {"prev": self._ends[0]})
        line = json.dumps(self.records[-1])
        self._append(line)
        self._ends[0] = line_hash(line)
        self.order += 1

    @staticmethod
    def _token_digest(tokens: Tensor) -> str:
        return hashlib.sha256(tokens.cpu().numpy().astype("<u2")).hexdigest()

    def _model_digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self._run.model.state_dict().items():
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _head(self) -> dict[str, object]:
        """What is known when the run begins."""
        run, folder = self._run, self._run.cfg.data_folder
        validation, tokenizer = (
            shard_paths(folder, "val") + shard_paths(folder, "val_bytes"),
            tokenizer_file(run.cfg),
        )
        return {
            "kind": "run",
            "run": run.log.run_id,
            "settings": run.cfg.as_env(),
            "environment": self._environment(),
            "data_folder": str(folder.resolve()),
            "val_sha256": {path.name: self._hashes.sha256(path) for path in validation},
            "tokenizer_sha256": file_sha256(tokenizer) if tokenizer.is_file() else "",
        }

    def _close(self, accesses: Iterable[tuple[str, str, str, float]], **values: object) -> None:
        """Add the last line: what is known when the run ends."""
        run = self._run
        folders = (os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(torch.__file__)))
        libraries = (*(f"{folder}/" for folder in folders), "/proc/", "/sys/", "/dev/")
        self._add(
            "close",
            **values,
            stage_seconds=run.clock.seconds,
            result={name: value for name, value in run.result.items() if name != "environment"},
            environment=self._environment(),
            accesses=sorted(entry for entry in accesses if not entry[2].startswith(libraries)),
        )

    @staticmethod
    def _position(record: Mapping[str, object]) -> tuple[int, bool, int, int]:
        """Place in the file: training of the base weights comes after all that used the version it ends."""
        last = record["kind"] in ("global", "sgd")
        return record["base"] - last, last, record["rank"], record["order"]

    def write(self) -> None:
        """Merge the ranks' records and write the file; rank 0 does. Its last hash goes into the result."""
        self._hook().clear()
        run = self._run
        accesses = [[*key, when] for key, when in self.accesses.items()]
        parts = run.ranks.gather((accesses, self.records, self.losses, self._ends))
        if run.ranks.is_main:
            losses = {stage: sum(part[2].get(stage, 0.0) for part in parts) for stage in self.losses}
            documents = {stage: sums.round(4).tolist() for stage, sums in losses.items()}
            documents = json.dumps({"documents": run.val.documents, "losses": documents}).encode()
            write_whole(run.log.folder / "documents.json", documents)
            records = sorted((record for part in parts for record in part[1]), key=self._position)
            accesses = (access for part in parts for access in part[0])
            ends = [end for part in parts for end in part[3]]
            self._close(accesses, ends=ends, documents_sha256=hashlib.sha256(documents).hexdigest())
            lines = [self.head, *records, self.records[-1]]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_whole(self._path, text.encode())
            run.result["ledger_sha256"] = self._ends[0]
        else:
            self._path.unlink()
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None

    # -- checkpoints

    def state(self) -> dict[str, object]:
        """All that a resumed run's ledger goes on from, as plain values."""
        state = {
            "head": self.head,
            "ends": list(self._ends),
            "records": list(self.records),
            "order": self.order,
            "base": self.base,
            "lora": list(self.lora),
        }
        state["accesses"] = [[*key, when] for key, when in list(self.accesses.items())]
        losses = {stage: sums.tolist() for stage, sums in self.losses.items()}
        return state | {"losses": losses, "clock": time.perf_counter() - self.start}

    def load_states(self, states: Sequence[Mapping], head: dict[str, object]) -> None:
        """Go on from this rank's state; behind it may stand those of ranks that are gone, which join in.

        A rank that is new has none. `head` is the first line of the run's ledger.
        """
        self.head, self.records, self.losses = head, [], {}
        self.order, self._ends, clock = 0, [line_hash(json.dumps(head))], None
        if states:
            own = states[0]
            self.order, self.base, self.lora, clock = own["order"], own["base"], own["lora"], own["clock"]
            self._ends = [end for state in states for end in state["ends"]]
        for state in states:
            self.records += state["records"]
            for stage, sums in state["losses"].items():
                self.losses[stage] = self.losses.get(stage, 0.0) + np.array(sums)
            for *key, when in state["accesses"]:
                self.accesses.setdefault(tuple(key), when)
        self._begin(clock)
