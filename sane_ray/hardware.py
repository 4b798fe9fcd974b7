"""What accelerators can do, by the names that torch and Ray give them, and what this processor can do, measured.

Numbers are the makers' data sheets: dense matrix products (half of what is printed "with sparsity"), decimal bytes.
Nothing here starts Ray or allocates on a device, except ``measured_peak``, which multiplies matrices on the CPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_GIGA, _TERA = 1e9, 1e12
_MATRIX = 1024
_ROUNDS = 64


@dataclass(frozen=True)
class Device:
    """One accelerator, as one process sees it."""

    name: str
    """Ours, for messages."""
    ray_type: str
    """What Ray calls it: a node with it has the resource ``accelerator_type:<ray_type>``. Some share one."""
    words: tuple[str, ...]
    """Lower-case parts that all stand in torch's name of it."""
    bfloat16: float | None
    """Dense bfloat16 FLOP/s of its matrix units; None where it has none."""
    float32: float
    """FLOP/s in float32, without TF32."""
    memory: float
    """Bytes. A little less than what it really has, which pays for the driver's own."""
    bandwidth: float
    """Bytes/s between the chip and its memory."""
    link: float
    """Bytes/s to the other accelerators of its node, one way."""
    network: float
    """Bytes/s to other nodes, one way, in the usual machine: its share of the node's network cards."""

    def flops(self, dtype: torch.dtype) -> float | None:
        """Peak FLOP/s of matrix products in ``dtype``, bfloat16 or float32."""
        return self.bfloat16 if dtype == torch.bfloat16 else self.float32


def _device(
    name: str,
    ray_type: str,
    words: str,
    bf16: float | None,
    fp32: float,
    gb: float,
    tb_s: float,
    link: float,
    net: float,
) -> Device:
    """A row of the table: names, TFLOP/s in both formats, GB, TB/s of memory, GB/s in the node and between nodes."""
    return Device(
        name=name,
        ray_type=ray_type,
        words=tuple(words.split()),
        bfloat16=None if bf16 is None else bf16 * _TERA,
        float32=fp32 * _TERA,
        memory=gb * _GIGA,
        bandwidth=tb_s * _TERA,
        link=link * _GIGA,
        network=net * _GIGA,
    )


DEVICES = (
    #       name, Ray's type, torch's words, bfloat16 and float32 TFLOP/s, GB, TB/s, link GB/s, network GB/s
    _device("B200", "B200", "b200", 2250, 75, 180, 7.7, 900, 50),
    _device("GH200", "GH200", "gh200", 989.4, 67, 96, 4.0, 450, 50),
    _device("H200 NVL", "H200", "h200 nvl", 835.5, 60, 141, 4.8, 450, 50),
    _device("H200", "H200", "h200", 989.4, 67, 141, 4.8, 450, 50),
    _device("H100 NVL", "H100", "h100 nvl", 835.5, 60, 94, 3.9, 300, 50),
    _device("H100 PCIe", "H100", "h100 pcie", 756.5, 51, 80, 2.0, 64, 25),
    _device("H100", "H100", "h100", 989.4, 67, 80, 3.35, 450, 50),
    _device("H20", "H20", "h20", 148, 44, 96, 4.0, 450, 50),
    _device("A100 80GB PCIe", "A100", "a100 80gb pcie", 312, 19.5, 80, 1.935, 32, 12.5),
    _device("A100 80GB", "A100", "a100 80gb", 312, 19.5, 80, 2.039, 300, 25),
    _device("A100 40GB PCIe", "A100", "a100 pcie", 312, 19.5, 40, 1.555, 32, 12.5),
    _device("A100 40GB", "A100", "a100", 312, 19.5, 40, 1.555, 300, 25),
    _device("L40S", "L40S", "l40s", 362, 91.6, 48, 0.864, 32, 12.5),
    _device("L4", "L4", "l4", 121, 30.3, 24, 0.3, 32, 6.25),
    _device("A10G", "A10G", "a10g", 70, 31.2, 24, 0.6, 32, 6.25),
    _device("A10", "A10", "a10", 125, 31.2, 24, 0.6, 32, 6.25),
    _device("RTX 4090", "GeForce-RTX-4090", "rtx 4090", 165.2, 82.6, 24, 1.008, 32, 1.25),
    _device("V100 32GB", "V100", "v100 32gb", None, 15.7, 32, 0.9, 150, 12.5),
    _device("V100 16GB", "V100", "v100", None, 15.7, 16, 0.9, 150, 12.5),
    _device("T4", "T4", "t4", None, 8.1, 16, 0.32, 16, 6.25),
    _device("MI300X", "AMD-Instinct-MI300X-OAM", "mi300x", 1307.4, 163.4, 192, 5.3, 448, 50),
)
"""Of several that fit a name, the first is meant."""


def device_of(name: str) -> Device | None:
    """The device that torch calls ``name`` (``torch.cuda.get_device_name``); None if it is not in the table.

    Words are compared whole: an L40S is no L4, and a GH200 no H200. A MIG slice is not the GPU that it is a part of.
    """
    words = name.lower().replace("-", " ").replace("_", " ").split()
    if "mig" in words:
        return None
    return next((device for device in DEVICES if set(device.words) <= set(words)), None)


def devices_of_ray_type(ray_type: str) -> list[Device]:
    """All devices that Ray calls ``ray_type``; the users' own labels A100-40G and A100-80G tell those two apart."""
    kind, _, size = ray_type.partition("-") if ray_type.startswith("A100-") else (ray_type, "", "")
    memory = float(size.rstrip("G")) * _GIGA if size.rstrip("G").isdigit() else None
    return [d for d in DEVICES if d.ray_type == kind and memory in (None, d.memory)]


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Dense FLOP/s of matrix products in ``dtype``: what model FLOP/s are divided by for MFU.

    Of a GPU by its name; None for one that is not in the table, and for a CPU: see ``measured_peak``.
    """
    if device.type != "cuda":
        return None
    known = device_of(torch.cuda.get_device_name(device))
    return known.flops(dtype) if known else None


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bfloat16 natively, and not slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def measured_peak(threads: int, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of a few matrix products on the CPU, which has no one peak by name.

    The best of many, not the mean: other processes can only slow it down.

    Args:
        threads: of the products, as training has.
        dtype: bfloat16 or float32.
        seconds: after which no further product is begun.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = (torch.randn(_MATRIX, _MATRIX).to(dtype) for _ in range(2))
        left @ right  # the first call prepares the kernel
        fastest, began = float("inf"), time.perf_counter()
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            left @ right
            end = time.perf_counter()
            fastest = min(fastest, end - start)
            if end - began > seconds:
                break
    finally:
        torch.set_num_threads(before)
    return 2 * _MATRIX**3 / fastest
