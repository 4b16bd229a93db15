"""Logs of the contest: what each says, what launchers do to them, and mixtures that are refused."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import runs  # noqa: E402
from logbook import families, ours  # noqa: E402

# By grep, `-` where a log says nothing: seed, steps; stage, val_bpb and val_loss of the last score; bytes of
# artifact and code; milliseconds of training, seconds of calibration, milliseconds of the last evaluation.
PUBLISHED = """
march_parallel_seed1337   1337 6242 sliding 1.10658225 1.86841284 15942395 93853 600085 - 88541
march_sliding_first       1337 13450 sliding 1.19250007 2.01348383 15874829 58340 600028 - 69881
march_xsa4_first          2025 7051 sliding 1.12484502 1.89924867 15612308 67617 599986 - 72659
pr1218_seed1337           1337 5962 sliding 1.09794973 2.52641240 15905460 68246 590009 8.2 65201
pr1285_seed0              0 5535 sliding 1.09084142 2.50973163 15962242 21396 590081 9.7 75826
pr1334_seed314            314 5449 sliding 1.08982552 2.50771838 15992752 24584 590088 9.7 76573
pr1394_seed1              1 4988 sliding 1.08553523 2.80405024 15987547 15516 588138 11.3 83990
pr1412_first              1337 5178 sliding 1.08300961 2.79749368 16054963 78688 588103 11.3 82837
pr1413_seed0              0 5082 ttt 1.08209788 2.79517119 15991018 16719 588035 11.3 293430
pr1477_seed314            314 5069 ttt 1.08222600 2.79550216 15990916 17347 588023 11.4 297922
pr1493_seed314            314 4557 ttt 1.08103103 2.79241542 15992919 16594 588119 12.7 368074
pr1493_seed42             42 4550 ttt 1.08079352 2.79180191 15991930 16630 588047 12.7 366525
pr1493_seed999            999 4555 ttt 1.08118408 2.79281076 15993232 16594 588014 12.7 318003
pr1514_seed0              0 4911 ttt 1.07928348 2.78790132 15993346 19387 588052 12.8 341841
pr1530_train0             0 4867 ttt 1.07258208 2.77059090 15996664 27310 587193 12.6 338190
pr1610_train0             0 4832 ttt 1.07216564 2.76951521 15996697 28599 587091 12.7 500104
pr1626_seed0              0 4967 ttt 1.07134229 2.76738841 15939841 27610 596103 3.4 332086
pr1667_seed0              0 4836 ttt 1.07139175 2.76751616 15934411 27555 587101 12.8 234066
pr1667_seed1337           1337 4843 ttt 1.07057187 2.76539833 15939048 27555 587083 12.9 237699
pr1667_seed42             42 4843 ttt 1.07220821 2.76962517 15936229 27555 587060 12.8 228818
pr1729_seed0              1337 4921 ttt 1.06805820 2.33730724 15932307 28320 596107 3.4 488803
pr1736_seed0              0 4843 ttt 1.06473025 2.33002446 15971476 28025 596169 3.4 399334
pr1769_seed1              1 4869 ttt 1.06509678 2.33082656 15979182 28025 596056 3.4 391198
pr1787_seed0              0 4957 ttt 1.06353012 2.32739812 15939508 30305 599556 3.5 440857
pr1787_ttt_pr1767_seed_42 42 - ttt 1.06400238 2.32843161 - - - - 525719
pr1851_seed42             42 4900 ttt 1.06128183 2.32247803 15952086 31250 599623 3.5 519546
pr1855_seed0              0 4932 ttt 1.06124613 2.32239991 15900947 31999 599433 4.9 455128
pr1855_seed1234           1234 4917 ttt 1.06208695 2.32423994 15907550 31999 599544 4.6 470022
pr1855_seed42             42 4945 ttt 1.05989454 2.31944212 15897259 31999 599592 4.7 508785
pr1868_rerun_seed1234     1234 4902 ttt 1.06248776 2.32511706 15951968 31385 592065 3.5 481177
pr1868_rerun_seed314      314 4921 ttt 1.06090748 2.32165882 15951777 31385 592045 3.8 429520
pr1868_rerun_seed42       42 4942 ttt 1.06083288 2.32149556 15949701 31385 592054 3.5 525512
pr1868_seed1234           1234 4958 ttt 1.06220261 2.32449303 15952690 31250 599544 3.5 479589
pr1868_seed314            314 4960 ttt 1.06086831 2.32157310 15952419 31250 599613 3.5 525621
"""
ROWS = {name: tuple(figures) for name, *figures in map(str.split, PUBLISHED.strip().splitlines())}
NOTICED = {
    "pr1218_seed1337": "its seed, 1337, is told by its name only",
    "pr1729_seed0": "its name says seed 0, its run had 1337",
}


def milliseconds(seconds: float | None) -> int | None:
    """As logs say them."""
    return None if seconds is None else round(1000 * seconds)


@pytest.mark.parametrize("name", ROWS)
def test_what_a_published_log_says(published_logs, name):
    record = runs.read(published_logs / f"{name}.log")
    told = [record.seed, record.steps, record.final_stage, f"{record.val_bpb:.8f}", f"{record.val_loss:.8f}"]
    told += [record.artifact_bytes, record.code_bytes, milliseconds(record.train_seconds)]
    told += [record.calibrate_seconds, milliseconds(record.eval_seconds)]
    assert tuple("-" if figure is None else str(figure) for figure in told) == ROWS[name]
    assert list(record.notices) == [*filter(None, [NOTICED.get(name)])]


def test_every_published_log_has_its_row(published_logs):
    assert {path.stem for path in published_logs.glob("*.log")} == ROWS.keys()


# -- invented logs


APRIL = """nohup: ignoring input
Hyperparameters:
  seed: {seed}
  sliding_window_enabled: False
  ttt_enabled: True
train_shards: 80
val_tokens: 40540160
1/20000 train_loss: 9.0080 train_time: 0.0m tok/s: 8200000
2/20000 train_loss: 8.5010 train_time: 0.0m tok/s: 8200000
500/20000 train_loss: 3.2{seed:03} train_time: 0.8m tok/s: 8150000
1000/20000 train_loss: 3.0{seed:03} train_time: 1.6m tok/s: 8150000
1{seed:03}/20000 val_loss: 2.8{seed:03} val_bpb: 1.1{seed:03}
stopping_early: wallclock_cap train_time: 590{seed:03}ms step: 1{seed:03}/20000
diagnostic pre-quantization post-ema val_loss:2.33{seed:03}000 val_bpb:1.06{seed:03}000 eval_time:7000ms
Code size (uncompressed): 150000 bytes
Code size (compressed): 31000 bytes
GPTQ:collected 67 Hessians in 3.5s
Serialized model quantized+brotli: 15919{seed:03} bytes
Total submission size quantized+brotli: 15950{seed:03} bytes
diagnostic quantized val_loss:2.35{seed:03}000 val_bpb:1.07{seed:03}000 eval_time:11000ms
ttp: b782/782 bl:2.3{seed:03} bb:1.06
quantized_ttt_phased val_loss:2.32{seed:03}000 val_bpb:1.05{seed:03}000 eval_time:480{seed:03}ms
total_eval_time:480.{tenths}s
"""
MARCH = """val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./fineweb_1024_bpe.model
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./fineweb_val_*.bin tokens:62021632
world_size:8 grad_accum_steps:1
seed:{seed}
step:1/9000 train_loss:6.9287 train_time:147ms step_avg:146.68ms
step:7{seed:03}/9000 val_loss:1.9300 val_bpb:1.1430 train_time:600021ms step_avg:85.7ms
stopping_early: wallclock_cap train_time:600021ms step:7{seed:03}/9000
Code size: 60000 bytes
Serialized model int6+zstd: 15474645 bytes
Total submission size int6+zstd: 15534645 bytes
"""
INT6 = """final_int6_roundtrip val_loss:1.9400 val_bpb:1.1490 eval_time:5637ms
final_int6_roundtrip_exact val_loss:1.94000000 val_bpb:1.14900000
final_int6_sliding_window val_loss:1.9030 val_bpb:1.1270 stride:64 eval_time:69809ms
final_int6_sliding_window_exact val_loss:1.90300000 val_bpb:1.12700000
"""
ECHO = "final_int8_zlib_roundtrip_exact val_loss:1.90300000 val_bpb:1.12700000\n"
SLIDING = "final_sliding_window_exact val_loss:1.96976839 val_bpb:1.16660000\n"
INT8 = """final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""


def april(seed: int) -> str:
    """A log of April of which every figure holds the seed."""
    return APRIL.format(seed=seed, tenths=round(seed / 100))


def march(end: str, seed: int = 1) -> str:
    """A log of March."""
    return MARCH.format(seed=seed) + end


@pytest.fixture
def read(tmp_path):
    """Function: text, name -> record of a log."""

    def read(text, name="one.log"):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        return runs.read(tmp_path / name)

    return read


@pytest.mark.parametrize(
    "end, wanted",
    [
        (INT6, ("sliding", 1.127, 69.809)),
        (INT6 + ECHO, ("sliding", 1.127, 69.809)),
        (f"{INT6}legal_ttt_exact val_loss:1.89000000 val_bpb:1.11900000\n", ("ttt", 1.119, None)),
        (INT8, ("quantised", 1.2243657, 1.401)),
        (f"final_eval_mode:sliding_window stride:64 batch_seqs:32\n{INT8}", ("sliding", 1.2243657, 1.401)),
        (f"{INT8}final_ttt_lora val_loss:2.0153 val_bpb:1.1935 eval_time:72361ms\n", ("ttt", 1.1935, 72.361)),
        (INT8 + SLIDING, ("sliding", 1.1666, None)),
        (INT8.replace("1401ms", "1401ms eval_seq_len:2048"), ("quantised", 1.2243657, 1.401)),
        (
            f"{INT8}final_int8_zlib_roundtrip_exact sliding val_loss:2.02124749 sliding val_bpb:1.19709881\n",
            ("sliding", 1.19709881, None),
        ),
        (
            "".join(INT6.splitlines(keepends=True)[:2])
            + "final_sliding_window_eval_exact stride:64 val_loss:1.95823653 val_bpb:1.15977898\n",
            ("sliding", 1.15977898, None),
        ),
        (
            "final_ternary_roundtrip val_loss:3.0604 val_bpb:1.1850\n"
            "final_sliding val_loss:2.9901 val_bpb:1.1578 (stride=16, T=0.90) eval_time:429023ms\n",
            ("sliding", 1.1578, 429.023),
        ),
    ],
)  # fmt: skip
def test_what_is_final_in_logs_of_march(read, end, wanted):
    record = read(march(end))
    assert (record.final_stage, record.val_bpb, record.eval_seconds) == wanted
    assert (record.seed, record.steps, record.artifact_bytes) == (1, 7001, 15_534_645)
    assert "whether another evaluation followed" in record.missing and record.settings["WORLD_SIZE"] == 8


def test_an_adaptation_that_makes_it_worse_is_the_last_score_with_a_notice(read):
    ends = [
        "pre-quantization post-ema",
        "final_int6_roundtrip",
        "final_int6_sliding_window",
        "final_int6_ttt",
    ]
    scores = zip(ends, ("1.09653652", "1.10799265", "1.08938974", "1.33603200"), strict=True)
    record = read(
        march("".join(f"{name} val_loss:2.5 val_bpb:{bpb} eval_time:9ms\n" for name, bpb in scores))
    )
    assert record.final_stage == "ttt" and record.val_bpb == 1.336032
    assert record.notices == ("its last score, 1.33603 of ttt, is worse than 1.08939 of sliding",)


def test_a_log_that_ends_within_an_adaptation_is_cut_off(read):
    with pytest.raises(runs.ReadError, match="cut off, without the score of ttt"):
        read(march(INT6 + "  ttt_chunk [1/9] bpb=1.342801 time=0.5s\n"))


def test_a_run_that_only_scored(read):
    lines = april(3).splitlines(keepends=True)
    record = read("".join([*lines[:7], "TTT_EVAL_ONLY=1 - skipping training\n", *lines[-3:]]))
    assert record.val_bpb == 1.05003 and record.legal is None
    assert {"training seconds", "artifact bytes", "steps"} <= set(record.missing)


# -- what is done to logs


@pytest.mark.parametrize(
    "prefix",
    [
        "[default0]:", "[trainer3]:", "[rank0]: ", "0: ", "  0: ", "[1,0]<stdout>:", "1776142719.307 ",
        "12:00:01 ", "2026-04-19T01:16:29+00:00 ", "[2026-04-19 01:16:29,307] ", "[12:00:01]",
        "12:00:01 [default0]:",
    ],
)  # fmt: skip
@pytest.mark.parametrize("log", [april(7), march(INT6)], ids=["april", "march"])
def test_prefixes_are_taken_off(read, log, prefix):
    plain, told = read(log), read("".join(prefix + line for line in log.splitlines(keepends=True)))
    assert told == plain and told.events == plain.events and told.settings


def test_ends_colours_and_repeats_of_lines(read):
    plain, lines = read(april(7)), april(7).splitlines()
    assert read("\r\n".join(lines)) == plain  # nor does the last line need an end
    assert read("".join(f"\x1b[32m{line}\x1b[0m\r\n" for line in lines)) == plain
    assert read("".join(f"{line}  \n" for line in lines)) == plain
    assert read("".join(f"  5%|#   | 1/20\r{line}\n" for line in lines)) == plain
    twice = read("".join(f"{line}\n{line}\n" for line in lines))
    assert twice.notices == ("every line stands there 2 times",) and twice.stages == plain.stages


def test_a_foreign_line_anywhere_changes_nothing(read):
    lines, plain = april(7).splitlines(keepends=True), read(april(7))
    for place in range(len(lines)):
        for foreign in (
            "W0427 10:00:00.1 99 x.py:1] [3/8] a warning of another rank\n",
            "\n",
            "Error: 1.06\n",
        ):
            assert read("".join([*lines[:place], foreign, *lines[place:]])) == plain, place


def figures(record: runs.RunRecord) -> tuple:
    """What must be of one run."""
    stages = json.dumps(record.stages)
    return record.seed, record.steps, stages, record.artifact_bytes, record.train_seconds, record.eval_seconds


def mixtures(rng: random.Random) -> list[str]:
    """Two runs cut off, in turn, one dead before or behind the other; lines of one in the other."""
    one, other = (april(seed).splitlines(keepends=True) for seed in (7, 214))
    dead, place = rng.randrange(len(one)), rng.randrange(len(other))
    queues, merged, width = [[*one], [*other]], [], rng.choice((1, 3, 9))
    while any(queues):
        queue = rng.choice([queue for queue in queues if queue])
        merged += queue[:width]
        del queue[:width]
    inserted = [*other[:place], one[dead], *other[place:]]
    return ["".join(lines) for lines in (merged, inserted, one[:dead] + other, other + one[:dead])]


def test_mixtures_are_refused_or_have_the_numbers_of_one(read):
    rng, true = random.Random(0), [figures(read(april(seed))) for seed in (7, 214)]
    kept = 0
    for text in (text for _ in range(60) for text in mixtures(rng)):
        try:
            assert figures(read(text)) in true, text
            kept += 1
        except runs.ReadError as error:
            assert "\n" not in str(error)
    assert kept > 20


@pytest.mark.parametrize("log", [april(7), march(INT6)], ids=["april", "march"])
def test_no_beginning_of_a_log_tells_an_earlier_score(read, log):
    true = read(log).val_bpb
    for size in range(0, len(log), 3):
        try:
            assert read(log[:size]).val_bpb == true
        except runs.ReadError as error:
            assert re.search("empty|cut off|neither", str(error)), error


DIED = "torch.OutOfMemoryError: CUDA out of memory\n"
DEAD = april(7)[: april(7).index("stopping_early")]
STEPLESS = re.sub(r"(?m)^\d+/.*\n", "", april(214))


@pytest.mark.parametrize(
    "text, line",
    [
        (april(7) + april(214), 25),
        (DEAD + april(214), 14),
        (DEAD + DIED + STEPLESS, 15),
        (april(214) + DEAD, 1),
    ],
)
def test_of_several_runs_the_last_whole_one_is_read(read, text, line):
    record = read(text)
    assert record.seed == 214 and record.val_bpb == 1.05214 and record.settings["TTT_ENABLED"] is True
    assert record.notices == (f"holds 2 runs; read is the last whole one, from line {line}",)


SOURCE = 'import os\nlog0(f"final_sliding_window val_loss:{v:.4f} val_bpb:{b:.4f}")\n' + "=" * 100 + "\n"


def but(old: str, new: str) -> str:
    """A log of April with another text somewhere."""
    assert old in april(7)
    return april(7).replace(old, new)


@pytest.mark.parametrize(
    "text, wanted",
    [
        (DEAD + STEPLESS, "that of line 1 had not ended when the next began"),
        (april(7) + april(214).partition("quantized_ttt")[0], "that of line 25 is not whole: cut off"),
        (april(7) + april(214).splitlines()[-2], "says quantized_ttt_phased twice"),
        (april(7) + "Total submission size int6+lzma: 15950214 bytes\n", "says artifact bytes twice"),
        (but("  ttt_enabled", "  seed: 214\n  ttt_enabled"), "says seed twice, 7 and 214"),
        (but("1000/20000 tr", "400/20000 tr"), "says step 400 after step 500"),
        (but("brotli: 15919", "brotli: 15918"), "says the bytes of the artifact twice, 15950007 and"),
        (but("time:480.0s", "time:481.0s"), "says the time of evaluation twice, 481.0 s and 480007 ms"),
        (but("total_eval_time:480.0s\n", ""), "cut off, without total_eval_time"),
        (but("  ttt_enabled: True\n", ""), "a score of ttt without TTT_ENABLED"),
        (but("1.05007000", "nan"), "its score quantized_ttt_phased is 2.32007000 nats, nan bits"),
        (but("  seed: 7", "  seed: x"), "its seed is 'x', no number"),
        (april(7) + "final_ngram val_loss:1.9 val_bpb:0.71\n", "not known: 'final_ngram val_loss:1.9"),
        (but("quantized_ttt_phased", "post_ttt"), "that is not known: 'post_ttt val_loss"),
        (march("final_INT7_zlib_roundtrip val_loss:2.0784 val_bpb:1.2353\n"), "is of no known system"),
        (march(INT8 + INT6), "says final_int6_roundtrip after the score of quantised"),
        (march("".join(INT6.splitlines(keepends=True)[:3])), "all digits of final_int6_sliding_window"),
        (march(f"{INT6}ttt_sliding:start chunks=1893\n"), "cut off, without the score of ttt"),
        (SOURCE + march(INT8), "its script prints final_sliding_window too"),
        (march(""), "cut off, without a final score; its last line is 'Total submission"),
    ],
)
def test_what_no_single_whole_run_says_is_refused(read, text, wanted):
    with pytest.raises(runs.ReadError, match=re.escape(wanted)) as error:
        read(text)
    assert "one.log: " in str(error.value) and "\n" not in str(error.value)


def test_summaries_and_warnings_behind_the_score_do_no_harm(read):
    after = "---\nval_bpb:          1.05007000\n[rank0]: NCCL WARN\nTraceback (most recent call last):\n"
    assert read(april(7) + after) == read(april(7))


def test_the_seed_in_a_name(read):
    assert read(april(7), "train_seed7.log").notices == ()
    assert read(april(7), "train_seed-42.log").notices == ("its name says seed 42, its run had 7",)


def test_no_row_hides_another():
    """A log with all scores of a family is of that one."""
    for row in families.FAMILIES:
        first = next(other for other in families.FAMILIES if row.scores.keys() <= other.scores.keys())
        assert first is row and {*row.needs} <= {*row.scores.values()}, row.form


def test_digits_without_end(read):
    for text in (
        but("1000/20000 tr", f"{'9' * 5000}/20000 tr"),
        but("500/20000 train_loss: 3", "500/20000 train_loss: 3.1.3"),
    ):
        try:
            assert read(text).val_bpb == 1.05007
        except runs.ReadError as error:
            assert "\n" not in str(error)


def test_a_folder_of_logs_and_a_score_that_is_no_number(tmp_path):
    (tmp_path / "a.log").write_text(april(7))
    with pytest.raises(runs.ReadError, match="no run's folder, without result.json; name its logs"):
        runs.read(tmp_path)
    result = json.loads((ROOT / "logs" / "demo_seed42_cpu.json").read_text())
    result["stages"]["ttt"]["val_bpb"] = float("nan")
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(runs.ReadError, match="its score val_bpb of ttt is nan"):
        runs.read(tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "line", ["start run:a folder:runs/a b python:3.11.7 torch:2", "Run a, folder runs/a b\nOn a CPU"]
)
def test_what_a_console_showed_names_its_log(line, end):
    """In both forms of CONSOLE, and as `script` captures it."""
    assert ours.console(f"Running\n{line}\n".replace("\n", end)) == "runs/a b/logs/a.txt"
    assert ours.console("Running\n") == ""
