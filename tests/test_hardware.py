import pytest
import torch

from sane_ray.hardware import DEVICES, device_of, devices_of_ray_type, measured_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "ours", "teraflops", "gigabytes"),
    [
        ("NVIDIA H200", "H200", 989.4, 141),
        ("NVIDIA H200 NVL", "H200 NVL", 835.5, 141),
        ("NVIDIA GH200 480GB", "GH200", 989.4, 96),
        ("NVIDIA H100 80GB HBM3", "H100", 989.4, 80),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756.5, 80),
        ("NVIDIA H100 NVL", "H100 NVL", 835.5, 94),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 312, 40),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 312, 80),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB PCIe", 312, 40),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe", 312, 80),
        ("NVIDIA L40S", "L40S", 362, 48),
        ("NVIDIA L4", "L4", 121, 24),
        ("NVIDIA A10G", "A10G", 70, 24),
        ("NVIDIA B200", "B200", 2250, 180),
        ("AMD Instinct MI300X", "MI300X", 1307.4, 192),
    ],
)
def test_devices_are_found_by_the_names_torch_gives_them(name, ours, teraflops, gigabytes):
    device = device_of(name)
    assert device.name == ours
    assert device.flops(torch.bfloat16) == teraflops * 1e12
    assert device.memory == gigabytes * 1e9


@pytest.mark.parametrize(("name", "memory"), [("Tesla V100-SXM2-16GB", 16e9), ("Tesla V100-PCIE-32GB", 32e9)])
def test_devices_without_bfloat16_have_no_peak_of_it(name, memory):
    device = device_of(name)
    assert device.flops(torch.bfloat16) is None
    assert device.flops(torch.float32) == 15.7e12
    assert device.memory == memory
    assert device_of("Tesla T4").flops(torch.bfloat16) is None


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "NVIDIA L40", "", "NVIDIA RTX A1000"])
def test_a_device_that_is_not_known_is_not_guessed(name):
    assert device_of(name) is None


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb"])
def test_a_slice_of_a_device_is_not_the_device(name):
    assert device_of(name) is None


def test_every_device_is_found_by_its_own_words():
    for device in DEVICES:
        assert device_of("Maker " + " ".join(device.words)) == device
        assert device in devices_of_ray_type(device.ray_type)


def test_one_type_of_ray_can_be_several_devices():
    assert {device.memory for device in devices_of_ray_type("A100")} == {40e9, 80e9}
    assert {device.memory for device in devices_of_ray_type("A100-80G")} == {80e9}
    assert [device.name for device in devices_of_ray_type("L40S")] == ["L40S"]
    assert devices_of_ray_type("AMD-Instinct-MI300X-OAM")
    assert devices_of_ray_type("TPU-V4") == []
    assert devices_of_ray_type("A100-SXM") == devices_of_ray_type("A100")


def test_a_processor_has_a_measured_peak_and_none_by_name():
    assert peak_flops(torch.device("cpu")) is None
    threads = torch.get_num_threads()
    peak = measured_peak(1, torch.float32)
    assert 1e8 < peak < 1e14
    assert torch.get_num_threads() == threads
