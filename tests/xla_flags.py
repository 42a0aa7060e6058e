"""The options of XLA with which it compiles fastest: numbers do not depend on how hard it tries,
the time of the suite does. Most of that is compiling."""

FASTEST = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # kernels of a CPU without MLIR, and in one part: half the time of the two above alone
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)
