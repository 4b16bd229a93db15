"""Test-time training compiled: one graph for any number of rows and tokens (COMPILE_BACKEND, on CUDA)."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from train_gpt import (
    BOS,
    COUNTED,
    GPT,
    BaseTraining,
    BatchedLoRA,
    Config,
    Ranks,
    Run,
    ScoreFirstTTT,
    TTTBatch,
    ValidationSet,
    chunk_size,
    compiled_graphs,
    copy_tensors,
    one_line,
)


def compiled_losses(
    model: GPT, x: Tensor, y: Tensor, scored: Tensor, lora: BatchedLoRA, looping: bool
) -> Tensor:
    """`model.losses` of a chunk; adapters whose documents have ended get rows of zeros until they leave."""
    active, rows, used = lora.active, len(lora.lm_head_lora.factors[0]), len(x)
    x, y, scored = (F.pad(part, (0, 0, rows - used, 0)) for part in (x, y, scored))
    lora.active = active[-rows:]
    factors = [factor for low_rank in lora.maps() for factor in low_rank.factors]
    for tensor in (x, y, scored, lora.active, *factors) if rows > 1 else ():
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for tensor in (x, y):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
    losses = model(x, y, looping=looping, lora=lora, scored=scored)
    lora.active = active
    return losses[rows - used :]


def warm_up_ttt(model: GPT, cfg: Config, sizes: Iterable[int], looping: bool, ranks: Ranks) -> int:
    """Compile the graphs of test-time training on random tokens, then see on others that they are general.

    There are two for each chunk size (several rows, one row) and one for the global phases. The weights are
    afterwards what they were. Returns the number of graphs; raises what the compiler raises.
    """
    before, generator = copy_tensors(model.state_dict()), torch.Generator().manual_seed(0)
    torch.compiler.reset()  # a limited number of forms is compiled for each function
    graphs = compiled_graphs()
    try:
        for stance in ("default", "fail_on_recompile"):
            with torch.compiler.set_stance(stance):
                for size in sizes:
                    chunks = [2, 2, 4]
                    if stance != "default":  # also as many rows and as long windows as there can be
                        full = cfg.ttt_eval_seq_len // size + 1
                        chunks = sorted([1, 3, *[full] * (cfg.ttt_batch_size - 3), full + 1])
                    starts = [0, *itertools.accumulate(count * size + 2 for count in chunks)]
                    tokens = torch.randint(BOS + 1, cfg.vocab_size, (starts[-1],), generator=generator)
                    documents = [(start, end - start) for start, end in itertools.pairwise(starts)]
                    val = ValidationSet(tokens, tokens, documents)
                    ttt = ScoreFirstTTT(model, val, cfg, looping=looping, ranks=ranks)
                    batch = TTTBatch(0, list(enumerate(documents)))
                    ttt._score_batch(batch, ttt._new_lora(len(documents)), size)
                model.requires_grad_(True)
                if cfg.phased_ttt_prefix_docs:
                    count = min(len(chunks), cfg.global_ttt_batch_seqs) * cfg.eval_seq_len + 1
                    row = torch.randint(BOS, cfg.vocab_size, (count,), generator=generator)
                    by_document = cfg.global_ttt_respect_doc_boundaries
                    BaseTraining(model, cfg, by_document, looping, ranks).losses(row).sum().backward()
    finally:
        model.requires_grad_(True).zero_grad(set_to_none=True)
        model.load_state_dict(before)
    return compiled_graphs() - graphs


def compile_adaptation(run: Run, documents: Sequence[tuple[int, int]]) -> None:
    """Compile before the clock starts, or say why not; what no graph fits afterwards runs without."""
    cfg = run.model.cfg
    sizes = {chunk_size(cfg, length - 1) for _, length in documents}
    with run.clock.stage("ttt_warm_up"):
        try:
            graphs = warm_up_ttt(run.model, cfg, sizes, run.looping, run.ranks)
            torch.compiler.set_stance("eager_on_recompile")
            run.log.event("graphs", ttt_warm_up=graphs, seconds=run.clock.elapsed("ttt_warm_up"))
        except Exception as error:  # compilers raise anything
            if COUNTED:
                raise
            run.log.event("notice", text=f"test-time training is not compiled ({one_line(error)})")
            run.model.backends = dataclasses.replace(run.model.backends, compiler="")
        run.ranks.wait_for_all("ttt_warm_up")
