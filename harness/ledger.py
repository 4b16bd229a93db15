"""The ledger of an audited run: the evidence that `tools/audit.py` judges."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from train_gpt import Ranks, Run, Watch, shard_paths, write_whole


class Ledger(Watch):
    """What a run read and scored and learnt, in order: the evidence that `tools/audit.py` judges.

    `ledger.jsonl`: first a line about the run (kind "run"), then the records of all ranks, by base version,
    rank and order. A record says which adapters ("lora": [number on this rank, updates since]) and which base
    weights ("base": global phases or trained chunks so far) it used ("score", "slide") or left behind
    ("adapt", "global", "sgd", "reset"); "spans" are [document, first target in the stream, targets], those of
    windows on the stream [first target, targets]; "b_zero": new adapters still added nothing.

    `documents.json`: start and tokens of each validation document, its loss (nats, summed) in each stage.
    """

    def __init__(self, ranks: Ranks):
        self._ranks, self._open = ranks, True
        self._run: Run | None = None
        self.records: list[dict] = []
        self.accesses: dict[tuple[str, str, str], float] = {}  # stage, kind and name -> when first
        self.order, self.base, self.lora, self._adapters = 0, 0, [-1, 0], None
        self.losses: dict[str, np.ndarray] = {}  # stage -> loss of each document
        self._scored: list[tuple[list[int], Tensor]] = []  # the batch's chunks: places and losses
        self.start = time.perf_counter()
        sys.addaudithook(self._notice)  # stays as long as the process, so it is switched off by `write`

    @property
    def _stage(self) -> str:
        return self._run.clock.current if self._run else "between stages"

    def _notice(self, event: str, arguments: tuple) -> None:
        """Python's audit hook: files opened, connections made and processes started, with the stage."""
        if not self._open:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            written = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            kind, name = "write" if written else "read", os.path.abspath(os.fsdecode(arguments[0]))
        elif event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
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
        elif kind == "row":
            self.charge(self._stage, range(data["start"], data["end"]), data["losses"])
        elif kind == "result":
            self.write()
        else:
            self._record(kind, data)

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
                chunk["b_zero"] = not any(bool(low_rank.B.any()) for low_rank in self._adapters.maps())
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

    def charge(self, stage: str, places: Sequence[int], losses: Tensor) -> None:
        """Add losses to the documents that hold these places of the stream."""
        starts = [start for start, _ in self._run.val.documents]
        owners = np.searchsorted(starts, places, "right") - 1
        sums = np.bincount(owners, losses.double().cpu().flatten(), len(starts))
        self.losses[stage] = self.losses.get(stage, 0.0) + sums

    def _add(self, kind: str, **values: object) -> None:
        rank, seconds = self._ranks.rank, round(time.perf_counter() - self.start, 6)
        place = {"rank": rank, "order": self.order, "stage": self._stage}
        head = place | {"kind": kind, "seconds": seconds}
        self.records.append(head | {"base": self.base, "lora": list(self.lora)} | values)
        self.order += 1

    @staticmethod
    def _token_digest(tokens: Tensor) -> str:
        return hashlib.sha256(tokens.cpu().numpy().astype("<u2")).hexdigest()

    def _model_digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self._run.model.state_dict().items():
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _head(self, accesses: Iterable[tuple[str, str, str, float]]) -> dict[str, object]:
        run, folder = self._run, self._run.cfg.data_folder
        validation = shard_paths(folder, "val") + shard_paths(folder, "val_bytes")
        folders = (os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(torch.__file__)))
        libraries = (*(f"{folder}/" for folder in folders), "/proc/", "/sys/", "/dev/")
        return {
            "kind": "run",
            "run": run.log.run_id,
            "settings": run.cfg.as_env(),
            "environment": run.result["environment"] | {"numpy": np.__version__},
            "data_folder": str(folder.resolve()),
            "val_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in validation},
            "seconds": run.clock.seconds,
            "accesses": sorted(entry for entry in accesses if not entry[2].startswith(libraries)),
        }

    @staticmethod
    def _position(record: Mapping[str, object]) -> tuple[int, bool, int, int]:
        """Place in the file: training of the base weights comes after all that used the version it ends."""
        last = record["kind"] in ("global", "sgd")
        return record["base"] - last, last, record["rank"], record["order"]

    def write(self) -> None:
        """Merge the ranks' records and write the file; rank 0 does."""
        self._open = False
        run = self._run
        accesses = [[*key, when] for key, when in self.accesses.items()]
        parts = run.ranks.gather((accesses, self.records, self.losses))
        if run.ranks.is_main:
            losses = {stage: sum(part[2].get(stage, 0.0) for part in parts) for stage in self.losses}
            documents = {stage: sums.round(4).tolist() for stage, sums in losses.items()}
            documents = {"documents": run.val.documents, "losses": documents}
            write_whole(run.log.folder / "documents.json", json.dumps(documents).encode())
            records = sorted((record for part in parts for record in part[1]), key=self._position)
            lines = [self._head(access for part in parts for access in part[0]), *records]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_whole(run.log.folder / "ledger.jsonl", text.encode())

    def state(self) -> dict[str, object]:
        """All that a resumed run's ledger goes on from, as plain values."""
        state = {
            "records": list(self.records),
            "order": self.order,
            "base": self.base,
            "lora": list(self.lora),
        }
        state["accesses"] = [[*key, when] for key, when in list(self.accesses.items())]
        losses = {stage: sums.tolist() for stage, sums in self.losses.items()}
        return state | {"losses": losses, "clock": time.perf_counter() - self.start}

    def load_states(self, states: Sequence[Mapping]) -> None:
        """Go on from this rank's state; behind it may stand those of ranks that are gone, which join in."""
        own = states[0]
        self.order, self.base, self.lora = own["order"], own["base"], own["lora"]
        self.start = time.perf_counter() - own["clock"]
        self.records, self.losses = [], {}
        for state in states:
            self.records += state["records"]
            for stage, sums in state["losses"].items():
                self.losses[stage] = self.losses.get(stage, 0.0) + np.array(sums)
            for *key, when in state["accesses"]:
                self.accesses.setdefault(tuple(key), when)
