"""Attributes of libraries: names that are not ours alone."""

import ast
import builtins
import concurrent.futures
import functools
import hashlib
import importlib
import io
import pathlib
import random
import re
import struct
import subprocess
import threading
import types
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from harness.scopes import walk

TYPES = (
    object, str, bytes, bytearray, memoryview, int, float, complex, bool, list, tuple, dict, set, frozenset,
    slice, range, type, property, BaseException, OSError, pathlib.Path, io.BytesIO, io.TextIOWrapper,
    io.BufferedWriter, re.Pattern, re.Match, struct.Struct, random.Random, threading.Thread, threading.Event,
    concurrent.futures.Future, concurrent.futures.ThreadPoolExecutor, subprocess.CompletedProcess,
    zipfile.ZipFile, np.ndarray, np.random.Generator, np.dtype, np.memmap, torch.Tensor, torch.Size,
    torch.device, torch.dtype, torch.Generator, torch.nn.Module, torch.nn.Parameter, torch.nn.Linear,
    torch.nn.Embedding, torch.nn.ModuleList, torch.optim.Optimizer, torch.optim.AdamW, torch.optim.SGD,
    torch.cuda.Event, torch.autograd.function.FunctionCtx, dist.Store, dist.Work, type(hashlib.sha256()),
    type(lambda: None), type(len), type(_ for _ in ()), type(open), type(functools.lru_cache(len)),
)  # fmt: skip
EXTRA = {  # of objects that no class here has
    "saved_tensors", "needs_input_grad", "save_for_backward", "register_autograd", "register_fake", "stream",
    "stack", "model", "Categorical", "AnsCoder", "encode_reverse", "decode", "get_compressed", "process",
    "is_finished", "eof", "unused_data", "decompress", "compress", "Decompressor", "shape", "grad",
    "cu_seqlens_q", "constexpr", "jit", "block_shape",
}  # fmt: skip


def foreign_names(tree: ast.Module) -> frozenset[str]:
    """What may be an attribute of what is not ours: of common types, and of all that is imported."""
    modules = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return _names(frozenset(modules)) | _of_imports(tree)


def _of_imports(tree: ast.Module) -> set[str]:
    """Attributes that the script reads of what it imports, also where that is not installed here."""
    names, found = set(), set()
    for node in walk(tree):
        if isinstance(node, ast.alias):
            names.add(node.asname or node.name.partition(".")[0])
    for node in walk(tree):
        path, root = [], node
        while isinstance(root, (ast.Attribute, ast.Call)):
            path += [root.attr] if isinstance(root, ast.Attribute) else []
            root = root.value if isinstance(root, ast.Attribute) else root.func
        if isinstance(root, ast.Name) and root.id in names:
            found.update(path)
    return found


@functools.cache
def _names(modules: frozenset[str]) -> frozenset[str]:
    found = set(EXTRA).union(dir(builtins), *map(dir, TYPES))
    for name in sorted(modules):
        found.update(*map(_attributes, _objects(name)), name.split("."))
    return frozenset(found)


def _attributes(thing: object) -> Iterable[str]:
    """What `dir` tells; of a module all but its submodules: a library loads some only when they are used."""
    if not isinstance(thing, types.ModuleType):
        return dir(thing)
    return [name for name, member in vars(thing).items() if not issubclass(type(member), types.ModuleType)]


def _objects(name: str) -> Iterator[object]:
    """A module, or a thing in one."""
    try:
        yield importlib.import_module(name)
    except ImportError:
        module, _, attribute = name.rpartition(".")
        try:
            yield getattr(importlib.import_module(module), attribute) if module else None
        except (ImportError, AttributeError):
            yield None
