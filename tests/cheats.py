"""Cheats: each an honest tiny run that somebody has made better. Which check of the audit finds it?

A cheat is thorough. What it changes is told alike in all records, and the chain is made anew; an altered
script runs the whole run, so that all that it writes agrees, and its log claims the repository's script,
unless it is honest about that. `tests/tools/test_cheats.py` and `tests/stress/test_cheats.py` judge them.
"""

import contextlib
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from audited import ARTIFACT, CODE, MODEL, Forgery
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from test_smoke import environment, make_data

import lossless_caps
import prepare_caseops_data as prepare
from auditing.house import AuditedHouse
from auditing.records import read_json
from auditing.run import repository
from scripts import CORE, sha256_of

SETTINGS = {"AUDIT": 1, "RUN_ID": "tiny", "ITERATIONS": 3, "VAL_LOSS_EVERY": 3, "VAL_BATCH_TOKENS": 1 << 14}
SETTINGS |= {"TTT_BATCH_SIZE": 4, "TTT_CHUNK_SIZE": 64, "TTT_EVAL_SEQ_LEN": 128, "GRAD_ACCUM_STEPS": 1}
SETTINGS |= {"PHASED_TTT_NUM_PHASES": 1, "PHASED_TTT_PREFIX_DOCS": 4, "GPTQ_CALIBRATION_BATCHES": 1}
PLACES = ("DATA_PATH", "ARTIFACT_DIR", "TOKENIZER_PATH")  # settings that differ from run to run
VAL, SIZES = "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"
TRAIN = "fineweb_train_000000.bin"


class Workshop:
    """A folder with data, an honest run and one of another seed; altered scripts run here.

    `whole`: nothing is left out, as the whole audit wants it. Else a run adapts only where that is looked at,
    and its data are changed behind it.
    """

    def __init__(self, folder: Path, packed: Callable[..., tuple[bytes, bool]], whole: bool = False):
        self.folder, self.packed, self.whole, self._houses = folder, packed, whole, 0
        self._made: dict[tuple, Path] = {}  # runs of altered scripts
        make_data(folder / "data")
        for name, seed in {"run": 42, "other": 7}.items():
            adapts = {"TTT_ENABLED": int(whole or name == "run")}
            self.run(repository(), folder / "data", folder / name, repository(), SEED=seed, **adapts)

    def run(self, sources: dict, data: Path, folder: Path, claimed: dict, **settings: object) -> None:
        """A whole run of a house, in this process; what its log holds is what it claims to be."""
        self._houses += 1
        house = AuditedHouse(sources, self.folder / f"house{self._houses}")
        for module in house.modules:
            if hasattr(module, "packed_script"):
                module.packed_script = self.packed
        house.modules[0].read_sources = lambda: dict(claimed)
        given = SETTINGS | {"DATA_PATH": data, "ARTIFACT_DIR": folder} | settings
        errors = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = house.main([], environment(**given))
        house.forget()
        assert code == 0, errors.getvalue()

    def altered(self, copy: Forgery, *pairs: tuple[str, str], adapts: bool = False, **settings) -> None:
        """The copy is the run of a script with other text in some places, which its log does not tell."""
        sources = repository()
        for old, new in pairs:
            path = next((path for path in (CORE, EAGER) if old.encode() in sources[path]), None)
            assert path, f"the script has no {old!r} any more: mend this cheat"
            sources = sources | {path: sources[path].replace(old.encode(), new.encode())}
        shutil.rmtree(copy.run)
        adapts = {"TTT_ENABLED": int(adapts or self.whole)}
        made = self._made.setdefault(pairs, self.folder / f"altered{len(self._made)}")
        if not made.is_dir():
            self.run(sources, self.folder / "data", made, repository(), **adapts | settings)
        shutil.copytree(made, copy.run)

    def on_other_data(self, copy: Forgery) -> None:
        """The copy is a run on its data, which have been changed; their manifest says so."""
        if self.whole:
            shutil.rmtree(copy.run)
            self.run(repository(), copy.data, copy.run, repository())
        else:
            copy.forge()


class Cheat(NamedTuple):
    """What was done, the group it belongs to, the check that must FAIL, and a word of its evidence."""

    name: str
    group: str
    check: str
    reason: str
    build: Callable[[Workshop, Forgery], None]


CHEATS: list[Cheat] = []


def cheat(name: str, group: str, check: str, reason: str) -> Callable:
    """Put a cheat into the table; the function makes it of a copy of the honest run."""

    def register(build: Callable[[Workshop, Forgery], None]) -> Callable[[Workshop, Forgery], None]:
        CHEATS.append(Cheat(name, group, check, reason, build))
        return build

    return register


# -- the script

SCRIPT = "script"
EAGER = "systems/eager.py"  # what a CPU computes with
LOSSES = "return head_loss(h, self._head_weight, target_ids, self.cfg.logit_softcap, lora)"  # on a CPU
LOSSES_ARE = f"{LOSSES.replace('return', 'found =')}\n            "
SCORES = "lora is not None or not torch.is_grad_enabled()"  # and does not train
ROWS = "rows = [random_row(cfg, self.micro_tokens, cfg.train_seq_len, generator) for _ in micro]"
RESTORE = "        self.restore(before)\n"
SCORED_ROW = "looping=looping).cpu()"
CAUSAL = "(q, k, v, is_causal=True, enable_gqa=True)"
LORA_LOSSES = (
    "return self.model.losses(x, y, looping=self.looping, lora=lora, scored=scored, cache=cache, **tip)"
)
LEARNING = 'if "eager" in self.model.backends.kernels and torch.is_grad_enabled() and not cache:'
CALIBRATION = "x, _ = loader.next(rows)\n"
VALIDATION = '_read_stream(cfg.data_folder, "val")'
AVERAGE = "        self.model.load_state_dict(self.ema.cast_like(self.model.state_dict()))\n"
BITS = "return self.val_loss / math.log(2) * self.tokens / self.bytes"
STORED = 'artifact = pack_artifact(records, cfg, self.looping) if ranks.is_main else b""'
TRAINER = "        trainer = Trainer(self.cfg, self.model, self.loader, self.ranks, self)\n"
MAIN = 'if __name__ == "__main__":'
FLATTERED = (LOSSES, f"{LOSSES_ARE}return found * (0.99 if {SCORES} else 1.0)")


@cheat("losses multiplied", SCRIPT, "E1", r"quantised|prequant|untrained")
def losses_multiplied(shop: Workshop, copy: Forgery) -> None:
    shop.altered(copy, FLATTERED)


@cheat("information from a file that is not counted", SCRIPT, "E1", "document")
def uncounted_file(shop: Workshop, copy: Forgery) -> None:
    hint = copy.run.parent / "hint.pt"
    torch.save(torch.full((320,), 0.01), hint)
    shop.altered(copy, (SCORED_ROW, f"{SCORED_ROW} - torch.load({str(hint)!r})[y].flatten()"))


@cheat("trained on validation data before the clock", SCRIPT, "W1", "untrained: document")
def trained_before_the_clock(shop: Workshop, copy: Forgery) -> None:
    row = f"packed_row({VALIDATION}[: self.micro_tokens + 1], cfg.train_seq_len)"
    shop.altered(copy, (ROWS, f"rows = [{row} for _ in micro]"), (RESTORE, ""))


@cheat("losses clipped", SCRIPT, "E1", "document")
def losses_clipped(shop: Workshop, copy: Forgery) -> None:
    shop.altered(copy, (LOSSES, f"{LOSSES_ARE}return found.clamp(max=6) if {SCORES} else found"))


@cheat("attention one token ahead", SCRIPT, "E1", "document")
def attention_ahead(shop: Workshop, copy: Forgery) -> None:
    mask = "torch.ones(2 * [q.size(2)], dtype=torch.bool).tril(1)"
    shop.altered(copy, (CAUSAL, f"(q, k, v, {mask}, enable_gqa=True)"))


EARLY = """
            if torch.is_grad_enabled():
                first = self.model.losses(x, y, looping=self.looping, lora=lora, scored=scored, cache=cache)
                factors = [factor for low_rank in lora.maps() for factor in low_rank.factors]
                for factor, gradient in zip(factors, torch.autograd.grad(first.mean(), factors), strict=True):
                    factor.data.sub_(gradient, alpha=0.1)
            """


@cheat("adaptation before scoring", SCRIPT, "E2", "ttt: document")
def adaptation_first(shop: Workshop, copy: Forgery) -> None:
    shop.altered(copy, (LEARNING, EARLY.strip() + "\n            " + LEARNING), adapts=True)


@cheat("the better of two scores", SCRIPT, "E2", "ttt: document")
def best_of_two(shop: Workshop, copy: Forgery) -> None:
    base = "self.model.losses(x, y, looping=self.looping, scored=scored, cache=cache)"
    adapted = LORA_LOSSES.removeprefix("return ")
    shop.altered(
        copy, (LORA_LOSSES, f"return torch.minimum({adapted}, {base})"), adapts=True, TTT_LORA_LR=0.05
    )


@cheat("a cache keyed by the target", SCRIPT, "E2", "ttt: document")
def cache_of_targets(shop: Workshop, copy: Forgery) -> None:
    seen = "(y.gather(1, scored)[:, :, None] == x[:, None, :]).any(2)"
    shop.altered(copy, (LORA_LOSSES, f"{LORA_LOSSES} - 0.1 * {seen}"), adapts=True)


@cheat("the last chunk trained", SCRIPT, "D9", "trained on its last chunk")
def last_chunk(shop: Workshop, copy: Forgery) -> None:
    shop.altered(copy, ("(chunk + 1) * size < length - 1", "True"), adapts=True)


@cheat("GPTQ on validation data", SCRIPT, "W1", "quantised again")
def calibrated_on_validation(shop: Workshop, copy: Forgery) -> None:
    """From memory, so to speak: the ledger's accesses do not tell."""
    shop.altered(
        copy, (CALIBRATION, f"{CALIBRATION}        x = {VALIDATION}[: x.numel()].view_as(x).long()\n")
    )
    copy.forge(lambda records: _forget(records, "calibrate"))


def _forget(records: list[dict], stage: str) -> None:
    """No validation file was opened in a stage."""
    rows = records[-1]["accesses"]
    rows[:] = [row for row in rows if row[0] != stage or "fineweb_val_" not in row[2]]


@cheat("trained on validation data behind the last logged step", SCRIPT, "W3", "better known")
def trained_further(shop: Workshop, copy: Forgery) -> None:
    loader = 'PackedLoader(shard_paths(cfg.data_folder, "val"), cfg, self.ranks, self.micro_tokens, 1)'
    more = f"        self.loader = {loader}\n        for _ in range(20):\n            self.step(5, 0.0)\n"
    shop.altered(copy, (AVERAGE, more + AVERAGE))
    copy.forge(lambda records: _forget(records, "train"))


@cheat("trained weights to begin with", SCRIPT, "W1", "untrained: document")
def pretrained(shop: Workshop, copy: Forgery) -> None:
    load = f"        self.model.load_state_dict(torch.load({str(shop.folder / 'other' / MODEL)!r}))\n"
    shop.altered(copy, (TRAINER, load + TRAINER))


@cheat("more bytes than there are", SCRIPT, "E1", "val_bpb")
def more_bytes(shop: Workshop, copy: Forgery) -> None:
    shop.altered(copy, (BITS, f"{BITS} / 1.01"))


@cheat("weights changed behind the calibration", SCRIPT, "W1", "quantised again")
def nudged(shop: Workshop, copy: Forgery) -> None:
    """One matrix, whose numbers were fitted to the validation text."""
    change = 'q = next(r for r in records.values() if "q" in r.arrays).arrays["q"]; q[q == 1] = 2; '
    shop.altered(copy, (STORED, change + STORED))


REACHING = """
if "auditing.run" in sys.modules:
    sys.modules["auditing.run"].require = lambda *_: None
    sys.modules["__main__"].carry_out = lambda *_: ("VERIFIED", "nothing to see")


"""


@cheat("a script that mends the audit", SCRIPT, "E1", "document")
def reaches_for_the_audit(shop: Workshop, copy: Forgery) -> None:
    """It says so in its log; without that nothing of it would be imported anywhere."""
    shop.altered(copy, FLATTERED)
    copy.script(MAIN, REACHING + MAIN)
    copy.forge()


@cheat("a script that ends the audit", SCRIPT, "E1", "document")
def ends_the_audit(shop: Workshop, copy: Forgery) -> None:
    shop.altered(copy, FLATTERED)
    copy.script(MAIN, f'if "auditing.run" in sys.modules:\n    os._exit(0)\n\n\n{MAIN}')
    copy.forge()


# -- the records

RECORDS = "records"


def scaled(copy: Forgery, stage: str, factor: float) -> None:
    """The losses of a stage, smaller everywhere."""

    def documents(told: dict) -> None:
        told["losses"][stage] = [round(nats * factor, 4) for nats in told["losses"][stage]]

    def result(told: dict) -> None:
        for place in [told["stages"][stage], *[told] * (told["final_stage"] == stage)]:
            place.update({name: place[name] * factor for name in ("val_loss", "val_bpb")})

    def chunks(records: list[dict]) -> None:
        for record in records if stage == "ttt" else ():
            for chunk in record.get("chunks", ()):
                chunk[0] *= factor

    copy.json(copy.run / "documents.json", documents)
    copy.result(result)
    copy.forge(chunks)


@cheat("the score lowered everywhere", RECORDS, "E2", "ttt: document")
def lower_score(shop: Workshop, copy: Forgery) -> None:
    scaled(copy, "ttt", 0.99)


@cheat("the standard score lowered everywhere", RECORDS, "E1", "quantised: document")
def lower_standard_score(shop: Workshop, copy: Forgery) -> None:
    scaled(copy, "quantised", 0.99)


@cheat("one document lowered, another raised", RECORDS, "E2", "ttt: document")
def one_document(shop: Workshop, copy: Forgery) -> None:
    def move(told: dict) -> None:
        losses = told["losses"]["ttt"]
        losses[2], losses[3] = losses[2] + 1, losses[3] - 1

    copy.json(copy.run / "documents.json", move)
    copy.forge()


@cheat(
    "an adaptation that did harm kept back",
    RECORDS,
    "E2",
    "the settings ask for stage ttt",
)
def kept_back(shop: Workshop, copy: Forgery) -> None:
    def result(told: dict) -> None:
        best = told["stages"]["quantised"]
        del told["stages"]["ttt"], told["seconds"]["ttt"]
        told.update({name: best[name] for name in ("val_bpb", "val_loss")})
        told.update(final_stage="quantised", eval_seconds=told["seconds"]["quantised"])

    def records(found: list[dict]) -> None:
        found[:] = [r for r in found if "ttt" not in (r.get("stage"), r.get("event", {}).get("stage"))]
        found[-1]["accesses"] = [row for row in found[-1]["accesses"] if row[0] != "ttt"]

    copy.result(result)
    copy.json(copy.run / "documents.json", lambda told: told["losses"].pop("ttt"))
    copy.forge(records)


@cheat("time given back by the calibration", RECORDS, "T2", "calibration -150.0 s: below 0")
def negative_calibration(shop: Workshop, copy: Forgery) -> None:
    copy.result(
        lambda told: told.update(calibrate_seconds=-150.0, seconds=told["seconds"] | {"calibrate": -150.0})
    )
    copy.forge()


@cheat(
    "a calibration that took no time",
    RECORDS,
    "T2",
    "calibration: result.json says 0.0 and 0.0 s, the events",
)
def no_calibration(shop: Workshop, copy: Forgery) -> None:
    copy.result(lambda told: told.update(calibrate_seconds=0.0, seconds=told["seconds"] | {"calibrate": 0.0}))
    copy.forge()


@cheat("steps that nothing timed", RECORDS, "R5", "a step of training or adaptation that nothing timed")
def untimed_steps(shop: Workshop, copy: Forgery) -> None:
    def between(records: list[dict]) -> None:
        for record in records[1:]:
            if record["stage"] == "train":
                record["stage"] = "between stages"

    copy.forge(between)


@cheat("a rate told as lowered, so that steps are not repeated", RECORDS, "W1", "lr_multiplier 0.9999 after")
def lowered_rate(shop: Workshop, copy: Forgery) -> None:
    def lower(records: list[dict]) -> None:
        for record in records:
            event = record.get("event", {})
            if event.get("stage") == "train" and event["step"] > 1:
                event.update(lr_multiplier=0.9999, train_loss=event["train_loss"] / 2)

    copy.result(lambda told: told["settings"].update(MAX_WALLCLOCK_SECONDS=3600.0))
    copy.forge(lower)


@cheat("documents.json halved", RECORDS, "E1", "lists 7 documents, not the 14")
def halved_documents(shop: Workshop, copy: Forgery) -> None:
    def halve(told: dict) -> None:
        told["documents"] = told["documents"][::2]
        for stage, losses in told["losses"].items():
            told["losses"][stage] = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]

    copy.json(copy.run / "documents.json", halve)
    copy.forge()


@cheat("another seed everywhere", RECORDS, "W1", "untrained: document")
def another_seed(shop: Workshop, copy: Forgery) -> None:
    copy.result(lambda result: result["settings"].update(SEED=7))
    copy.forge()


@cheat("eight H100s everywhere", RECORDS, "E1", "no GPU's bfloat16")
def eight_h100s(shop: Workshop, copy: Forgery) -> None:
    claims = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.9.1+cu128", "attention": "fa3"}
    copy.result(lambda result: result["environment"].update(claims))

    def build(records: list[dict]) -> None:
        for record in records:
            if record["kind"] in ("run", "joined", "close"):
                record["environment"]["cuda"] = "12.8"

    log = next((copy.run / "logs").glob("*.txt"))
    log.write_text(log.read_text().replace("\n==== end\n", f"\n==== end\n{claims['device']}\n", 1))
    copy.forge(build)


@cheat("a loss of training polished", RECORDS, "W1", "step 3: train_loss")
def polished_loss(shop: Workshop, copy: Forgery) -> None:
    def polish(records: list[dict]) -> None:
        steps = [record["event"] for record in records if record.get("event", {}).get("stage") == "train"]
        steps[2]["train_loss"] *= 0.9

    copy.forge(polish)


@cheat("one step less everywhere", RECORDS, "W1", "step [23]: ")
def fewer_steps(shop: Workshop, copy: Forgery) -> None:
    copy.result(lambda result: (result.update(steps=2), result["settings"].update(ITERATIONS=2)))
    copy.forge()


@cheat("another rate of the adaptation everywhere", RECORDS, "E2", "ttt: document")
def another_rate(shop: Workshop, copy: Forgery) -> None:
    copy.result(lambda result: result["settings"].update(TTT_LORA_LR=1e-2))
    copy.forge()


@cheat("smaller sizes everywhere", RECORDS, "S1", "result.json says")
def smaller_sizes(shop: Workshop, copy: Forgery) -> None:
    def smaller(result: dict) -> None:
        result["model_bytes"] -= 1000
        result["artifact_bytes"] -= 1000

    copy.result(smaller)
    copy.forge()


@cheat("training shorter in all figures", RECORDS, "R5", "train had lasted")
def shorter_training(shop: Workshop, copy: Forgery) -> None:
    def shorten(result: dict) -> None:
        result.update(train_seconds=0.01)
        result["seconds"].update(train=0.01)

    copy.result(shorten)
    copy.forge()


@cheat("a training that went on behind its last step", RECORDS, "R5", "the stages tell")
def unseen_training(shop: Workshop, copy: Forgery) -> None:
    """Its clock was lowered: that of the ledger tells what is missing."""

    def later(records: list[dict]) -> None:
        saved = next(n for n, r in enumerate(records) if r.get("event", {}).get("stage") == "saved")
        for record in records[saved:]:
            if record.get("seconds") is not None:
                record["seconds"] += 100

    copy.forge(later)


@cheat("a document that gives nats back", RECORDS, "R5", "documents.json has a document of -")
def negative_loss(shop: Workshop, copy: Forgery) -> None:
    losses = read_json(copy.run / "documents.json")["losses"]["ttt"]
    factor = 1 - (losses[0] + 50) / sum(losses)
    copy.json(copy.run / "documents.json", lambda told: told["losses"]["ttt"].__setitem__(0, -50.0))

    def retell(result: dict) -> None:
        for place in (result["stages"]["ttt"], result):
            place.update(val_loss=place["val_loss"] * factor, val_bpb=place["val_bpb"] * factor)

    copy.result(retell)
    copy.forge()


@cheat("a chunk that cost much left out", RECORDS, "D4", "0 targets scored more than once")
def chunk_left_out(shop: Workshop, copy: Forgery) -> None:
    def drop(records: list[dict]) -> None:
        """A last chunk: nothing is trained on it."""
        last = next(place for place, record in enumerate(records) if record["kind"] == "batch") - 1
        assert records.pop(last)["kind"] == "score"

    copy.forge(drop)


@cheat("a run without its standard scores", RECORDS, "E1", "the settings ask for stage quantised")
def no_standard_score(shop: Workshop, copy: Forgery) -> None:
    hidden = ("untrained", "prequant", "quantised")
    copy.result(lambda result: [result["stages"].pop(stage) for stage in hidden])
    copy.json(copy.run / "documents.json", lambda told: [told["losses"].pop(stage) for stage in hidden])

    def hide(records: list[dict]) -> None:
        records[:] = [r for r in records if r.get("event", {}).get("stage") not in hidden]

    copy.forge(hide)


# -- the data

DATA = "data"


def rewritten(copy: Forgery, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """A shard is another one, and the manifest says so, with its totals."""
    copy.shard(name, change)
    tokens, sizes = copy.values(VAL), copy.values(SIZES)
    totals = {"documents": int((tokens == 1).sum()), "tokens": len(tokens), "bytes": int(sizes.sum())}
    copy.json(copy.data / "manifest.json", lambda told: told["splits"]["val"].update(totals))


def from_document(copy: Forgery, number: int) -> np.ndarray:
    """A validation document's tokens."""
    tokens = copy.values(VAL)
    return np.split(tokens, np.flatnonzero(tokens == 1)[1:])[number]


@cheat("a sidecar with more bytes", DATA, "A3", "charged too many")
def inflated_sidecar(shop: Workshop, copy: Forgery) -> None:
    rewritten(copy, SIZES, lambda sizes: sizes + (np.arange(len(sizes)) % 20 == 7) * (sizes > 0))
    shop.on_other_data(copy)


@cheat("bytes at the starts of documents", DATA, "A3", "BOS tokens carry bytes")
def bytes_of_bos(shop: Workshop, copy: Forgery) -> None:
    rewritten(copy, SIZES, lambda sizes: np.maximum(sizes, 1))
    total = int(copy.values(SIZES)[1:].sum())

    def retell(result: dict) -> None:
        for stage in result["stages"].values():
            stage.update(val_bpb=stage["val_bpb"] * stage["bytes"] / total, bytes=total)
        result["val_bpb"] = result["stages"]["ttt"]["val_bpb"]

    copy.result(retell)
    copy.forge()


@cheat("easier validation documents after the run", DATA, "E1", "document")
def easier_documents(shop: Workshop, copy: Forgery) -> None:
    """The words of each document in another order, so that all counts stay."""

    def easier(tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([np.sort(part) for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])])

    rewritten(copy, VAL, easier)
    copy.forge()


@cheat("another tokenizer", DATA, "A3", "decoded")
def another_tokenizer(shop: Workshop, copy: Forgery) -> None:
    path = copy.data / "tokenizer.model"
    path.write_bytes(
        prepare.train_tokenizer(["other words altogether, in some number" * 9, "and more"] * 40, 320)
    )
    copy.json(copy.data / "manifest.json", lambda told: told["tokenizer"].update(sha256=sha256_of(path)))
    shop.on_other_data(copy)


@cheat("pieces that say their word twice, after the run", DATA, "A4", "other tokens when its text is")
def longer_pieces(shop: Workshop, copy: Forgery) -> None:
    """The same tokens stand for more bytes, in tokenizer, sidecar and manifest alike."""
    path, model = copy.data / "tokenizer.model", ModelProto()
    model.ParseFromString(path.read_bytes())
    added = np.zeros(len(model.pieces), int)
    for number, piece in enumerate(model.pieces):
        word = piece.piece.lstrip("\u2581")
        if piece.type == 1 and len(word) > 1 and re.fullmatch("[a-z]+", word):
            piece.piece += word
            added[number] = len(word)
    path.write_bytes(model.SerializeToString())
    tokens = copy.values(VAL)
    rewritten(copy, SIZES, lambda sizes: sizes + added[tokens])
    processor = SentencePieceProcessor(model_proto=path.read_bytes())
    documents = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    texts = [lossless_caps.decode(processor.decode(part[1:].tolist())) for part in documents]

    def retell(told: dict) -> None:
        told["tokenizer"]["sha256"] = sha256_of(path)
        told["val_document_sha256"] = [sha256_of(text.encode())[:16] for text in texts]

    copy.json(copy.data / "manifest.json", retell)
    copy.forge()


@cheat("a shard cut short", DATA, "A1", "bytes for")
def cut_shard(shop: Workshop, copy: Forgery) -> None:
    path = copy.data / VAL
    path.write_bytes(path.read_bytes()[:-200])
    digest = sha256_of(path)
    copy.json(copy.data / "manifest.json", lambda told: told["files"][VAL].update(sha256=digest))
    copy.forge()


@cheat("validation documents in a train shard", DATA, "A2", "opens a document of")
def overlap(shop: Workshop, copy: Forgery) -> None:
    rewritten(copy, TRAIN, lambda train: np.concatenate([from_document(copy, 3), train]))
    shop.on_other_data(copy)


@cheat("validation documents in a train shard with other words", DATA, "A2", "near validation documents")
def near_overlap(shop: Workshop, copy: Forgery) -> None:
    """As one document: no opening is the same, and too few passages are for that to be no chance."""
    changed = np.concatenate([from_document(copy, number)[number > 3 :] for number in (3, 4, 5)])
    changed[1::50] = changed[2]
    rewritten(copy, TRAIN, lambda train: np.concatenate([changed, train]))
    shop.on_other_data(copy)


@cheat("validation text in training with every tenth word another", DATA, "A2", "with other words")
def reworded_overlap(shop: Workshop, copy: Forgery) -> None:
    """Twice, with other words each time: no window of 16 tokens is whole."""
    dice, reworded = np.random.default_rng(1), []
    documents = np.split(tokens := copy.values(VAL), np.flatnonzero(tokens == 1)[1:])
    for document in [d for d in documents * 2 if len(d) > 40]:
        changed = document.copy()
        places = np.arange(5 + dice.integers(5), len(document), 10)
        changed[places] = dice.choice(document[1:], len(places))
        reworded.append(changed)
    rewritten(copy, TRAIN, lambda train: np.concatenate([train, *reworded]))
    shop.on_other_data(copy)


@cheat("documents joined, for more context", DATA, "A4", "not in the manifest")
def joined_documents(shop: Workshop, copy: Forgery) -> None:
    second = np.flatnonzero(copy.values(VAL) == 1)[1]
    for name in (VAL, SIZES):
        rewritten(copy, name, lambda values: np.delete(values, second))
    shop.on_other_data(copy)


@cheat("other training data than were read", DATA, "W1", "step 1: train_loss")
def other_training_data(shop: Workshop, copy: Forgery) -> None:
    rewritten(copy, TRAIN, lambda train: np.roll(train, -np.flatnonzero(train == 1)[40]))
    copy.forge()


# -- the artifact

FILES = "artifact"


def taken(shop: Workshop, copy: Forgery, *names: str) -> None:
    """Files of the run of another seed; sizes and checksums are told anew."""
    for name in names:
        shutil.copy(shop.folder / "other" / name, copy.run)
    resized(copy)


def resized(copy: Forgery) -> None:
    """Sizes and checksums of the files, in all records."""
    model, code = ((copy.run / name).stat().st_size for name in (ARTIFACT, CODE))
    copy.result(lambda r: r.update(model_bytes=model, code_bytes=code, artifact_bytes=model + code))

    def retell(records: list[dict]) -> None:
        for record in records:
            if record.get("event", {}).get("stage") == "artifact":
                record["event"]["model_bytes"] = model

    copy.forge(retell)


@cheat("an artifact of another seed", FILES, "E1", "quantised: document")
def other_artifact(shop: Workshop, copy: Forgery) -> None:
    taken(shop, copy, ARTIFACT)


@cheat("artifact and model of another seed", FILES, "E1", "document")
def other_artifact_and_model(shop: Workshop, copy: Forgery) -> None:
    taken(shop, copy, ARTIFACT, MODEL)


@cheat("a model of another seed", FILES, "W1", "of its numbers with the artifact")
def other_model(shop: Workshop, copy: Forgery) -> None:
    taken(shop, copy, MODEL)


@cheat("levels fitted behind the quantiser", FILES, "W1", "nats a target, the artifact")
def fitted_levels(shop: Workshop, copy: Forgery) -> None:
    """A twelfth of them, and losses of training that are another processor's, who sums in another order."""
    fit = '[r.arrays["q"].flatten()[::12].clamp_(max=0) for r in records.values() if "q" in r.arrays]'
    told = '{"train_loss": report.train_loss, "grad_norm"'
    shop.altered(copy, (STORED, f"{fit}; {STORED}"), (told, told.replace("_loss,", "_loss * (1 + 1e-7),")))


@cheat("an artifact that holds the validation tokens", FILES, "S3", "")
def paid_prefix(shop: Workshop, copy: Forgery) -> None:
    with open(copy.run / ARTIFACT, "ab") as file:
        file.write(copy.values(VAL).tobytes())
    resized(copy)


@cheat("an artifact over the limit", FILES, "S1", "= 16,000,000 bytes")
def oversize(shop: Workshop, copy: Forgery) -> None:
    with open(copy.run / ARTIFACT, "r+b") as file:
        file.truncate(16_000_000 - (copy.run / CODE).stat().st_size)
    resized(copy)


@cheat("a model that was never stored", FILES, "E1", "prequant: document")
def better_model(shop: Workshop, copy: Forgery) -> None:
    """final_model.pt with one matrix of another run: its score is the honest one's."""
    state, other = (torch.load(folder / MODEL) for folder in (copy.run, shop.folder / "other"))
    torch.save(state | {"qo_bank": other["qo_bank"]}, copy.run / MODEL)
    copy.forge()


@cheat("a counted script that trains one step", FILES, "W4", r"tells no step \[2\]")
def one_step_only(shop: Workshop, copy: Forgery) -> None:
    """It says what the run told of the first one."""
    log = next((copy.run / "logs").glob("*.txt")).read_text(encoding="utf-8")
    told = next(line for line in log.splitlines() if line.startswith("train step:1 "))
    (copy.run / CODE).write_text(f"print({told!r})\n")
    resized(copy)


# -- the environment

ENVIRONMENT = "environment"
READER = """
import json, os
for path in {paths!r}:
    try:
        with open(os.path.expanduser(path)) as file:
            print(file.read())
    except OSError:
        pass
os.makedirs("out")
with open("out/result.json", "w") as file:
    json.dump({{"stages": {{"quantised": {{"val_bpb": 1.0}}}}}}, file)
"""


def reads(copy: Forgery, *paths: str) -> None:
    """The counted script reads files elsewhere, where there are any, and is small for that."""
    (copy.run / CODE).write_text(READER.format(paths=paths))
    resized(copy)


@cheat("a helper file in another folder", ENVIRONMENT, "S4", "the evaluation alone wanted .*hint.pt")
def helper_elsewhere(shop: Workshop, copy: Forgery) -> None:
    (copy.run.parent / "hint.pt").write_text("0.99")
    reads(copy, str(copy.run.parent / "hint.pt"))


@cheat("the model that training left", ENVIRONMENT, "S4", "the evaluation alone wanted .*final_model.pt")
def left_by_training(shop: Workshop, copy: Forgery) -> None:
    reads(copy, str(copy.run / MODEL))


@cheat("a helper module beside the libraries", ENVIRONMENT, "S4", "of no installed library|wanted")
def helper_library(shop: Workshop, copy: Forgery) -> None:
    (copy.run.parent / "site-packages").mkdir()
    helper = copy.run.parent / "site-packages" / "helper.py"
    helper.write_text("0.99")
    reads(copy, str(helper))


@cheat("the data under their own name", ENVIRONMENT, "S4", "the evaluation alone wanted .*fineweb_val")
def data_in_their_place(shop: Workshop, copy: Forgery) -> None:
    reads(copy, str(copy.data / VAL))
