"""The plain form of phased score-first test-time training, which the evaluator must agree with and beat.

Rows are padded to the longest window, finished documents stay in the batch, logits and losses are computed at
every position of the window and thrown away but for the chunk's. One rank, nothing cached.
"""

import random

import numpy as np
import torch


def window_rows(tokens, documents, chunk: int, cfg):
    """Inputs, targets [B, TTT_EVAL_SEQ_LEN] and, per row, the positions that this chunk scores."""
    size, limit = cfg.ttt_chunk_size, cfg.ttt_eval_seq_len
    x = torch.zeros(len(documents), limit, dtype=torch.long)
    y, spans = torch.zeros_like(x), []
    for row, (_, (start, length)) in enumerate(documents):
        end = min((chunk + 1) * size, length - 1)
        first = max(0, end - limit)
        x[row, : end - first] = tokens[start + first : start + end]
        y[row, : end - first] = tokens[start + first + 1 : start + end + 1]
        spans.append(
            range(max(chunk * size - first, 0), max(end - first, 0)) if chunk * size < end else range(0)
        )
    return x, y, spans


def score_batch(tg, model, val, cfg, documents, lora, looping: bool, sums: dict[int, float]) -> None:
    """Chunk after chunk: score with the adapters as they are, then one optimiser step for whoever goes on."""
    betas, decay = (cfg.ttt_beta1, cfg.ttt_beta2), cfg.ttt_weight_decay
    optimizer = torch.optim.AdamW(lora.parameters(), cfg.ttt_lora_lr, betas, 1e-10, decay)
    longest = max(length for _, (_, length) in documents)
    for chunk in range(-(-(longest - 1) // cfg.ttt_chunk_size)):
        x, y, spans = window_rows(val.tokens, documents, chunk, cfg)
        logits = model.logits(model.hidden(x, looping=looping, lora=lora), lora)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        losses = losses.view(y.shape)
        objective = torch.zeros(())
        for row, (number, (_, length)) in enumerate(documents):
            chosen = losses[row, spans[row].start : spans[row].stop]
            sums[number] = sums.get(number, 0.0) + float(chosen.detach().double().sum())
            if (chunk + 1) * cfg.ttt_chunk_size < length - 1:
                objective = objective + chosen.mean()
        if objective.requires_grad:
            optimizer.zero_grad(set_to_none=True)
            objective.backward(inputs=list(lora.parameters()))
            optimizer.step()


def plain_ttt(tg, model, val, cfg, *, looping: bool, generator=None) -> dict[int, float]:
    """Loss sums (nats) by document number. The model is changed in place."""
    generator = generator or torch.Generator().manual_seed(cfg.seed)
    documents = tg.select_documents(val.documents, cfg.val_doc_fraction, cfg.seed)
    batches = tg.ttt_batches(list(enumerate(documents)), cfg)
    boundaries = tg.phase_boundaries(cfg.phased_ttt_prefix_docs, cfg.phased_ttt_num_phases, len(documents))
    slots, sums, scored = tg.lora_slots(cfg, looping), {}, []

    def new(batch: int):
        return tg.BatchedLoRA(cfg, batch, slots, generator)

    reusable = new(cfg.ttt_batch_size)
    for phase, part in enumerate(tg.split_at_boundaries(batches, boundaries), start=1):
        for batch in part:
            full = len(batch.documents) == cfg.ttt_batch_size
            lora = reusable if full else new(len(batch.documents))
            lora.reset_B()
            score_batch(tg, model, val, cfg, batch.documents, lora, looping, sums)
            scored.append(batch)
        if phase <= len(boundaries):
            spans = [span for batch in sorted(scored) for _, span in batch.documents][: boundaries[phase - 1]]
            tokens = torch.cat([val.tokens[start : start + length] for start, length in spans])
            tg.global_sgd(model, tokens, cfg, looping=looping)
            reusable = new(cfg.ttt_batch_size)
    return sums


def contest_lengths() -> list[int]:
    """50,000 document lengths with the contest's quantiles (FIELD section E); sixteen above 30,339 tokens."""
    shares = [0, 0.5, 0.9, 0.99, 1 - 16 / 50_000, 1]
    logs = np.log([20, 567, 1873, 6600, 30_339, 97_114])
    lengths = np.exp(np.interp((np.arange(50_000) + 1) / 50_000, shares, logs)).astype(int).tolist()
    random.Random(0).shuffle(lengths)
    return lengths
