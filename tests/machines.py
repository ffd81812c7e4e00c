"""Made-up machines: GPUs as `pipeline.engine.accelerators` or the drivers' tools would describe them."""

from pipeline.common.gpu import Gpu

GB = 10**9

T4 = Gpu(
    "cuda", "Tesla T4", 15_843_721_216, 15_500_000_000, (7, 5), "GPU-1f22a253-c329-dfb7-0db4-e005efb6a4c7"
)
RTX_3060 = Gpu("cuda", "NVIDIA GeForce RTX 3060", 12_628_656_128, 12_000_000_000, (8, 6), "GPU-b0b94adc")
H100 = Gpu("cuda", "NVIDIA H100 80GB HBM3", 84_929_347_584, 84_000_000_000, (9, 0), "GPU-5c89852c")
MIG_SLICE = Gpu("cuda", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * GB, None, (9, 0), "MIG-c6d4f1ef")
MI300 = Gpu("rocm", "AMD Instinct MI300X", 206_141_652_992, 205_830_430_720)
MAX_1550 = Gpu("xpu", "Intel(R) Data Center GPU Max 1550", 68_719_476_736, 65_000_000_000)
APPLE = Gpu("mps", "Apple GPU", 17_179_869_184, 9 * GB)
UNREADABLE = Gpu("cuda", "an NVIDIA GPU")
