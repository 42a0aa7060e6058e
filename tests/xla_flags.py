"""The options of XLA with which it compiles fastest: numbers do not depend on how hard it tries,
the time of the suite does. Most of that is compiling."""

import importlib.metadata

_VERSION = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
FASTEST = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # kernels of a CPU in one part and without MLIR: half the time of the two above alone. A
        # jaxlib that does not know an option ends the process.
        "--xla_cpu_parallel_codegen_split_count=1",
        *(("--xla_cpu_use_fusion_emitters=false",) if _VERSION < (0, 11) else ()),
    )
)
