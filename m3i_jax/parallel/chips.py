"""Facts about accelerators: one row a chip. Peaks, names of devices and slices, memory limits,
descriptions for compilers and limits of kernels derive from the rows, so that a row is all that the
package needs to know of a new chip."""

import dataclasses
from typing import Any

MIB, GIB = 2**20, 2**30
GPU_MEMORY = 0.9  # share of a GPU's memory that JAX takes with XLA_CLIENT_MEM_FRACTION=0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip. 0 or an empty text: the chip has none, or the value is unknown.

    "Cloud" is docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; "data sheet" is NVIDIA's of
    the A100, H100 and H200 (SXM) and of the HGX B200 (nvidia.com/en-us/data-center); "CUDA" is what
    the driver reports of those cards, also published in github.com/openxla/xla,
    xla/backends/gpu/target_config/specs, where the H200 has other figures than what devices print.

    Attributes:
      platform: tpu, cuda or cpu: what compiles for it.
      device_kind: the name that JAX gives its devices. Source: libtpu; CUDA, whose compiler gets
        it, too. A reduced edition of a GPU has another name and another peak, and is not listed.
      other_kinds: pattern of further names of the same chip, in any case of letters. Source: names
        of other versions of libtpu and of other editions with the same peak, but not of parts of a
        card (MIG).

      peak: FLOP/s of a chip, dense, bf16. Source: Cloud, "peak compute per chip"; data sheet, half
        of the figure with sparsity.
      memory: bytes of HBM of a chip. Source: Cloud, "HBM capacity"; data sheet.
      bandwidth: bytes a second to and from HBM of a chip. Source: Cloud, "HBM bandwidth"; data
        sheet.
      link: bytes a second that a chip receives over all links from the others of its slice, or of
        its host. Source: Cloud, half of "bidirectional inter-chip interconnect bandwidth", of v4
        its six links of 50 GB/s (arXiv 2304.01433); data sheet, half of NVLink's total.
      network: bytes a second that a GPU receives from other hosts. Source: one adapter a GPU, of
        200 Gb/s in the data sheet of the DGX A100 and of 400 Gb/s in those of the DGX H100, H200
        and B200.

      device_memory: bytes of a JAX device before any program. Source: what libtpu 0.0.42 states
        when it refuses a program; CUDA, "total memory".
      clock: cycles a second of the matrix units. Source: of a TPU, peak over the multiply-adds of
        its matrix units; CUDA, "clock rate".
      scratchpad: bytes of VMEM of a TensorCore, in which kernels work. Source:
        github.com/jax-ml/jax, jax/_src/pallas/mosaic/tpu_info.py.

      cores: JAX devices of a chip, which share what is of a chip. Source: libtpu.
      host: GPUs of a host, to whose borders `link` reaches; 0: links reach all chips. Source: data
        sheets of the DGX A100, H100, H200 and B200.
      sides: number of sides of a slice. Source: Cloud, "interconnect topology", 2D or 3D torus.
      options: of libtpu, beside the shape of the slice, as (name, value).
      cloud: first part of the names of accelerator types, such as v5litepod of v5litepod-16.
        Source: Cloud, "configurations".
      counted: what the number in such a name counts of a chip: TensorCores of v4 and v5p, else
        chips. Source: as before.
      most: chips of the largest such type whose number is a power of two. Source: as before.
      slices: numbers of chips for which --mode=show estimates days; a choice, not a fact.

      multiprocessors: of a GPU. Source: CUDA, as those below.
      fp32_units: of a multiprocessor; adders and multipliers of float32.
      capability: first number of the compute capability.
      shared: bytes of shared memory of a multiprocessor.
      shared_of_block: bytes of shared memory that a block may ask for.
      cache: bytes of L2.
      reported_bandwidth: bytes a second, by the clock and the width of the memory's bus; near
        `bandwidth`.
    """

    platform: str
    device_kind: str
    other_kinds: str = ""
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float = 0.0
    device_memory: float = 0.0
    clock: float = 0.0
    scratchpad: int = 0
    cores: int = 1
    host: int = 0
    sides: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    cloud: str = ""
    counted: int = 1
    most: int = 0
    slices: tuple[int, ...] = ()
    multiprocessors: int = 0
    fp32_units: int = 0
    capability: int = 0
    shared: int = 0
    shared_of_block: int = 0
    cache: int = 0
    reported_bandwidth: int = 0

    def peak_of(self, dtype: str) -> float:
        """FLOP/s of products of arrays of a type, as JAX computes them by default: float32 on a GPU
        in TF32, at half the speed, on a TPU as bf16.

        >>> CHIPS["h100"].peak_of("float32") / CHIPS["h100"].peak_of("bfloat16")
        0.5
        >>> CHIPS["v5e"].peak_of("float32") == CHIPS["v5e"].peak
        True
        """
        halved = self.platform == "cuda" and dtype == "float32"
        return self.peak / 2 if halved else self.peak

    @property
    def usable(self) -> float:
        """Bytes that a program may use on a JAX device.

        >>> CHIPS["v5e"].usable / GIB, CHIPS["h100"].usable / CHIPS["h100"].device_memory
        (15.75, 0.9)
        """
        return (GPU_MEMORY if self.platform == "cuda" else 1) * self.device_memory


# name -> facts, in the order in which tables list them
CHIPS = {
    "v4": Chip(
        platform="tpu", device_kind="TPU v4",
        peak=275e12, memory=32 * GIB, bandwidth=1200e9, link=300e9,
        device_memory=30.75 * GIB, clock=1.05e9, scratchpad=16 * MIB,
        sides=3, options=(("chip_config_name", "megacore"),),
        cloud="v4", counted=2, most=4096, slices=(16,),
    ),
    "v5e": Chip(
        platform="tpu", device_kind="TPU v5 lite", other_kinds="TPU (v5lite|v5e)",
        peak=197e12, memory=16 * GIB, bandwidth=819e9, link=200e9,
        device_memory=15.75 * GIB, clock=1.5e9, scratchpad=128 * MIB,
        sides=2, cloud="v5litepod", most=256, slices=(16, 64, 256),
    ),
    "v5p": Chip(
        platform="tpu", device_kind="TPU v5", other_kinds="TPU v5p",
        peak=459e12, memory=95 * GIB, bandwidth=2765e9, link=600e9,
        device_memory=95.74 * GIB, clock=1.75e9, scratchpad=64 * MIB,
        sides=3, cloud="v5p", counted=2, most=4096, slices=(16, 64),
    ),
    "v6e": Chip(
        platform="tpu", device_kind="TPU v6 lite", other_kinds="TPU (v6lite|v6e)",
        peak=918e12, memory=32 * GIB, bandwidth=1638e9, link=400e9,
        device_memory=31.25 * GIB, clock=1.75e9, scratchpad=128 * MIB,
        sides=2, cloud="v6e", most=256, slices=(64, 256),
    ),
    "tpu7x": Chip(
        platform="tpu", device_kind="TPU7x", other_kinds="TPU ?(7x|v7x?)",
        peak=2307e12, memory=192 * GIB, bandwidth=7380e9, link=600e9,
        device_memory=94.75 * GIB, scratchpad=64 * MIB,
        cores=2, sides=3, slices=(64,),
    ),
    "a100": Chip(
        platform="cuda", device_kind="NVIDIA A100-SXM4-80GB",
        other_kinds="NVIDIA A100[- ](?!.*MIG).*",
        peak=312e12, memory=80e9, bandwidth=2039e9, link=300e9, network=25e9,
        device_memory=85_100_068_864, clock=1.41e9, host=8, slices=(8,),
        multiprocessors=108, fp32_units=64, capability=8, shared=167_936, shared_of_block=166_912,
        cache=41_943_040, reported_bandwidth=2_039_040_000_000,
    ),
    "h100": Chip(
        platform="cuda", device_kind="NVIDIA H100 80GB HBM3",
        peak=989e12, memory=80e9, bandwidth=3350e9, link=450e9, network=50e9,
        device_memory=84_942_979_072, clock=1.98e9, host=8, slices=(1, 8),
        multiprocessors=132, fp32_units=128, capability=9, shared=233_472, shared_of_block=232_448,
        cache=52_428_800, reported_bandwidth=3_352_320_000_000,
    ),
    "h200": Chip(
        platform="cuda", device_kind="NVIDIA H200",
        peak=989e12, memory=141e9, bandwidth=4800e9, link=450e9, network=50e9,
        device_memory=143_156 * MIB, clock=1.98e9, host=8, slices=(8,),
        multiprocessors=132, fp32_units=128, capability=9, shared=233_472, shared_of_block=232_448,
        cache=62_914_560, reported_bandwidth=4_814_000_000_000,
    ),
    "b200": Chip(
        platform="cuda", device_kind="NVIDIA B200",
        peak=2250e12, memory=180e9, bandwidth=7700e9, link=900e9, network=50e9,
        device_memory=191_514_411_008, clock=1.965e9, host=8, slices=(8,),
        multiprocessors=148, fp32_units=128, capability=10, shared=233_472, shared_of_block=232_448,
        cache=132_644_864, reported_bandwidth=7_672_320_000_000,
    ),
}  # fmt: skip
# A host to compile for, whose speed is unknown; not among the accelerators.
CPU = Chip(platform="cpu", device_kind="cpu", peak=0.0, memory=0.0, bandwidth=0.0, link=0.0)
# Bytes of VMEM that kernels for TPUs may count on, whichever of the chips they run on.
LEAST_SCRATCHPAD = min(chip.scratchpad for chip in CHIPS.values() if chip.scratchpad)
