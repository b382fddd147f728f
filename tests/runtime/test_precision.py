"""What `--amp auto` comes to on which hardware."""

import contextlib
import logging

import pytest
import torch

from scripts.runtime import precision
from scripts.runtime.options import normalise
from scripts.runtime.precision import settled_amp


@pytest.fixture
def cpu_with(monkeypatch):
    """``cpu_with(*units)``: a processor with these units."""

    def set_units(*units):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))

    return set_units


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(bf16)``: a GPU that computes in bfloat16, or only emulates it."""

    def set_gpu(bf16):
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16
        )

    return set_gpu


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (["amx_bf16", "avx512_bf16"], True),
        (["avx512_bf16"], True),
        (["avx2", "avx512_f"], False),
        (["arm_bf16"], False),
    ],
)
def test_on_a_cpu_its_units_decide(cpu_with, units, expected, caplog):
    cpu_with(*units)
    with caplog.at_level(logging.INFO):
        assert settled_amp("auto", "cpu") is expected
    assert ("bfloat16 on a CPU with" in caplog.text) == expected and "--amp auto" in caplog.text
    assert settled_amp("auto", "cpu", "float16") is False
    assert settled_amp(True, "cpu") is True and settled_amp("False", "cpu") is False


def test_on_a_gpu_emulation_does_not_count(gpu):
    for bf16 in (True, False):
        gpu(bf16)
        assert settled_amp("auto", "cuda:0") is bf16
        assert settled_amp("auto", "cuda:0", "float16") is True


@pytest.mark.parametrize("units", [["amx_bf16"], []])
@pytest.mark.parametrize("recorded", [True, False])
def test_what_is_recorded_comes_before_the_hardware_and_what_is_asked_for_before_both(cpu_with, units, recorded):
    cpu_with(*units)
    assert settled_amp("auto", "cpu", recorded=recorded) is recorded
    assert settled_amp(not recorded, "cpu", recorded=recorded) is not recorded


def test_without_onednn_there_is_nothing_fast(cpu_with, monkeypatch):
    cpu_with("amx_bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not any(precision.bfloat16_units().values())


@pytest.mark.parametrize(
    ("value", "meant"), [("auto", "auto"), ("AUTO", "auto"), ("TRUE", True), (True, True), ("false", False), (0, False)]
)
def test_spellings(value, meant):
    assert normalise("amp", value) == meant


def test_senseless_values_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^--amp 'perhaps' .*expected auto, true or false[^\n]*$"):
        normalise("amp", "perhaps")
    with pytest.raises(ValueError, match="amp_dtype must be bfloat16 or float16, got 'fp8'"):
        settled_amp("auto", "cpu", "fp8")
