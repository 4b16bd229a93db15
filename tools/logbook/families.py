"""What the systems of the contest print. A log of another system is one more row of FAMILIES.

Patterns are of whole lines. A score line is `NAME val_loss:L val_bpb:B`, with `eval_time:Tms` or eight
decimals; its name says the stage. NAME_exact is NAME with more digits.
"""

from dataclasses import dataclass

STAGES = ("prequant", "quantised", "sliding", "ttt")  # in the order in which a run scores them


@dataclass(frozen=True)
class Family:
    """Systems whose logs end alike."""

    form: str  # what `RunRecord.form` says
    scores: dict[str, str]  # names of their score lines -> stages
    needs: tuple[str, ...]  # stages that each run of them scores
    end: str = ""  # the line after the last score
    switched: bool = False  # whether their settings say which stages are scored (SWITCHES)


FULL = {"pre-quantization post-ema": "prequant"}
PLAIN = FULL | {"quantized": "quantised"}
SLIDING = PLAIN | {"quantized_sliding_window": "sliding"}
INT6 = {"final_int6_roundtrip": "quantised", "final_int6_sliding_window": "sliding"}
INT8 = {"final_int8_zlib_roundtrip": "quantised"}
BASIC = ("prequant", "quantised")
DECIMAL = r"\d+(?:\.\d+)?"
TOTAL = rf"total_eval_time:({DECIMAL})s"

# A log is of the first row that has all names of its scores and needs no other stages.
FAMILIES = (
    Family("pr1394 log", SLIDING, (*BASIC, "sliding"), switched=True),
    Family("pr1413 log", SLIDING | {"legal_ttt": "ttt"}, (*BASIC, "ttt"), switched=True),
    Family("pr1493 log", SLIDING | {"quantized_ttt": "ttt"}, (*BASIC, "ttt"), switched=True),
    Family("pr1667 log", PLAIN | {"quantized_ttt_lora": "ttt"}, (*BASIC, "ttt"), TOTAL, switched=True),
    Family("pr1851 log", PLAIN | {"quantized_ttt_phased": "ttt"}, (*BASIC, "ttt"), TOTAL, switched=True),
    Family("pr1218 log", FULL | INT6 | {"final_int6_ttt": "ttt"}, (*BASIC, "sliding"), switched=True),
    Family(
        "march int6 log",
        {"DIAGNOSTIC post_ema": "prequant"} | INT6 | INT8 | {"legal_ttt": "ttt"},
        ("quantised", "sliding"),
    ),
    Family(
        "march log",
        INT8
        | {"final_int8_zlib_roundtrip sliding": "sliding", "final_sliding_window": "sliding"}
        | {"final_ttt_lora": "ttt", "final_int8_ttt_lora": "ttt"},
        (),
    ),
    Family(
        "march mixed log",
        {"final_int6_roundtrip": "quantised", "final_sliding_window_eval": "sliding"},
        ("quantised", "sliding"),
    ),
    Family(
        "ternary log",
        {f"final_{kind}_roundtrip": "quantised" for kind in ("ternary", "binary", "xnor")}
        | {"final_roundtrip": "quantised", "final_sliding": "sliding"},
        ("quantised", "sliding"),
    ),
)
STAGE_OF = {name: stage for family in FAMILIES for name, stage in family.scores.items()}

# In some logs of March the name of the int8 score does not say how it was come by; another line does.
SAID_OTHERWISE = {
    r"final_eval_mode:sliding_window.*|.*starting sliding window eval.*": "sliding",
    r".* eval_mode:online_ttt .*": "ttt",
}
ADAPTS = r" *(?:ttt_sliding:start|ttt_chunk |ttp: |ttt_progress: |beginning TTT).*"  # a score must follow
SWITCHES = {"TTT_ENABLED": "ttt", "SLIDING_WINDOW_ENABLED": "sliding"}
ONLY_SCORES = r"TTT_EVAL_ONLY=1.*"  # an artifact of another run

NUMBER = r"-?(?:\d+\.\d+|nan|inf)"
SCORE = (
    rf"(?:diagnostic )?([A-Za-z][\w -]*?)(?: stride:\d+)? val_loss:({NUMBER})"
    rf"(?: sliding)? val_bpb:({NUMBER})((?: \w+:\S+| \([^)]*\)| T=[\d.]+)*)"
)
# All other final scores have eight; those of a roundtrip have no time here.
FOUR_DECIMALS = r"final(?:_int8)?_ttt_lora|final_sliding|final_(?:(?:ternary|binary|xnor)_)?roundtrip"
ANY_SCORE = rf".*(?i:bpb)\W{{0,3}}\s*({NUMBER})\b.*"
SCORE_IN_SOURCE = r"f[\"']([\w -]+?)(?: stride:\{[^}]*\})? val_loss:\{"  # what a script can print
ADAPTED = (
    rf"ttt_sliding:done val_loss=({DECIMAL}) val_bpb=({DECIMAL}) elapsed=.*"  # before the line of that score
)

# Each line stands once in the beginning of a run; where it comes again, another run begins.
BEGINNING = {
    "python": r"(?:Running )?Python (\d+\.\d+\.\d+)\b.*",
    "torch": r"(?:Running )?PyTorch (\d+\.\d+\S*)",
    "settings": r"(Hyperparameters:|--- Hyperparameters ---)",
    "scorer": r"(val_bpb:enabled) .*",
    "train_shards": r"(?:train_shards: |train_loader:.* train_shards:)(\d+)",
    "targets": r"(?:val_tokens: |val_loader:.* tokens:)(\d+)",
    "parameters": r"(?:model_params:|params:)(\d+).*",
    "ranks": r"world_size:(\d+) .*",
    "seed": r"seed:(\d+)",
}
# Each stands once, later.
FIGURES = {
    "train": r"stopping_early: .*train_time: ?(\d+)ms.*",
    "steps": r"stopping_early: .*step: ?(\d+)/\d+",
    "artifact bytes": r"Total submission size \S+\+\S+: (\d+) bytes|budget:(\d+)/16000000 .*",
    "model bytes": r"Serialized model \S+\+\S+: (\d+) bytes.*",
    "code bytes": r"Code size(?: \(compressed\))?: (\d+) bytes|artifact:.* code:(\d+)",
    "source bytes": r"Code size(?: \(uncompressed\))?: (\d+) bytes",
    "calibrate": rf"GPTQ:collected \d+ Hessians in ({DECIMAL})s|gptq:calibrated \d+ layers in ({DECIMAL})s",
    "quantise": rf"GPTQ:quantized in ({DECIMAL})s",
    "compress": rf"GPTQ:compressed\+saved in ({DECIMAL})s",
}
CALIBRATES = r"(?i:gptq).*"
STEP = (
    rf"(?:step:)?(\d+)/\d+(?: \[[^\]]*\])? (?:train_)?loss: ?({DECIMAL})(?: .*?)??"
    rf"(?: (?:train_time|t): ?({DECIMAL})(ms|m)\b.*)?"
)
VALIDATION = rf"(?:step:)?(\d+)/(\d+) val_loss: ?({DECIMAL}) val_bpb: ?({DECIMAL})(?: train_time:.*)?"
LATER = (STEP, VALIDATION, SCORE, *FIGURES.values())  # what comes after the beginning

# Settings: a block of lines, one line of pairs, or some pairs among the lines of the beginning.
SETTING = r"  (\w+):(.*)"
PAIRS = r"\w+=\S*(?: \w+=\S*){9,}"
TOLD = r"(?:world_size|attention_mode|tie_embeddings|train_batch_tokens|seed):.*"
RULE = r"={80,}"
DIED = r"(?:[\w.]*(?:Error|Exception|Interrupt)\b|Traceback|Killed|Terminated|.*exitcode|.*[Ss]ignal \d).*"
