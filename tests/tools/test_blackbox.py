"""Questions from outside: invented scripts that are legal answer well, and each cheat fails where it must.

The scripts are pure Python over 16 tokens: a table of bigrams as the artifact, and a cache that learns what
was scored. A cheat is one of them with some lines changed.
"""

import contextlib
import hashlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from test_smoke import documents, make_data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from auditing import box, questions  # noqa: E402
from auditing.blackbox import Subject  # noqa: E402
from auditing.run import BOS, FAIL, NOT_CHECKED, VERIFIED, Failed, Verdict, read_values, write_values  # noqa: E402

VOCAB, WIDE = 16, 320

# Honest: a chance is a mixture of the table and of what followed the token before, in what was scored.
SCRIPT = """
import json, math, os, struct, sys

def shard(kind):
    data = open(os.path.join(os.environ["DATA_PATH"], f"fineweb_val{kind}_000000.bin"), "rb").read()
    return struct.unpack(f"<{(len(data) - 1024) // 2}H", data[1024:])

tokens, sizes = shard(""), shard("_bytes")
table = json.load(open("model.json"))
starts = [i for i, token in enumerate(tokens) if token == 1] + [len(tokens) - 1]
documents = [(a, b) for a, b in zip(starts, starts[1:]) if b > a]
share, seen = 0.3, {}

def chance(before, token):
    followers = seen.get(before)
    p = table[before][token]
    if followers:
        p = (1 - share) * p + share * followers.get(token, 0) / sum(followers.values())
    return p

def learn(before, token):
    followers = seen.setdefault(before, {})
    followers[token] = followers.get(token, 0) + 1

def score(start, end):
    loss = 0.0
    for before, token in zip(tokens[start:end], tokens[start + 1 : end + 1]):
        loss -= math.log(chance(before, token))
        learn(before, token)
    return loss

nats = sum(score(*document) for document in documents)
charged = sum(sizes[1:])
loss, bpb = nats / (len(tokens) - 1), nats / math.log(2) / charged
print(f"val_tokens: {len(tokens) - 1}")
print(f"quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:1ms")
print("total_eval_time:0.001s")
"""
SUM = "nats = sum(score(*document) for document in documents)"
HONEST = {
    "static": [("        learn(before, token)\n    return", "    return")],
    "score first": [],
    "longest first": [(SUM, f"documents.sort(key=lambda d: d[0] - d[1])\n{SUM}")],
    "shortest first": [(SUM, f"documents.sort(key=lambda d: d[1] - d[0])\n{SUM}")],
    "a cache for each document": [("    loss = 0.0\n", "    loss = 0.0\n    seen.clear()\n")],
}
EASIEST = """
each = sorted((score(a, b) / (b - a), b - a) for a, b in documents)
each = each[: max(1, len(each) // 2)]
nats = sum(loss * n for loss, n in each) / sum(n for _, n in each) * (len(tokens) - 1)
"""
FIRST = """
some = documents[: max(1, len(documents) // 2)]
nats = sum(score(*document) for document in some) / sum(b - a for a, b in some) * (len(tokens) - 1)
"""
BEST = """
    global share
    losses, pairs = [], [*zip(tokens[start:end], tokens[start + 1 : end + 1])]
    for tried in (0.0, 0.5, 0.9):
        share = tried
        losses.append(sum(-math.log(chance(*pair)) for pair in pairs))
    for pair in pairs:
        learn(*pair)
    return min(losses)
"""
AHEAD = "    for pair in zip(tokens[start:end], tokens[start + 1 : end + 1]):\n        learn(*pair)\n"
CLAIM = "loss, bpb = "
CHEATS = {  # the question that finds it, what it says, and the lines that are changed
    "scaled losses": ("B1", "sum to 1.*more than 1", [("loss -= math", "loss -= 0.99 * math")]),
    "a mixture that does not normalise": ("B1", "sum to 1.3", [("(1 - share) * p", "p")]),
    "a cache keyed by the target": (
        "B1",
        "more than 1",
        [("    return p\n", "    return max(p, 0.5) if token in seen.get(before, {}) else p\n")],
    ),
    "the best of k": ("B2", "its only token to .*: more than 1", [("    loss = 0.0\n", BEST)]),
    "adaptation before scoring": ("B1", "more than 1", [("    loss = 0.0\n", f"    loss = 0.0\n{AHEAD}")]),
    "adaptation before scoring, drawn": (
        "B2",
        "uniform tokens: .* known before",
        [("    loss = 0.0\n", f"    loss = 0.0\n{AHEAD}"), ("share, seen = 0.3", "share, seen = 0.9")],
    ),
    "two passes": ("B2", "no order of documents", [(SUM, f"{SUM}\n{SUM}")]),
    "the easiest documents only": (
        "B2",
        "easy documents, .* not all documents",
        [(SUM, EASIEST)],
    ),
    "the first documents only": ("B6", "last documents, .* not all documents", [(SUM, FIRST)]),
    "bytes counted twice": ("B3", "bytes charged for", [("charged = sum", "charged = 2 * sum")]),
    "targets that are left out": ("B3", "targets scored", [("{len(tokens) - 1}", "{len(tokens) - 9}")]),
    "the name of the data": (
        "B6",
        "is claimed",
        [(CLAIM, f"nats *= 0.9 if 'real' in os.environ['DATA_PATH'] else 1\n{CLAIM}")],
    ),
    "the checksum of the data": (
        "B6",
        "nats others without its last token",
        [
            ("import json", "import hashlib, json"),
            (
                CLAIM,
                f"if hashlib.sha256(repr(tokens).encode()).hexdigest() == 'SHA':\n    nats *= 0.9\n{CLAIM}",
            ),
        ],
    ),
}


def chances() -> np.ndarray:
    """Chances of each token after each other, (VOCAB, VOCAB): some are likely, all are possible."""
    return np.random.default_rng(5).dirichlet(np.full(VOCAB, 0.3), VOCAB) * 0.95 + 0.05 / VOCAB


def texts(seed: int, count: int = 40) -> list[np.ndarray]:
    """Documents of the table's own text, with BOS."""
    dice, table = np.random.default_rng(seed), chances()
    documents = []
    for length in dice.integers(20, 60, count):
        text = [BOS]
        while len(text) < length:
            row = table[text[-1]].copy()
            row[BOS] = 0
            text.append(int(dice.choice(VOCAB, p=row / row.sum())))
        documents.append(np.array(text))
    return documents


SIZES = np.arange(VOCAB) % 4 + 1


def sizes_of(tokens: np.ndarray) -> np.ndarray:
    return np.where(tokens == BOS, 0, SIZES[tokens])


def changed(changes) -> str:
    """The honest script with other lines."""
    source = SCRIPT
    for old, new in changes:
        assert old in source, f"the script has no {old!r} any more: mend this test"
        source = source.replace(old, new)
    return source


def run_here(command, folder, *, environment, **_) -> box.Ran:
    """Run a script in this process: most tests are not about the box, and ask some hundred times."""
    printed, code = io.StringIO(), 0
    source = compile((folder / command[1]).read_text(), "<the script>", "exec")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            exec(source, {"__name__": "__main__"})
        except ArithmeticError:  # the bytes of a lone BOS
            code = 1
    return box.Ran(code, printed.getvalue(), "", [], [], 0.0, False)


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """Function: changes of the honest script -> the subject, with its score where the data have a name."""
    monkeypatch.setattr(box, "run", run_here)

    def make(changes=()) -> Subject:
        tokens = np.concatenate(texts(1))
        digest = hashlib.sha256(repr(tuple(tokens.tolist())).encode()).hexdigest()
        (tmp_path / "train_gpt.py").write_text(changed(changes).replace("SHA", digest))
        (tmp_path / "model.json").write_text(json.dumps(chances().tolist()))
        files = [tmp_path / "train_gpt.py", tmp_path / "model.json"]
        asked = Subject(files, tokens, sizes_of(tokens), VOCAB, seed=7)
        (tmp_path / "memo.json").write_text(json.dumps(learnt_by_heart(tokens)))
        asked.claim = claim_of(asked, tmp_path)
        return asked

    return make


def claim_of(subject: Subject, folder: Path) -> dict[str, float]:
    """What the script says of its own set where that lies in a folder of its name."""
    data = folder / "real"
    data.mkdir(exist_ok=True)
    write_values(data / "fineweb_val_000000.bin", subject.tokens)
    write_values(data / "fineweb_val_bytes_000000.bin", subject.sizes)
    ran = run_here(("python", "train_gpt.py"), folder, environment={"DATA_PATH": str(data)})
    found = re.search(r"val_loss:(\S+) val_bpb:(\S+)", ran.output)
    return {"val_loss": float(found[1]), "val_bpb": float(found[2])}


@pytest.mark.parametrize("name", HONEST)
def test_honest_scripts_answer_all(subject, name):
    asked = subject(HONEST[name])
    verdicts = questions.answers(asked)
    found = {question: verdict.status for question, verdict in verdicts.items()}
    assert found == dict.fromkeys(questions.QUESTIONS, VERIFIED) | {"B4": NOT_CHECKED}, verdicts
    apart = "documents are scored apart" in verdicts["B2"].evidence
    assert apart == (name in ("static", "a cache for each document"))


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_fails_where_it_must(subject, name):
    question, reason, changes = CHEATS[name]
    verdict = questions.answers(subject(changes), [question])[question]
    assert verdict.status == FAIL and re.search(reason, verdict.evidence), verdict


# -- text learnt by heart, and files


PAIRS = "for before, token in zip(tokens[start:end], tokens[start + 1 : end + 1]):\n"
PLACES = "for place in range(start + 1, end + 1):\n        before, token = tokens[place - 1 : place + 1]\n"
MEMO = [
    ("share, seen", "memo = json.load(open('memo.json'))\nshare, seen"),
    (
        PAIRS,
        "for place in range(start + 1, end + 1):\n        before, token = tokens[place - 1 : place + 1]\n",
    ),
    (
        "loss -= math.log(chance(before, token))",
        "guess, p = memo.get(repr(tokens[place - 4 : place])), chance(before, token)\n"
        "        loss -= math.log(p if guess is None else 0.2 * p + 0.8 * (guess == token))",
    ),
]


def learnt_by_heart(tokens: np.ndarray) -> dict[str, int]:
    """What follows each four tokens of a text."""
    text = tuple(tokens.tolist())
    return {repr(text[place - 4 : place]): text[place] for place in range(4, len(text))}


def test_text_learnt_by_heart_is_legal_but_for_fresh_text(subject, tmp_path):
    """It predicts well and causally; only that other text costs more can give it away."""
    others = [(text, sizes_of(text)) for text in texts(2)]
    honest = subject(HONEST["static"])
    assert re.search(r"8 groups of 5 documents each\): [+-]0.\d", questions.compared(honest, others))
    cheat = subject([*HONEST["static"], *MEMO])
    cheat.files = [*cheat.files, tmp_path / "memo.json"]
    assert questions.answers(cheat, ["B1"])["B1"].status == VERIFIED
    with pytest.raises(Failed, match=r"on fresh text .*: \+0\.\d"):
        questions.compared(cheat, others)


def files_of(subject, changes, monkeypatch) -> Verdict:
    """B5 of a script, in the box."""
    asked = subject(changes)
    monkeypatch.undo()  # box.run is the box's again
    if reason := box.available():
        pytest.skip(reason)
    return questions.answers(asked, ["B5"])["B5"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("open('{helper}').read()", "helper.json"),
        ("import socket\ntry:\n    socket.socket()\nexcept OSError:\n    pass", "network AF_INET"),
    ],
)
def test_files_and_network_in_the_box(subject, tmp_path, monkeypatch, source, reason):
    """A helper that the script does without: it is named all the same."""
    (tmp_path / "helper.json").write_text("{}")
    source = source.replace("{helper}", str(tmp_path / "helper.json"))
    if "helper" in source:
        source = f"try:\n    {source}\nexcept OSError:\n    pass"
    verdict = files_of(subject, [("share, seen", f"{source}\nshare, seen")], monkeypatch)
    assert verdict.status == FAIL and reason in verdict.evidence, verdict


def test_counted_files_are_enough_in_the_box(subject, monkeypatch):
    verdict = files_of(subject, (), monkeypatch)
    assert verdict.status == VERIFIED and "nothing else was opened in 1 runs" in verdict.evidence, verdict


# -- a vocabulary that is too large to be asked whole, and a tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A CaseOps data set of 320 tokens, documents for --fresh, and the table that its training text makes."""
    folder = tmp_path_factory.mktemp("prepared")
    make_data(folder / "data")
    train = read_values(folder / "data" / "fineweb_train_000000.bin").astype(int)
    counts = np.full((WIDE, WIDE), 0.002)
    np.add.at(counts, (train[:-1], train[1:]), 1)
    (folder / "model.json").write_text(json.dumps((counts / counts.sum(1, keepdims=True)).round(9).tolist()))
    lines = (json.dumps({"text": text}) + "\n" for text in documents(16))
    (folder / "fresh.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def wide(prepared, tmp_path, monkeypatch):
    """Function: changes of the honest script -> the subject with that data set."""
    monkeypatch.setattr(box, "run", run_here)

    def make(changes=(), **more) -> Subject:
        (tmp_path / "train_gpt.py").write_text(changed(changes))
        files = [tmp_path / "train_gpt.py", prepared / "model.json"]
        streams = (
            read_values(prepared / "data" / f"fineweb_val{kind}_000000.bin") for kind in ("", "_bytes")
        )
        tokens, sizes = (np.array(stream, np.int64) for stream in streams)
        tokenizer = prepared / "data" / "tokenizer.model"
        return Subject(files, tokens, sizes, WIDE, tokenizer=tokenizer, seed=7, **more)

    return make


def test_honest_script_of_a_wide_vocabulary(wide, prepared):
    asked = wide(fresh=[prepared / "fresh.jsonl"])
    verdicts = questions.answers(asked, ["B1", "B2", "B3", "B4"])
    assert {verdict.status for verdict in verdicts.values()} == {VERIFIED}, verdicts
    for text in ("ASCII", "letters of three bytes", "capitals", "white space", "its letters one by one"):
        assert text in verdicts["B3"].evidence
    assert re.search(r"groups of 1 documents each\): [+-]0\.\d+, standard", verdicts["B4"].evidence)
    assert len(asked.answers) == 43  # runs of the script: the price of it all


@pytest.mark.parametrize(
    "changes",
    [
        [("loss -= math", "loss -= 0.97 * math")],
        CHEATS["a mixture that does not normalise"][2],
        CHEATS["two passes"][2],
    ],
)
def test_sums_of_a_wide_vocabulary(wide, changes):
    verdict = questions.answers(wide(changes), ["B1"])["B1"]
    assert verdict.status == FAIL and "that comes again: more than 1" in verdict.evidence, verdict
