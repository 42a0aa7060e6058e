"""Settings of the heap for processes that are measured on a CPU."""

# Never given back, and in pages of 2 MB: without that, page faults of freed and mapped buffers are a tenth of everybody's time and vary
# with the weather. As in launch/, but for one heap instead of two a core: large steps, which are measured here, are slightly faster so.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
