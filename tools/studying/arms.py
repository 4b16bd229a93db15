"""The arms of a study: what each changes of the control, where the idea is from, what it needs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

KINDS = ("screen", "confirm")
CONTROL = "control"
OURS = ("SEED", "RUN_ID", "ARTIFACT_DIR", "DATA_PATH")  # each run has its own
LONGEST_NAME = 80  # of an arm: letters; it is a folder's name too
OTHER_BATCHES = "other batches"  # the control on the next seed's stream: what chance does


class Arm(NamedTuple):
    """Settings that differ from the control's."""

    name: str
    settings: Mapping[str, str]
    source: str = ""
    start: str = ""  # "model" or "artifact": go on from the control's of the same seed, to save its making
    data: str = ""  # another form of the same documents: "fused"

    @property
    def folder(self) -> str:
        """The name of the folder of its runs."""
        return re.sub(r"\W+", "-", self.name)


def _arm(name: str, text: str, source: str, start: str = "", data: str = "") -> Arm:
    return Arm(name, dict(pair.split("=", 1) for pair in text.split()), source, start, data)


NOISE = (Arm("null", {}, "the control once more"), Arm(OTHER_BATCHES, {}, "the control on other documents"))
TRAINING = (  # what past systems of the lineage and of its neighbours do otherwise
    _arm("fused markers", "", "PR #2109", data="fused"),
    _arm("four momenta", "MUON_MAXWELL=1", "modded-nanogpt #357"),
    _arm("MUDD", "MUDD_WIDTH=32", "modded-nanogpt #259"),
    _arm("hyperparameters of pr1855", "WARMDOWN_FRAC=0.85 BETA2=0.99", "PR #1855"),
    _arm("beta2 0.997", "BETA2=0.997", "BETA2=0.997"),
    _arm("softcap 20", "LOGIT_SOFTCAP=20", "LOGIT_SOFTCAP=20"),
    _arm("rate 0.028", "MATRIX_LR=0.028", "PR #1925"),
    _arm("query gain 5.25", "QK_GAIN_INIT=5.25", "PR #1953"),
    _arm("decay that tapers", "WD_TAPER_FINAL_MULT=0.5", "PR #1729"),
)
STORING = (  # at equal bytes: --bytes
    _arm("trellis", "QUANTIZER=trellis COMPRESSOR=ans", "BEYOND 1", "model"),
    _arm("trellis in order", "QUANTIZER=trellis COMPRESSOR=ans GPTQ_DRIFT_BATCHES=4", "2505.11695", "model"),
)
ADAPTING = (
    _arm("no LoRA on Q and V", "TTT_Q_LORA=0 TTT_V_LORA=0", "PR #1953", "artifact"),
    _arm("n-gram tilt", "NGRAM_TILT=16:2.62", "PR #1514", "artifact"),
    _arm("n-gram tilt, short", "NGRAM_TILT=8:5.6,4:4,2:3", "PR #1514", "artifact"),
    _arm("chunks by length", "TTT_CHUNK_BY_LENGTH=256:8,2000:24", "PR #2014", "artifact"),
)
EIGHTH = "GPTQ_CALIBRATION_BATCHES=1 TRAIN_BATCH_TOKENS=2048 GRAD_ACCUM_STEPS=1"
PARTS = (  # the record without its parts, one at a time
    _arm("no SmearGate", "SMEAR_GATE_ENABLED=0", "PR #1667"),
    _arm("SmearGate without BOS mask", "SMEAR_BOS_MASK=0", "PR #1851"),
    _arm("no attention gates", "SPARSE_ATTN_GATE_ENABLED=0", "PR #1787"),
    _arm("no looping", "NUM_LOOPS=0", "PR #1394"),
    _arm("no parallel lanes", "PARALLEL_START_LAYER=0", "PR #1530"),
    _arm("no LQER", "LQER_ENABLED=0", "PR #1797", "model"),
    _arm("an eighth of the Hessians' windows", EIGHTH, "PR #1851", "model"),
    _arm("no global SGD phases", "PHASED_TTT_PREFIX_DOCS=0", "PR #1610", "artifact"),
    _arm("no TTT", "TTT_ENABLED=0", "PR #1530", "artifact"),
)
WHOLE = (
    _arm("best", "PRESET=best", "all that is kept"),
    _arm("best without MUDD", "PRESET=best MUDD_WIDTH=0", "all that is kept but MUDD"),
)
KEPT = {  # what became of the ideas that were measured (logs/study/)
    "best": "the preset",
    "best without MUDD": "and MUDD: the preset",
    "fused markers": "an option of the data preparation, off",
    **dict.fromkeys(("four momenta", "MUDD", "n-gram tilt", "n-gram tilt, short"), "in `best`"),
    **dict.fromkeys(("EMA-Nesterov", "row floor", "cautious decay", "slow scalars"), "removed"),
    **dict.fromkeys(("bi-Maxwell", "prefix targets", "four momenta and prefix targets"), "removed"),
    **dict.fromkeys(("slope 0.3", "gated XSA"), "removed"),
    **dict.fromkeys(("tail blend", "tail blend with the embedding"), "removed"),
    **dict.fromkeys(("finer loops", "AWQ-lite"), "removed"),
    **dict.fromkeys(("no LoRA on Q and V", "chunks by length"), "a setting, off"),
    **dict.fromkeys(("beta2 0.997", "softcap 20"), "a setting, off"),
    **dict.fromkeys(("scalars' beta2 0.997", "embedding's beta2 0.997"), "removed"),
    **dict.fromkeys(("AsymLogit that trains", "AsymLogit that trains, rate 0.25"), "removed"),
    **dict.fromkeys(("progressive context", "progressive context, no re-warm-up"), "removed"),
    **dict.fromkeys(("one momentum, 0.94", "two momenta, 0.94", "four momenta, 0.94"), "removed"),
}
GROUPS = {"noise": NOISE, "training": TRAINING, "storing": STORING, "adapting": ADAPTING, "parts": PARTS}
GROUPS |= {"whole": WHOLE}
ARMS = {arm.name: arm for arms in GROUPS.values() for arm in arms}


def folder_of(root: Path, kind: str, number: int, variant: str = "") -> Path:
    """The data set of a seed, in another form of the same documents where there is a variant."""
    return root.with_name(f"{root.name}_{variant}" if variant else root.name) / f"{kind}{number}"


def chosen_arms(names: str, own: Sequence[str]) -> list[Arm]:
    """Arms by their names or those of groups, commas between, and `NAME:SETTING=VALUE ...`; control first.

    Raises ValueError.
    """
    found = [Arm(CONTROL, {})]
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in GROUPS and name not in ARMS:
            raise ValueError(f"--arms {name}: must be some of {', '.join([*GROUPS, *ARMS])}, commas between")
        found += GROUPS.get(name) or (ARMS[name],)
    for text in own:
        title, _, settings = text.partition(":")
        if not title or not settings.split() or not all("=" in pair for pair in settings.split()):
            raise ValueError(f"--arm {text}: must be NAME:SETTING=VALUE SETTING=VALUE")
        if len(title) > LONGEST_NAME or re.search(r"[|\n\r]", title):
            what = f"a name has at most {LONGEST_NAME} letters, none of them |"
            raise ValueError(f"--arm {title[:LONGEST_NAME]!r}: {what}")
        found.append(_arm(title, settings, ""))
        if taken := [name for name in OURS if name in found[-1].settings]:
            raise ValueError(f"--arm {title}: {taken[0]}: every run of a study has its own")
    folders = [arm.folder for arm in found]
    if twice := next((arm.name for arm in found if folders.count(arm.folder) > 1), ""):
        raise ValueError(f"{twice}: two arms of this name, or of one that differs in signs alone")
    if len(found) < 2:
        raise ValueError("--arms: name an arm to compare with the control")
    return found
