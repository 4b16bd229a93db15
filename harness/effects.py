"""What settings ask for and do not get, as model, data and given files are; preflight says it in notices."""

from collections.abc import Iterator

from systems.tilt import boosts_of
from train_gpt import Config, Run, ValidationSet


def left_open(run: Run) -> Iterator[str]:
    """What a run's files do not tell, and is taken as it stands."""
    cfg = run.cfg
    if cfg.ttt_eval_only and not (cfg.muon_maxwell or cfg.gptq_drift_batches):
        untold = "MUON_MAXWELL and GPTQ_DRIFT_BATCHES, which no artifact tells"
        yield f"TTT_EVAL_ONLY=1: the code is counted as that of a run without {untold}"
    if cfg.prequant_only and run.trains and "/" in cfg.model_path:
        yield f"MODEL_PATH={cfg.model_path}: is not there, so that a model is trained"


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
