"""The whole house as one object: names of train_gpt.py, of harness/ and of systems/."""

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def packed_loader(tg, paths, world, rank, micro_tokens, max_doc_len, vocab_size=1 << 16, group=0):
    """A loader of training batches by plain numbers, as one of several ranks."""
    cfg = tg.Config(train_seq_len=max_doc_len, vocab_size=vocab_size)
    return tg.PackedLoader(paths, cfg, tg.Ranks(torch.device("cpu"), rank, world), micro_tokens, group)


def shuffled_loader(tg, paths, world, rank, seq_len, vocab_size=1 << 16):
    """A loader of calibration batches by plain numbers; the published one gives each rank its own files."""
    cfg = tg.Config(train_seq_len=seq_len, vocab_size=vocab_size)
    return tg.ShuffledLoader(paths[rank::world], cfg, rank)


def plain_validation(tg, tokens, tables):
    """A validation set of plain text."""
    return tg.ValidationSet(tokens, tables.target_bytes(tokens), tg.find_documents(tokens))


class House:
    """Attributes are read from, and set in, the module of the house that defines them."""

    __slots__ = ("core", "modules")  # without a dictionary, monkeypatch puts names back as it found them

    def __init__(self) -> None:
        put = super().__setattr__
        put("core", importlib.import_module("train_gpt"))
        names = [f"{part}.{module.name}" for part in ("harness", "systems") for module in self._modules(part)]
        put("modules", [self.core, *map(importlib.import_module, ["harness", *names])])

    @staticmethod
    def _modules(part: str) -> list[pkgutil.ModuleInfo]:
        return list(pkgutil.iter_modules([str(ROOT / part)]))

    def owner(self, name: str) -> ModuleType:
        """The module that defines a name (or, for what none defines, the first that has imported it)."""
        has = [module for module in self.modules if name in vars(module)]
        made = [module for module in has if getattr(vars(module)[name], "__module__", "") == module.__name__]
        if not has:
            raise AttributeError(f"nothing in the house is called {name}")
        return (made or has)[0]

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name in vars(self.core):
            return vars(self.core)[name]
        return vars(self.owner(name))[name]

    def __setattr__(self, name: str, value: object) -> None:
        """Replace a name (monkeypatch) in every module that uses it."""
        for module in self.modules:
            if name in vars(module):
                setattr(module, name, value)

    def __dir__(self) -> list[str]:
        return sorted({name for module in self.modules for name in vars(module)})
