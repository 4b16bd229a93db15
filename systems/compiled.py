"""Test-time training compiled: one graph for any number of rows and tokens (COMPILE_BACKEND, on CUDA)."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

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
    Span,
    TTTBatch,
    ValidationSet,
    chunk_size,
    compiled_graphs,
    copy_tensors,
)


def one_line(error: Exception) -> str:
    """What an exception of a foreign library says, short: a compiler tells the cause at the end."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-135:]}"


def compile_graphs(run: Run, stage: str, warm_up: Callable[[], int]) -> None:
    """Make a stage's graphs before its clock starts, or say why not; what fits none of them runs without."""
    with run.clock.stage(f"{stage}_warm_up"):
        torch.compiler.set_stance("default")  # the stage before made no more graphs
        torch.compiler.reset()  # a limited number of forms is compiled for each function
        try:
            facts = {f"{stage}_warm_up": warm_up()}
            torch.compiler.set_stance("eager_on_recompile")
            run.log.event("graphs", **facts, seconds=run.clock.elapsed(f"{stage}_warm_up"))
        except Exception as error:  # compilers raise anything
            if COUNTED:
                raise
            run.log.event("notice", text=f"stage {stage} is not compiled ({one_line(error)})")
            run.model.backends = dataclasses.replace(run.model.backends, compiler="")
        run.ranks.wait_for_all(f"{stage}_warm_up")


def compile_adaptation(run: Run, documents: Iterable[Span]) -> None:
    """Make the graphs of test-time training on some documents."""
    model, looping, ranks = run.model, run.looping, run.ranks
    sizes = {chunk_size(model.cfg, length - 1) for _, length in documents}
    compile_graphs(run, "ttt", lambda: warm_up_ttt(model, model.cfg, sizes, looping, ranks))


def compiled_losses(
    model: GPT, x: Tensor, y: Tensor, scored: Tensor, lora: BatchedLoRA, looping: bool, **hints: Tensor
) -> Tensor:
    """`model.losses` of a chunk; adapters whose documents have ended get rows of zeros until they leave."""
    active, rows, used = lora.active, len(lora.lm_head_lora.factors[0]), len(x)
    x, y, scored = (F.pad(part, (0, 0, rows - used, 0)) for part in (x, y, scored))
    hints = {name: F.pad(part, (0, 0, 0, 0, rows - used, 0)) for name, part in hints.items()}
    lora.active = active[-rows:]
    factors = [factor for low_rank in lora.maps() for factor in low_rank.factors]
    for tensor in (x, y, scored, lora.active, *factors, *hints.values()) if rows > 1 else ():
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for tensor in (x, y):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
    losses = model(x, y, looping=looping, lora=lora, scored=scored, **hints)
    lora.active = active
    return losses[rows - used :]


def warm_up_ttt(model: GPT, cfg: Config, sizes: Iterable[int], looping: bool, ranks: Ranks) -> int:
    """Compile the graphs of test-time training on random tokens, then see on others that they are general.

    There are two for each chunk size (several rows, one row) and one for the global phases. The weights are
    afterwards what they were. Returns the number of graphs; raises what the compiler raises.
    """
    before, generator = copy_tensors(model.state_dict()), torch.Generator().manual_seed(0)
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
                    if cfg.ngram_tilt:
                        from systems.tilt import Tilt

                        ttt.tilt = Tilt(ttt)
                    ttt._score_batch(batch, ttt._new_lora(batch.documents), size)
                model.requires_grad_(True)
                if cfg.phased_ttt_prefix_docs:
                    by_document, count = cfg.global_ttt_respect_doc_boundaries, cfg.global_ttt_chunk_tokens
                    if by_document:  # one row of any length
                        count = min(len(chunks), cfg.global_ttt_batch_seqs) * cfg.eval_seq_len
                    row = torch.randint(BOS, cfg.vocab_size, (count + 1,), generator=generator)
                    training = BaseTraining(model, cfg, by_document, looping, ranks)
                    training.train(row, torch.optim.SGD(model.parameters()), 0.0, 1)
    finally:
        model.requires_grad_(True).zero_grad(set_to_none=True)
        model.load_state_dict(before)
    return compiled_graphs() - graphs
