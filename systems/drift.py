"""Quantisation in the order of the layers, each against what is stored before it (GPTQ_DRIFT_BATCHES).

GPTQ takes the inputs x of a matrix from the whole model, yet the stored one gives it others, x': what is
stored before it has drifted. Of all matrices W' the least mean |W x - W' x'|^2 has W' = W C H^-1, with C the
mean of x x'^T and H that of x' x'^T (Qronos, arXiv 2505.11695). So W' is quantised, with H as its Hessian.
This has to follow the traversal, the halves of a layer one by one: a correction against weights that are
stored anew afterwards trades one drift for another (logs/EXPERIMENTS.md).
"""

import contextlib
import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from systems.fit_bytes import FitProblem, column_scales, fit_matrices, texts_of_rank
from train_gpt import (
    CPU,
    GPT,
    HessianFactor,
    QuantizedTensor,
    Ranks,
    ShuffledLoader,
    factorise,
    flatten_banks,
    gather_by_name,
    layer_order,
    micro_batches,
    tensors_of_rank,
)

STAGES = (("attn.c_q", "attn.c_k", "attn.c_v"), ("attn.proj",), ("mlp.fc",), ("mlp.proj",))  # of a layer


class Reached(Exception):
    """The traversal need not go on."""


@torch.no_grad()
def inputs_of(model: GPT, ids: Tensor, name: str, visits: int, looping: bool) -> list[Tensor]:
    """What a matrix is given at each of its visits, float32 [tokens, columns], for ids [rows, T]."""
    inputs: list[Tensor] = []

    def keep(matrix: str, x: Tensor) -> None:
        if matrix == name:
            inputs.append(x.flatten(0, -2).float())
            if len(inputs) == visits:
                raise Reached

    with contextlib.suppress(Reached):
        model.hidden(ids, looping=looping, on_input=keep)
    return inputs


class LayersInOrder:
    """Stores the matrices of a model as FIT_BYTES does, one stage after the other, on texts of its own."""

    def __init__(self, model: GPT, loader: ShuffledLoader, *, looping: bool, ranks: Ranks = CPU):
        """Draws GPTQ_DRIFT_BATCHES batches, and keeps those of this rank."""
        cfg, self.model, self.looping, self.ranks = model.cfg, model, looping, ranks
        on_rank, tokens = micro_batches(cfg, model.backends, ranks.world_size)
        self._count = cfg.gptq_drift_batches * on_rank * ranks.world_size  # texts of all ranks together
        rows = tokens // cfg.train_seq_len
        self._texts = [ids for _, ids in texts_of_rank(loader, self._count, rows, ranks)]

    def store(
        self,
        records: Mapping[str, QuantizedTensor],
        problems: Mapping[str, FitProblem],
        clips: Mapping[str, float],
    ) -> dict[str, QuantizedTensor]:
        """All tensors, the matrices among them corrected; on every rank.

        Args:
            records: the tensors that are not matrices.
            problems: the matrices, with Hessians of the whole model.
            clips: the clip width of each matrix.
        """
        cfg, records, stored = self.model.cfg, dict(records), copy.deepcopy(self.model)
        weights = flatten_banks(dict(stored.state_dict()), cfg.num_layers)  # views: what is put there is used

        def put(new: Mapping[str, QuantizedTensor]) -> None:
            records.update(new)
            for name, record in new.items():
                weights[name].copy_(record.dequantize())

        def correct(names: list[str], visits: int) -> None:
            if chosen := {name: problems[name].original for name in names if name in problems}:
                transform, hessian, factor = self._drift(stored, names[0], visits)
                shared = hessian, factor, column_scales(factor)
                corrected = {n: FitProblem(w.float() @ transform, *shared) for n, w in chosen.items()}
                put(self._fit(corrected, clips))

        put(records)
        put(self._fit({name: problems[name] for name in ("tok_emb.weight",) if name in problems}, clips))
        order = sum(layer_order(cfg, self.looping), [])
        for layer in dict.fromkeys(order):
            for parts in STAGES:
                correct([f"blocks.{layer}.{part}.weight" for part in parts], order.count(layer))
        correct(["lm_head.weight"], 1)
        return records

    def _drift(self, stored: GPT, name: str, visits: int) -> tuple[Tensor, Tensor, HessianFactor]:
        """C H^-1, both damped as H's factor is, then H [columns, columns] and the factor."""
        cross = hessian = 0
        if self.ranks.on_gpu:  # as in `calibrate`
            torch.set_float32_matmul_precision("high")
        for ids in self._texts:
            with self.ranks.autocast():
                whole, drifted = (inputs_of(m, ids, name, visits, self.looping) for m in (self.model, stored))
            for x, y in zip(whole, drifted, strict=True):
                # Doubles, so that sums are the same float32 however ranks share the texts.
                cross, hessian = cross + (x.mT @ y).double(), hessian + (y.mT @ y).double()
        torch.set_float32_matmul_precision("highest")
        self.ranks.wait_for_all("calibrate")
        totals = (self.ranks.sum_(total) / self._count for total in (cross, hessian))
        cross, hessian = (total.float() for total in totals)
        factor = factorise(hessian)
        damping = factor.damping * hessian.diagonal().where(~factor.dead, 1).mean()
        damping = damping * torch.eye(len(hessian), device=hessian.device)
        return torch.linalg.solve(hessian + damping, cross + damping, left=False), hessian, factor

    def _fit(
        self, problems: Mapping[str, FitProblem], clips: Mapping[str, float]
    ) -> dict[str, QuantizedTensor]:
        """Matrices that do not wait for each other, shared out over the ranks."""
        mine = tensors_of_rank({name: problem.original for name, problem in problems.items()}, self.ranks)
        fitted = fit_matrices({name: problems[name] for name in mine}, clips, self.model.cfg.quantizer)
        return gather_by_name(fitted, problems, self.ranks)
