"""The PPM-D mixture (experiments/): the byte model against a plain one, its gate, both mixtures."""

import copy
import json
import lzma
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import warm
from golden_tools import run_through
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_run import QUICK
from test_smoke import SCRIPT, command, environment, make_data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import ppm_mixture as mixture  # noqa: E402
from ppmd import ORDER, PPMD  # noqa: E402

import lossless_caps  # noqa: E402

TEXT = "".join(text for _, text in sorted(topics.items()))[:60_000].encode()  # Python's own help


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


class Oracle:
    """PPM-D as ppmd.py's docstring states it: a dictionary from contexts to counts, no trie."""

    def __init__(self):
        self.counts: dict[bytes, dict[int, int]] = {}
        self.past = b""

    def contexts(self) -> list[bytes]:
        """Contexts of the next byte, longest first, with a count or not."""
        return [self.past[len(self.past) - k :] for k in range(min(ORDER, len(self.past)), -1, -1)]

    def confident(self) -> bool:
        known = next((self.counts[c] for c in self.contexts() if c in self.counts), {0: 0})
        return sum(known.values()) > 0 and 10 * max(known.values()) >= 9 * sum(known.values())

    def distribution(self) -> np.ndarray:
        p, rest, excluded = np.zeros(256), 1.0, set()
        for context in self.contexts():
            seen = {s: c for s, c in self.counts.get(context, {}).items() if s not in excluded}
            if not seen:
                continue
            excluded |= set(seen)
            n, d = sum(seen.values()), len(seen)
            whole = 2 * n - d if len(excluded) == 256 else 2 * n
            for symbol, count in seen.items():
                p[symbol] = rest * (2 * count - 1) / whole
            rest *= d / whole
        others = [symbol for symbol in range(256) if symbol not in excluded]
        p[others] = rest / max(1, len(others))
        return p

    def learn(self, symbol: int) -> None:
        for context in self.contexts():
            counts = self.counts.setdefault(context, {})
            counts[symbol] = counts.get(symbol, 0) + 1
            if counts[symbol] > 1:  # this context knew it: shorter ones do not learn
                break
        self.past += bytes([symbol])


def read(data: bytes) -> tuple[np.ndarray, np.ndarray, Oracle]:
    """Probability and confidence before each byte, by the oracle."""
    oracle, probabilities, confident = Oracle(), [], []
    for symbol in data:
        probabilities.append(oracle.distribution()[symbol])
        confident.append(oracle.confident())
        oracle.learn(symbol)
    return np.array(probabilities), np.array(confident), oracle


# -- the byte model


@pytest.mark.parametrize("seed", range(6))
def test_ppm_is_the_plain_one_on_random_bytes(seed):
    rng = np.random.default_rng(seed)
    symbols = [1, 2, 3, 17, 256, 256][seed]
    data = rng.integers(0, symbols, [50, 700, 900, 900, 700, 3000][seed]).astype(np.uint8).tobytes()
    data += data[: len(data) // 3]
    expected, confident, oracle = read(data)
    model = PPMD()
    found = model.advance(array(data))
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    assert (found[1] == confident).all()
    np.testing.assert_allclose(model.distribution(), oracle.distribution(), rtol=1e-12)


def test_ppm_is_the_plain_one_on_text():
    data = TEXT[:12_000]
    expected, confident, oracle = read(data)
    model = PPMD()
    parts = [model.advance(array(part)) for part in (data[:1], data[1:5000], b"", data[5000:])]
    np.testing.assert_allclose(np.concatenate([p for p, _ in parts]), expected, rtol=1e-12)
    assert (np.concatenate([c for _, c in parts]) == confident).all() and 0 < confident.mean() < 1
    np.testing.assert_allclose(model.distribution(), oracle.distribution(), rtol=1e-12)
    assert -np.log2(expected[6000:]).mean() < 3.5, "it has learnt nothing"


@settings(max_examples=60)
@given(st.binary(max_size=300) | st.text("abcab ", max_size=300).map(str.encode))
def test_ppm_sums_to_one_and_scores_before_it_learns(data):
    model = PPMD()
    for symbol in data[-3:]:
        model.advance(array(data[:-3]))
        before, sure = model.distribution(), model.confident
        assert abs(before.sum() - 1) < 1e-12 and (before > 0).all()
        (p,), (confident,) = model.advance(np.array([symbol], np.uint8))
        assert p == before[symbol] and confident == sure


def test_ppm_with_all_bytes_in_a_context_has_no_escape():
    every = bytes(range(256))
    model = PPMD()
    model.advance(array(every + every[::-1]))
    assert abs(model.distribution().sum() - 1) < 1e-12
    model = PPMD()
    model.advance(array(bytes(x for s in range(256) for x in (7, s))))  # the context 7 knows every byte
    model.advance(array(b"\x07"))
    assert abs(model.distribution().sum() - 1) < 1e-12


def test_ppm_spells_without_learning():
    model, oracle = PPMD(), read(TEXT[:3000])[2]
    model.advance(array(TEXT[:3000]))
    words = [b"", b"the", b"\xff\x00\xff", TEXT[2990:3000] + b"abc", b"e"]
    starts = np.cumsum([0, *map(len, words)])
    before, nodes = model.distribution(), model.nodes
    found, confident = model.spell(array(b"".join(words)), starts)
    expected, sure = [], []
    for word in words:
        frozen = copy.copy(oracle)
        for i, symbol in enumerate(word):
            frozen.past = oracle.past + word[:i]
            expected.append(frozen.distribution()[symbol])
            sure.append(frozen.confident())
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert confident.tolist() == sure
    assert model.nodes == nodes and (model.distribution() == before).all()


def test_ppm_speed():
    """At least half as quick as LZMA, which takes half a second a megabyte (measured: 4 times as quick)."""
    data = array((TEXT * (1_000_000 // len(TEXT) + 1))[:1_000_000])
    ratios = []
    for shift in range(3):
        noisy = data ^ (
            np.random.default_rng(shift).random(len(data)) < 0.02
        )  # not the same text over and over
        model, start = PPMD(), time.process_time()
        model.advance(noisy)
        middle = time.process_time()
        lzma.compress(noisy.astype(np.uint8).tobytes())
        ratios.append((middle - start) / (time.process_time() - middle))
    assert min(ratios) < 2, ratios


def test_ppm_bench_measures_it():
    command = [sys.executable, str(ROOT / "bench" / "ppm.py"), "--json"]
    process = subprocess.run(command, input=TEXT[:9000], capture_output=True, check=True)
    figures = json.loads(process.stdout)
    bits = -np.log2(PPMD().advance(array(TEXT[:9000]))[0]).mean()
    assert figures["bytes"] == 9000 and figures["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    assert figures["megabytes_per_second"] == pytest.approx(9e-3 / figures["seconds"])
    process = subprocess.run(command, input=b"", capture_output=True)
    assert process.returncode == 2 and b"standard input is empty" in process.stderr


# -- the gate


def test_ppm_gate_never_looks_at_the_byte_it_scores():
    """Swap a byte: weights up to and with its own stay, its probability and what follows do not."""
    data = bytearray(TEXT[:4000])
    rng = np.random.default_rng(0)
    sure = rng.random(len(data)) < 0.3
    one = PPMD().advance(array(bytes(data)))
    seen, differ = {True: 0, False: 0}, 0
    for place in range(3000, 3900, 30):
        other = bytearray(data)
        other[place] ^= 0x15
        swapped = PPMD().advance(array(bytes(other)))
        weights = [mixture.gate(confident, sure)[: place + 1] for _, confident in (one, swapped)]
        assert (weights[0] == weights[1]).all()
        assert (one[0][:place] == swapped[0][:place]).all()
        differ += one[0][place] != swapped[0][place]  # two bytes may be as likely by chance
        seen[bool(weights[0][place] == mixture.LOW)] += 1
    assert min(seen.values()) > 3, "both weights must have been tried"
    assert differ > 20, "the byte that is scored must have been swapped"


def test_ppm_network_is_sure_before_the_token(tg):
    """The guard goes by the most probable token: other targets leave it as it is."""
    model = tiny_model(tg)
    x = torch.randint(2, 40, (1, 30))
    said = []
    for y in (torch.randint(2, 40, (1, 30)), torch.randint(2, 40, (1, 30))):
        recorder = mixture.Recorder(model, np.arange(30))
        with torch.no_grad():
            recorder.losses(x, y, looping=True)
        said.append(recorder.result())
    assert (said[0].best == said[1].best).all() and (said[0].losses != said[1].losses).any()
    assert (said[0].best == said[0].rows.astype(float).max(1)).all()


# -- the mixture


def test_ppm_mixture_as_published_by_hand():
    losses, sure, lengths = (
        np.array([np.log(16), 0.2, 3.0]),
        np.array([False, True, False]),
        np.array([2, 1, 0]),
    )
    ppm, confident = np.array([0.5, 0.9, 0.125]), np.array([False, True, True])
    nats = mixture.as_published(losses, sure, lengths, ppm, confident)
    first = -np.log(0.9 / 4 + 0.1 * 0.5) - np.log(0.05 / 4 + 0.95 * 0.9)
    second = -np.log(0.9 * np.exp(-0.2) + 0.1 * 0.125)  # the network is sure: PPM's confidence does not count
    np.testing.assert_allclose(nats, [first, second, 3.0], rtol=1e-12)


WORDS = [
    b"",
    b"a",
    b"ab",
    b"abc",
    b"b",
    b"a",
    b"ba",
    b"",
    b"c",
    b" a",
    b"abz",
]  # the first and a later one twice


@pytest.mark.parametrize("past", [b"", b"abcabcababdab", b"b a b a"])
@pytest.mark.parametrize("seed", range(4))
def test_ppm_mixture_normalised_sums_to_one_over_the_vocabulary(past, seed):
    rng = np.random.default_rng(seed)
    row = torch.tensor(rng.normal(0, [0.1, 1, 4, 9][seed], len(WORDS))).log_softmax(-1).numpy()
    vocabulary, model = mixture.Vocabulary(WORDS), PPMD()
    model.advance(array(past))
    total = 0.0
    for token in range(len(WORDS)):
        nats, heard = mixture.normalised(vocabulary, row, token, ppm := copy.deepcopy(model))
        total += np.exp(-nats)
        expected = (other := copy.deepcopy(model)).advance(array(WORDS[token]))
        assert [float(p[0]) for p, _ in heard] == expected[0].tolist()
        assert (ppm.distribution() == other.distribution()).all(), "PPM has learnt the token"
    assert abs(total - 1) < 1e-9


def test_ppm_mixture_without_ppm_is_the_network(monkeypatch):
    monkeypatch.setattr(mixture, "LOW", 1.0)
    monkeypatch.setattr(mixture, "HIGH", 1.0)
    row = torch.randn(len(WORDS), dtype=torch.float64).log_softmax(-1).numpy()
    vocabulary, model = mixture.Vocabulary(WORDS), PPMD()
    model.advance(array(b"abcab"))
    for token in range(len(WORDS)):
        nats, _ = mixture.normalised(vocabulary, row, token, copy.deepcopy(model))
        assert nats == pytest.approx(-row[token], rel=1e-12)
    assert mixture.mass(vocabulary, row, model) == pytest.approx(1, rel=1e-12)


def test_ppm_mixture_as_published_hands_out_more_than_there_is():
    """What the experiment shows, in small: PPM's share goes to every token that begins alike."""
    model = PPMD()
    model.advance(array(b"ABCDEF" * 30))
    pairs = mixture.Vocabulary([bytes([65 + i, 65 + j]) for i in range(6) for j in range(6)])
    assert mixture.mass(pairs, np.full(36, -np.log(36)), model) == pytest.approx(1, abs=0.05)
    nested = mixture.Vocabulary([b"ABCDEF"[:n] for n in range(1, 7)])
    assert mixture.mass(nested, np.full(6, -np.log(6)), model) > 4


# -- tokens as bytes


def test_ppm_tokens_spell_the_caseops_text(tokenizer_dir):
    import sentencepiece

    path = tokenizer_dir / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocabulary = mixture.Vocabulary(
        [mixture.surface(processor, i) for i in range(processor.get_piece_size())]
    )
    text = lossless_caps.encode("The NASA iPhone café — \U0001f469 costs 12 EUR")
    tokens = np.array([1, *processor.encode(text), 1])
    spelt = vocabulary.spell(tokens).tobytes()
    plain = text.encode()
    for i, operator in enumerate(mixture.OPERATORS):
        plain = plain.replace(operator.encode(), bytes([0xF8 + i]))
    assert spelt == plain and b"\xf8" in spelt and b"\xf9" in spelt and b"\xfa" in spelt
    assert vocabulary.spell(np.array([], int)).size == 0 and vocabulary.spell(np.array([1, 1])).size == 0


def test_ppm_plain_tokens_have_as_many_bytes_as_are_charged(tg, tokenizer_dir):
    import sentencepiece

    path = tokenizer_dir / "fineweb_8192_bpe.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [mixture.surface(processor, i) for i in range(8192)]
    vocabulary = mixture.Vocabulary(pieces)
    tokens = np.array([1, *processor.encode(TEXT.decode()), 1, *processor.encode("Ünï ☃ x"), 1])
    tables = tg.ByteTables.from_sentencepiece(processor, 8192)
    charged = tables.target_bytes(torch.from_numpy(tokens)).numpy()
    assert (vocabulary.lengths[tokens[1:]] == charged).all()


def test_ppm_vocabulary_finds_prefixes():
    vocabulary = mixture.Vocabulary(WORDS)
    for prefix in (b"", b"a", b"ab", b"abc", b"x", b"b", b" "):
        found = vocabulary.prefix(prefix)
        tokens = vocabulary.order[found.low : found.high]
        assert sorted(tokens) == [i for i, word in enumerate(WORDS) if word.startswith(prefix)]
        assert all(WORDS[i] == prefix for i in vocabulary.order[found.low : found.longer])
        following = sorted(
            {word[len(prefix)] for word in WORDS if word.startswith(prefix) and word != prefix}
        )
        assert found.following.tolist() == following
        for byte, start in zip(found.following, found.starts, strict=True):
            assert WORDS[vocabulary.order[start]].startswith(prefix + bytes([byte]))


# -- the network, asked through the script's evaluators


def tiny_model(tg, **changes):
    sizes = {"vocab_size": 40, "num_layers": 3, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1}
    sizes |= {"mlp_mult": 2.0, "rope_dims": 8, "loop_start": 1, "loop_end": 1, "parallel_start_layer": 2}
    sizes |= {"xsa_last_n": 3, "eval_seq_len": 16, "eval_stride": 4, "val_batch_tokens": 8 * 48}
    torch.manual_seed(0)
    model = tg.GPT(tg.Config(**sizes, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("setting", ["", "sliding_window_enabled", "plain_windows"])
def test_ppm_network_is_asked_by_the_scripts_evaluator(tg, setting):
    model = tiny_model(tg, **({setting: True} if setting else {}))
    cfg = model.cfg
    tokens = torch.randint(2, 40, (230,), dtype=torch.int32)
    tokens[[0, 50, 51, 140]] = tg.BOS
    val = tg.ValidationSet.from_sidecar(tokens, (tokens != tg.BOS).int() * 2)
    network = mixture.ask_network(model, val, cfg, tg.CPU, 10)
    if cfg.sliding_window_enabled:
        meter = run_through(tg.SlidingEvaluation, model, val, cfg, looping=True)
    else:
        meter = run_through(tg.StandardEvaluation, model, val, cfg, looping=True)
    assert network.losses.sum() == pytest.approx(meter.loss_sum, rel=1e-6)
    assert len(network.losses) == 229 and network.rows.shape == (10, 40) and network.sample[0] == 0
    realised = network.rows[np.arange(10), tokens[1:].numpy()[network.sample]]
    np.testing.assert_allclose(-realised, network.losses[network.sample], rtol=1e-6)
    np.testing.assert_allclose(np.exp(network.rows).sum(1), 1, rtol=1e-5)


def test_ppm_sample_without_a_byte_is_refused_before_the_network_is_asked(tg):
    """Bits per byte of targets that carry no byte are no number, of a sample as of the whole stream."""
    cfg = tiny_model(tg).cfg
    tokens = torch.tensor([tg.BOS, 9, 8, 7, tg.BOS, 6], dtype=torch.int32)
    for carried, reason in ((tokens == 6, "1 of all 5 do"), (tokens < 0, "0 of all 5 do")):
        val = tg.ValidationSet.from_sidecar(tokens, carried.int())
        with pytest.raises(tg.UserError, match=f"--sample 2: no target carries a byte.*{reason}"):
            mixture.ask_network(None, val, cfg, tg.CPU, 2)


def test_ppm_mixture_of_tokens_that_spell_nothing():
    """Unknown pieces carry bytes of text, and have none of their own to leave to PPM."""
    rows = np.full((3, 2), -np.log(2))
    network = mixture.Network(np.full(3, np.log(2)), rows[:, 0], rows, np.arange(3))
    vocabulary, targets = mixture.Vocabulary([b"", b""]), np.zeros(3, int)
    figures = mixture.mix(vocabulary, network, targets, np.ones(3, int), PPMD())
    assert figures["token_bytes"] == figures["low_weight_share"] == 0
    assert figures["bits_per_byte"]["as_published"] == pytest.approx(1)


def test_ppm_sample_of_more_targets_than_there_are_is_all_of_them(tg):
    model = tiny_model(tg)
    tokens = torch.tensor([tg.BOS, 9, 8, 7, tg.BOS, 6], dtype=torch.int32)
    val = tg.ValidationSet.from_sidecar(tokens, (tokens != tg.BOS).int())
    assert mixture.ask_network(model, val, model.cfg, tg.CPU, 10**15).sample.tolist() == [0, 1, 2, 3, 4]


def test_ppm_mixture_figures_do_not_depend_on_the_cuts(monkeypatch):
    """The sample and the blocks cut the stream; every byte is still scored once, in order."""
    rng = np.random.default_rng(0)
    vocabulary = mixture.Vocabulary([b"", *(bytes([65 + i]) * (1 + i % 3) for i in range(9))])
    rows = torch.tensor(rng.normal(0, 2, (300, 10))).log_softmax(-1).numpy()
    targets = rng.integers(0, 10, 300)
    losses, counts = -rows[np.arange(300), targets], np.full(300, 2)
    figures = []
    for sample, block in (([0, 100, 200], 1 << 20), (list(range(300)), 1 << 20), ([0], 7)):
        monkeypatch.setattr(mixture, "BLOCK", block)
        network = mixture.Network(losses, rows.max(1), rows[sample], np.array(sample))
        figures.append(mixture.mix(vocabulary, network, targets, counts, PPMD()))
    for other in figures[1:]:
        assert other["bits_per_byte"] == pytest.approx(figures[0]["bits_per_byte"], rel=1e-12)
        assert other["low_weight_share"] == figures[0]["low_weight_share"] > 0
    alone = PPMD().advance(vocabulary.spell(targets))[0]
    bits = (-np.log2(alone).sum() + losses[targets == 0].sum() / np.log(2)) / 600
    assert figures[0]["bits_per_byte"]["ppm"] == pytest.approx(bits, rel=1e-12)
    assert figures[1]["sample"]["bits_per_byte"]["as_published"] == pytest.approx(
        figures[1]["bits_per_byte"]["as_published"], rel=1e-12
    )


# -- the command


def experiment(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return warm.run(ROOT / "experiments" / "ppm_mixture.py", folder, environment(), *arguments)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("ppm")
    make_data(work / "data")
    quick = {"ITERATIONS": 1, "VAL_LOSS_EVERY": 0, "TTT_ENABLED": 0, "GPTQ_CALIBRATION_BATCHES": 1}
    process = command(QUICK, work, DATA_PATH="data", ARTIFACT_DIR="run", **quick)
    assert process.returncode == 0, process.stderr
    return work


def test_ppm_mixture_of_a_run(run_folder):
    process = experiment(run_folder, "run", "--sample", "150")
    lines = process.stdout.splitlines()
    assert process.returncode == 0, process.stderr
    assert lines[0] == lines[-1] == mixture.NOTICE
    process = experiment(run_folder, "run", "--sample", "150", "--json")
    figures = json.loads(process.stdout)
    assert process.stderr.splitlines()[0] == process.stderr.splitlines()[-1] == mixture.NOTICE
    result = json.loads((run_folder / "run" / "result.json").read_text())
    stage = result["stages"]["quantised"]
    bits, few = figures["bits_per_byte"], figures["sample"]["bits_per_byte"]
    assert bits["network"] == pytest.approx(stage["val_bpb"], rel=1e-6)
    assert (figures["targets"], figures["original_bytes"]) == (stage["targets"], stage["bytes"])
    assert figures["sample"]["targets"] == 150 and set(few) == {"network", "as_published", "normalised"}
    assert bits["as_published"] < bits["network"] and few["as_published"] != few["normalised"]
    assert figures["legal"] is False and "val_bpb" not in process.stdout.replace(mixture.NOTICE, "")
    shown = "\n".join(lines)
    for name in ("as_published", "ppm", "network"):
        assert f"{bits[name]:.5f}" in shown
    assert f"{stage['targets']:,} tokens" in shown and "150 of these tokens" in shown and mixture.WHY in shown
    assert sorted(p.name for p in (run_folder / "run").iterdir()) == sorted(
        [
            "final_model.int6.ptz",
            "final_model.pt",
            "logs",
            "metrics.jsonl",
            "result.json",
            "steps.jsonl",
            "train_gpt.packed.py",
        ]
    ), "the run's folder is only read"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere/result.json: must be the result of a finished run"),
        (["run", "--sample", "0"], "--sample 0: must be at least 1"),
        (["run", "--sample", "1"], "--sample 1: no target carries a byte, at least one must"),  # an operator
        (["run", "--data", "elsewhere"], "elsewhere: no fineweb_val_"),
        (["empty"], "empty/final_model.int6.ptz: no such file, must be the artifact of the run"),
        ([], "the following arguments are required: RUN_DIR"),
    ],
)
def test_ppm_mixture_mistakes_are_one_line(run_folder, capsys, monkeypatch, arguments, reason):
    monkeypatch.chdir(run_folder)
    (run_folder / "empty").mkdir(exist_ok=True)
    (run_folder / "empty" / "result.json").write_bytes((run_folder / "run" / "result.json").read_bytes())
    assert mixture.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ppm_mixture.py: error: ") and reason in error and error.count("\n") == 1


def test_ppm_and_prequant_cannot_be_reached_from_the_script():
    source = SCRIPT.read_text(encoding="utf-8")
    assert not any(name in source for name in ("experiments", "ppm", "prequant_ttt", "numba"))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"ppm_mixture", "ppmd", "prequant_ttt", "numba", "experiments"} & set(loaded.split())
