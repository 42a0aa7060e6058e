"""Settings of the heap for processes that are measured on a CPU, the same as in launch/."""

# One heap, never given back: without it, page faults of freed and mapped buffers are a tenth of everybody's time and vary with the weather.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
