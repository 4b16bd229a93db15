"""The report: what it shows of a whole run, of a dead one, of several; that the page needs nothing else."""

import dataclasses
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_tools import score_standard
from quick_run import QUICK
from test_smoke import command, make_data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import report  # noqa: E402
import runs  # noqa: E402
from reporting import figures, parts  # noqa: E402
from reporting.run import Missing, Run  # noqa: E402

SECTIONS = (
    "Scores",
    "Training",
    "Seconds and bytes",
    "Quantisation and test-time training",
    "Settings",
    "Audit",
)
VOID = {"meta", "br", "input"}


@pytest.fixture(scope="module", autouse=True)
def believed():
    """Audits of any rows: those of these tests are made by hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "follows", lambda *_: True)
        yield patch


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with data and a whole run, audited by hand."""
    work = tmp_path_factory.mktemp("report")
    make_data(work / "data")
    process = command(QUICK, work, DATA_PATH="data", ARTIFACT_DIR="run", AUDIT=1, VAL_LOSS_EVERY=3)
    assert process.returncode == 0, process.stderr
    check = {"rule": "no <script> in rules", "status": "VERIFIED", "evidence": "a & b"}
    audit = {"counts": {"VERIFIED": 1}, "checks": {"A1": check}}
    (work / "run" / "audit.json").write_text(json.dumps(audit))
    return work


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(finished) -> str:
    """The page of the whole run."""
    assert report.main([str(finished / "run"), "--out", str(finished / "out")]) == 0
    return (finished / "out" / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags that are open at the end, text by tag, and everything that a browser would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.fetched = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attributes)
        links = [values.get(name, "#") for name in ("src", "href", "xlink:href", "data")]
        self.fetched += [link for link in links if not link.startswith("#")]
        if tag in ("script", "link", "iframe", "object", "img"):
            self.fetched.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def test_losses_of_documents_are_those_of_the_stages(finished, tg):
    folder = finished / "run"
    result = json.loads((folder / "result.json").read_text())
    found = json.loads((folder / "documents.json").read_text())
    for stage, score in result["stages"].items():
        total = math.fsum(found["losses"][stage])
        assert total == pytest.approx(
            score["val_loss"] * score["targets"], abs=1e-4 * len(found["documents"])
        )
    settings = {name: str(value) for name, value in result["settings"].items()}
    cfg = tg.Config.from_env(settings | {"DATA_PATH": str(finished / "data"), "DEVICE": "cpu"})
    val = tg.load_validation(cfg)
    assert [tuple(document) for document in found["documents"]] == list(val.documents)
    stored, records = tg.read_artifact((folder / "final_model.int6.ptz").read_bytes(), tg.Config())
    model = tg.GPT(cfg)
    model.load_state_dict(tg.dequantize_state(records, stored["num_layers"]))
    losses, score = [], tg.model_score(model, looping=True)

    def recorded(*row):
        losses.append(score(*row).flatten())
        return losses[-1]

    score_standard(tg, recorded, val, cfg.val_batch_tokens // 8, cfg.eval_seq_len)
    every = torch.cat(losses).double()
    for (start, length), loss in zip(found["documents"], found["losses"]["quantised"], strict=True):
        assert float(every[start : start + length - 1].sum()) == pytest.approx(loss, abs=1e-2)


def test_page_needs_nothing_else_and_is_well_formed(whole):
    outline = Outline(whole)
    assert outline.open == [] and outline.fetched == []
    assert not re.search(r"https?:|url\((?!#)|@import", whole)
    assert [text for tag, text in outline.texts if tag == "h2"] == list(SECTIONS)
    assert "prefers-color-scheme:dark" in whole and "width=device-width" in whole


def test_nothing_is_missing_from_the_page_of_a_whole_run(whole, finished):
    assert "Missing:" not in whole
    result = json.loads((finished / "run" / "result.json").read_text())
    assert f"{result['val_bpb']:.5f}" in whole and f"{result['artifact_bytes']:,}" in whole
    assert "no &lt;script&gt; in rules" in whole and "a &amp; b" in whole
    names = {path.stem for path in (finished / "out").glob("*.png")}
    curves = {
        f"{key}_{against}" for key in ("train_loss", "lr_multiplier") for against in ("steps", "seconds")
    }
    assert names == curves | {"stages", "seconds", "bytes", "errors", "gain"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (finished / "out").glob("*.png"))
    assert whole.count("<svg") == len(names) == whole.count("aria-label=")


def test_curves_are_of_every_step_where_the_run_kept_them(run):
    """steps.jsonl agrees with the log where both tell of a step; without it the log's steps are drawn."""
    told = {e["step"]: e for e in Run(run).record.events if e["stage"] == "train"}
    steps, seconds, losses = Run(run).curve("train_loss")
    assert steps == [*range(1, Run(run).record.steps + 1)] and sorted(seconds) == seconds
    for key in ("train_loss", "grad_norm", "lr_multiplier"):
        values = dict(zip(steps, Run(run).curve(key)[2], strict=True))
        assert all(values[step] == event[key] for step, event in told.items())
    assert Run(run).curve("tokens_per_second")[0] == steps
    (run / "steps.jsonl").unlink()
    assert Run(run).curve("train_loss")[0] == [*told]


def test_a_smoothed_curve_is_of_means():
    assert figures.smoothed([1.0] * 99).tolist() == [1.0] * 99
    assert figures.smoothed([0.0, 3.0, 3.0, 6.0]).tolist() == [1.5, 2.0, 4.0, 4.5]


def test_steps_and_seconds_share_a_place(whole):
    """A switch shows one of the two, without a script; which one is on at first is said in the page."""
    switches = re.findall(r'(?s)<figure class="switch">.*?</figure>', whole)
    assert [re.findall(r'name="(\w+)"', switch)[0] for switch in switches] == ["train_loss", "lr_multiplier"]
    for switch in switches:
        assert re.findall(r"<label[^>]*>(\w+)</label>", switch) == ["steps", "seconds"]
        assert switch.count("<svg") == 2 and switch.count(" checked>") == 1
        assert len(set(re.findall(r' id="(\w+)"', switch.partition("<svg")[0]))) == 2


def test_axes_that_do_not_start_at_zero_say_so(run):
    with figures.matplotlib.rc_context(figures.STYLE):
        drawn = [figures.curve([Run(run)], "train_loss", "steps"), figures.waterfall(Run(run))]
        drawn += [figures.stages([Run(run), Run(run)])]
        for axes in (figure.axes[0] for figure in drawn):
            assert f"(axis from {axes.get_ylim()[0]:.2f})" in axes.get_ylabel()
        for key, against in (("lr_multiplier", "steps"), ("train_loss", "seconds")):
            assert figures.curve([Run(run)], key, against).axes[0].get_xlim()[0] == 0
        assert figures.curve([Run(run)], "lr_multiplier", "steps").axes[0].get_ylim()[0] == 0


def test_pictures_have_the_colours_of_the_page(whole):
    pictures = "".join(re.findall(r"(?s)<svg.*?</svg>", whole))
    fixed = [light for light, _ in figures.COLOURS.values() if light in pictures]
    assert fixed == [] and "var(--ink)" in pictures and "var(--c1)" in pictures
    for name in set(re.findall(r"var\(--(\w+)\)", whole)):
        assert whole.count(f"--{name}:") == 2, f"{name}: light and dark"


@pytest.mark.parametrize("codec", ["brotli", "lzma", "ans"])
def test_byte_groups_add_up_to_the_artifact(finished, tg, codec):
    shown = Run(finished / "run")
    cfg = tg.Config.from_env({n: str(v) for n, v in shown.record.settings.items()} | {"COMPRESSOR": codec})
    shown.__dict__["blob"] = tg.pack_artifact(shown.tensors, cfg)
    groups = shown.byte_groups
    assert sum(groups.values()) == len(shown.blob) + shown.record.code_bytes
    assert all(groups[name] > 0 for name in ("code", "embeddings", "attention", "MLP", "scales", "rest"))
    mlp = sum(r.arrays["q"].numel() for n, r in shown.tensors.items() if ".mlp." in n and r.kind == "gptq")
    attention = sum(
        r.arrays["q"].numel() for n, r in shown.tensors.items() if ".attn." in n and r.kind == "gptq"
    )
    assert groups["MLP"] / groups["attention"] == pytest.approx(mlp / attention, rel=0.2)


def test_errors_are_those_of_the_matrices(finished, tg):
    shown = Run(finished / "run")
    state = torch.load(finished / "run" / "final_model.pt", weights_only=True)
    found = {(error.layer, error.role): error.error for error in shown.matrix_errors}
    up = state["mlp_up_bank"][1].double()
    lost = (shown.tensors["blocks.1.mlp.fc.weight"].dequantize().double() - up).norm() / up.norm()
    assert found[1, "MLP up"] == pytest.approx(float(lost), rel=1e-5)
    embedding = state["tok_emb.weight"].double()
    lost = (shown.tensors["tok_emb.weight"].dequantize().double() - embedding).norm() / embedding.norm()
    assert found[None, "tok_emb"] == pytest.approx(float(lost), rel=1e-5)
    assert {layer for layer, _ in found} == {None, 0, 1, 2, 3}


def test_gain_by_length(finished):
    lengths, before, after = Run(finished / "run").gains
    result = json.loads((finished / "run" / "result.json").read_text())
    gained = result["stages"]["quantised"]["val_loss"] - result["stages"]["ttt"]["val_loss"]
    assert np.average(before - after, weights=lengths) == pytest.approx(gained, abs=1e-5)
    without = Run(finished / "run")
    del without.record.stages["ttt"]
    with pytest.raises(Missing, match="no test-time training$"):
        _ = without.gains
    at, mean = figures.octaves(np.array([5, 7, 8, 100]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert at == pytest.approx([4 * 2**0.5, 8 * 2**0.5, 64 * 2**0.5])
    assert mean == pytest.approx([(5 + 14) / 12, 3, 4])


def test_a_dead_run_is_shown_as_far_as_it_got(run, tmp_path, capsys):
    for name in ("result.json", "audit.json", "documents.json", "final_model.int6.ptz", "final_model.pt"):
        (run / name).unlink()
    events = (run / "metrics.jsonl").read_text()
    cut = events.index('"looping"') + 3  # inside a line
    (run / "metrics.jsonl").write_text(events[:cut])
    assert report.main([str(run)]) == 0
    text = (run / "report" / "report.html").read_text()
    assert "not finished: under way or dead; last event" in text and "no file final_model.int6.ptz" in text
    assert "no documents.json" in text and "no audit.json" in text and "<code>MODEL_DIM</code>" in text
    assert (run / "report" / "train_loss_steps.png").exists() and not (run / "report" / "gain.png").exists()
    (run / "metrics.jsonl").write_text("")
    assert report.main([str(run)]) == 0
    assert "nothing has been scored yet" in (run / "report" / "report.html").read_text()


def test_a_damaged_artifact_is_said_and_the_rest_shown(run):
    artifact = run / "final_model.int6.ptz"
    artifact.write_bytes(artifact.read_bytes()[:-5])
    (run / "documents.json").write_text('{"documents": [[0, 5]], "losses": {"quantised": [1.0]}}')
    shown = Run(run)
    with pytest.raises(Missing, match="truncated or corrupted"):
        _ = shown.byte_groups
    with pytest.raises(Missing, match="'ttt' is missing or damaged"):
        _ = shown.gains
    parts = "".join(report.Report([shown]).parts())
    assert parts.count("Missing:") == 3 and "training loss against steps" in parts


def test_several_runs_and_logs_on_one_page(run, finished, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "a<b>&c"))
    result = json.loads((other / "result.json").read_text())
    result["settings"]["MATRIX_LR"] = 0.5
    (other / "result.json").write_text(json.dumps(result))
    log = next((finished / "run" / "logs").glob("*.txt"))
    alone = tmp_path / "alone.txt"
    shutil.copy(log, alone)
    shown = [Run(path) for path in (run, other, alone)]
    text = parts.ranking(shown)
    assert "a&lt;b&gt;&amp;c" in text and "<b>&c" not in text and "var(--c3)" in text
    with figures.matplotlib.rc_context(figures.STYLE):
        drawn, through = figures.curve(shown, "train_loss", "steps"), figures.stages(shown)
    scores = result["stages"]
    assert [tick.get_text() for tick in through.axes[0].get_xticklabels()] == ["trained", "quantised", "TTT"]
    for line in through.axes[0].get_lines():
        wanted = [scores[stage]["val_bpb"] for stage in ("prequant", "quantised", "ttt")]
        assert list(line.get_ydata()) == pytest.approx(wanted, rel=1e-5)
    assert [line.get_label() for line in drawn.axes[0].get_lines()][::2] == ["run", "a<b>&c", "alone"]


MISTAKES = {
    "nowhere": "nowhere: ",
    ".": "not the folder of a run",
    "a b c d e f g h i": "9 runs: at most 8",
    "--out x": "the following arguments are required: RUN_DIR",
}


@pytest.mark.parametrize("arguments, reason", MISTAKES.items())
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("report.py: error: ") and error.count("\n") == 1 and reason in error
    assert list(tmp_path.iterdir()) == []


def test_the_head_says_what_ran_and_what_the_score_is_worth(run):
    shown = parts.headline(Run(run))
    assert "bits per byte" in shown and "not audited: python tools/audit.py" in shown
    assert "Not the contest&#x27;s validation set: " in shown
    audit = {"counts": {}, "checks": {}, "verdict": "FAIL", "headline": "FAIL: E1 <broken>"}
    (run / "audit.json").write_text(json.dumps(audit))
    assert '<p class="bad">FAIL: E1 &lt;broken&gt;</p>' in parts.headline(Run(run))
    assert parts.title(Run(run)) == "PRESET=pr1851, seed 42 (run)"
    table = parts.overview([Run(run)])
    record = Run(run).record
    for name, value in (("script", record.script_sha256), ("data", record.data_sha256)):
        assert f"{name}, SHA-256" in table and value[:12] in table
    assert all(f"<td>{name}</td>" in table for name in ("parameters", "commit", "ended"))


def test_the_score_is_said_with_its_meaning(run):
    """A byte is 8 bits: what an ideal coder would leave of the text."""
    shown = Run(run)
    score = shown.record.val_bpb
    said = parts.score(shown)
    assert f"<b>{score:.5f}</b>" in said and f"{100 * score / 8:.1f}% of its size. Lower is better." in said
    assert "which learns from each part of a document once that is scored" in said
    shown.record = dataclasses.replace(shown.record, final_stage="quantised")
    assert "learns" not in parts.score(shown)


def with_score(run: Path, name: str, change: float) -> Path:
    """A copy of a run with another score; of its log, which tells of the former one, nothing is left."""
    other = Path(shutil.copytree(run, run.parent / name))
    shutil.rmtree(other / "logs")
    result = json.loads((other / "result.json").read_text())
    result["stages"][result["final_stage"]]["val_bpb"] += change
    result["val_bpb"] += change
    (other / "result.json").write_text(json.dumps(result))
    return other


def test_runs_are_compared_in_the_order_of_their_scores(run, tmp_path, capsys):
    """Wherever they stand in the command, and each once; one that has no score comes last."""
    worse, better, dead = (
        with_score(run, *pair) for pair in (("worse", 0.25), ("better", -0.25), ("dead", 0))
    )
    (dead / "result.json").unlink()
    assert report.main([*map(str, (run, dead, worse, better, run)), "--out", str(tmp_path / "out")]) == 0
    page = tmp_path / "out/report.html"
    assert capsys.readouterr().out.startswith(f"Open {page} in a browser; ")
    text = page.read_text(encoding="utf-8")
    assert "<h1>4 runs: the best is better</h1>" in text
    rows = re.search(r'(?s)<div class="box ranking">.*?</table>', text)[0].split("<tr>")[2:]
    names = [re.search(r"<td>\d\. <span[^>]*></span>([\w-]+)</td>", row)[1] for row in rows]
    behind = [re.findall(r'<td class="n">([^<]*)</td>', row)[1] for row in rows]
    assert names == ["better", "run", "worse", "dead"] and behind == ["-", "+0.25000", "+0.50000", "-"]


def test_scores_of_other_text_are_not_subtracted(run):
    other = with_score(run, "other", 0.25)
    shown = [Run(run), Run(other)]
    assert "+0.25000" in parts.head(shown) and "the best is run" in parts.head(shown)
    result = json.loads((other / "result.json").read_text())
    result["stages"][result["final_stage"]]["bytes"] += 1
    (other / "result.json").write_text(json.dumps(result))
    said = parts.head([Run(run), Run(other)])
    assert "other text" in said and "+0.25000" not in said and "scores are of different texts" in said


PRESETS = {
    "pr1851": {"SEED": 42, "MUON_WD": 0.1, "EMA_DECAY": 0.5},
    "b": {"SEED": 42, "MUON_WD": 0.2, "EMA_DECAY": 0.5},
}


@pytest.mark.parametrize(
    ("settings", "shown", "folded"),
    [
        ([{"PRESET": "b", "MUON_WD": 0.2, "EMA_DECAY": 0.9}], ["EMA_DECAY"], ["MUON_WD"]),
        ([{"PRESET": "b", "MUON_WD": 0.2, "EMA_DECAY": 0.5}], [], ["MUON_WD"]),
        ([{"MUON_WD": 0.2}], ["MUON_WD"], []),
        ([{"PRESET": "b", "MUON_WD": 0.2}, {"PRESET": "pr1851", "MUON_WD": 0.1}], ["MUON_WD"], []),
    ],
)
def test_settings_are_compared_with_those_of_the_preset(run, settings, shown, folded):
    """Else a reader would look for the two that were changed among the many that make up the preset."""
    runs = [Run(run) for _ in settings]
    for one, told in zip(runs, settings, strict=True):
        one.record = dataclasses.replace(one.record, seed=42, settings=told)
    text = parts.settings_table(runs, PRESETS)
    before, _, behind = text.partition("<details>")
    assert [re.findall(r"<code>(\w+)</code>", part) for part in (before, behind)] == [shown, folded]
    kept = re.search(r"All (other )?settings are those of PRESET=b", text)
    assert bool(kept) == (shown == [] or len(runs) > 1)


def test_a_short_run_stays_within_the_axis(run, tmp_path):
    short = Path(shutil.copytree(run, tmp_path / "short"))
    events = [json.loads(line) for line in (short / "metrics.jsonl").read_text().splitlines()]
    few = [e for e in events if e["stage"] != "train" or e["step"] <= 2]
    few = [e | {"train_loss": 50.0} if e["stage"] == "train" else e for e in few]
    (short / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in few))
    (short / "steps.jsonl").unlink()
    low, high = figures.later_losses([Run(run), Run(short)])
    assert low < 10 and high > 50
