"""Triton's interpreter (3.6), mended: bounds of loops under numpy 2.4, bfloat16 as on a GPU, some speed.

It asks numpy for the number in an array of one element, which numpy 2.4 no longer gives, cuts float32 to
bfloat16 instead of rounding, and multiplies the bits of bfloat16 matrices. It looks for the builtins of the
language at every call, and makes a table of all types for every array: both are done once here.
"""

import functools
import inspect

import numpy as np


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16's bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """The bits (uint16) of the nearest bfloat16 numbers, ties to even; not-a-number stays one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


@functools.cache
def builtins_of(package: object) -> list[tuple[str, object]]:
    """Names and functions of the language in a module or class, as they are before anything is patched."""
    from triton.language.core import is_builtin

    return [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]


def mend() -> None:
    """Replace what is wrong, once. TRITON_INTERPRET=1 is set before."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot
    if getattr(cast, "mended", False):
        return

    def patch_lang_tensor(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def cast_impl(self: object, source: object, wanted: object) -> object:
        pair = source.dtype.scalar, wanted.scalar
        if pair == (tl.bfloat16, tl.float32):
            return handle(widened(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return handle(rounded(source.data), tl.bfloat16)
        return cast(self, source, wanted)

    def create_dot(self: object, a: object, b: object, *rest: object) -> object:
        a, b = (handle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    def patch_builtin(package: object, builder: object, scope: object) -> None:
        for name, member in builtins_of(package):
            if getattr(package, name) is member:  # else it is patched: a function calls another
                interpreter._patch_attr(package, name, member, builder, scope)

    def np_dtype(kind: tl.dtype) -> np.dtype:
        scalar = kind.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else scalar_dtype(scalar)

    scalar_dtype = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype, interpreter._patch_builtin = np_dtype, patch_builtin
    cast_impl.mended = True
    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
