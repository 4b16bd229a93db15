"""What settings ask for and do not get, as model, data and given files are; preflight says it in notices."""

from collections.abc import Iterator, Mapping

from systems.layout import strict_json
from systems.tilt import boosts_of
from train_gpt import MODEL_SETTINGS, Config, Run, ValidationSet, find_file

NOT_THE_MODELS = {"train_seq_len", "fit_bytes"}  # of the settings that an artifact holds
NAMED = 6  # settings that a notice names


def left_open(run: Run) -> Iterator[str]:
    """What a run's files do not tell, and is taken as it stands."""
    cfg = run.cfg
    if cfg.ttt_eval_only and not (cfg.muon_maxwell or cfg.gptq_drift_batches):
        untold = "MUON_MAXWELL and GPTQ_DRIFT_BATCHES, which no artifact tells"
        yield f"TTT_EVAL_ONLY=1: the code is counted as that of a run without {untold}"
    if cfg.prequant_only and run.trains and "/" in cfg.model_path:
        yield f"MODEL_PATH={cfg.model_path}: is not there, so that a model is trained"


def another_model(cfg: Config, run: Run) -> Iterator[str]:
    """Settings of the model that are not those it was made with: by its artifact, which is right, or for a
    checkpoint by the result.json beside it.
    """
    if cfg.ttt_eval_only:
        if told := _others(cfg, run.cfg.model_settings()):
            yield f"TTT_EVAL_ONLY=1: the model is as its artifact says, with {told}"
    elif not run.trains:
        path = find_file(cfg, "model_path")
        try:
            made = strict_json((path.parent / "result.json").read_bytes())["settings"]
            told = _others(cfg, {name.lower(): value for name, value in made.items()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # there is none that says it
            return
        if told:
            yield f"MODEL_PATH={path}: result.json beside it says that it was trained with {told}"


def _others(cfg: Config, made: Mapping[str, object]) -> str:
    """What a model was made with, where the settings here are others; empty where they are the same."""
    names = [name for name in MODEL_SETTINGS if name in made and name not in NOT_THE_MODELS]
    apart = [name for name in names if made[name] != getattr(cfg, name)]
    told = [f"{name.upper()}={made[name]} (here {getattr(cfg, name)})" for name in apart[:NAMED]]
    return ", ".join(told) + f" and {len(apart) - NAMED} more" * (len(apart) > NAMED)


def without_effect(cfg: Config, val: ValidationSet) -> Iterator[str]:
    """What settings ask for that this model, or these validation data, have no room for."""
    if cfg.lqer_enabled and cfg.lqer_asym_enabled and not cfg.fit_bytes:
        group, widths = cfg.lqer_asym_group, sorted({cfg.model_dim, cfg.mlp_dim})
        if odd := [str(width) for width in widths if cfg.lqer_rank * width % group]:
            text = (
                f"LQER_RANK times {' or '.join(odd)} columns is no multiple of it, so factors are symmetric"
            )
            yield f"LQER_ASYM_GROUP={group}: no effect where {text}"
    if not cfg.ttt_enabled:
        return
    if cfg.ttt_sgd and cfg.ttt_chunk_tokens >= val.num_targets:
        text = f"the {val.num_targets} targets are one chunk, so nothing is learnt before the score"
        yield f"TTT_CHUNK_TOKENS={cfg.ttt_chunk_tokens}: no effect: {text}"
    longest = max(length for _, length in val.documents)
    if orders := [str(order) for order in boosts_of(cfg.ngram_tilt) if order >= longest]:
        yield f"NGRAM_TILT={cfg.ngram_tilt}: no effect of {' and '.join(orders)}: no document is so long"
