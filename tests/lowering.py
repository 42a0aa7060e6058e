"""What tracing and lowering do for messages and once more for every program is left out, where the
suite spends half of its time.

Fewer MLIR contexts: JAX makes one for every program, with all dialects, in 3 ms of
the 15 that a small program takes that the compilation cache has, and the 28 of one that it has not;
the suite lowers some 15,000 programs. What a program is lowered to does not depend on what the
context lowered before it.

Signatures once for each function, and no names of arguments, which JAX finds for every traced
function: they are for its error messages and the locations in a program."""

import functools
import inspect
import threading
import weakref
from typing import Any

from jax._src import api_util
from jax._src.interpreters import mlir

TIMES = 64  # uses of a context, which holds the constants of the programs lowered in it


def reuse_contexts() -> None:
    """Share the context of each thread between programs, where this JAX takes one."""
    made, init = threading.local(), mlir.ModuleContext.__init__
    if "context" not in (init.__kwdefaults__ or {}) or not hasattr(mlir, "make_ir_context"):
        return  # another JAX, which is merely slower

    @functools.wraps(init)
    def initialize(self: Any, *, context: Any = None, **more: Any) -> None:
        if context is None:
            left = getattr(made, "left", 0)
            if not left:
                made.context, left = mlir.make_ir_context(), TIMES
            made.left = left - 1
            context = made.context
        init(self, context=context, **more)

    mlir.ModuleContext.__init__ = initialize


def leave_out_argument_names() -> None:
    """Trace functions without the names of their arguments, where this JAX looks for them."""
    if not hasattr(api_util, "_non_static_arg_names") or not hasattr(api_util, "fun_signature"):
        return  # another JAX, which is merely slower
    known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
    find = api_util.fun_signature

    def signature(fun: Any) -> inspect.Signature | None:
        try:
            if fun not in known:
                known[fun] = find(fun)
            return known[fun]
        except TypeError:  # neither hashed nor referred to weakly
            return find(fun)

    api_util.fun_signature = signature
    api_util._non_static_arg_names = lambda *_: None
