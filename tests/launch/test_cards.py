"""Which cards a run gets."""

from __future__ import annotations

import pytest

from paddlemix.errors import UserError
from paddlemix.launch import cards
from paddlemix.launch.cards import Cards, choose_cards, planned_cards
from paddlemix.launch.options import LaunchOptions


@pytest.fixture(autouse=True)
def a_machine_with_four_gpus(monkeypatch):
    monkeypatch.setattr(cards, "expected_kind", lambda: "gpu")
    monkeypatch.setattr(cards, "ask_paddle", lambda: {"gpu": 4, "cpu": 1})


def choose(device=None, environment=None, **options):
    return choose_cards(LaunchOptions(**options), device, environment or {})


def test_all_cards_unless_some_are_named():
    assert choose() == Cards("gpu", ("0", "1", "2", "3"), ("0", "1", "2", "3"), 4)
    assert choose(processes=2).names == ("0", "1")
    assert choose(devices=("2", "3")) == Cards("gpu", ("2", "3"), ("2", "3"), 2)


def test_numbers_are_those_of_the_visible_cards():
    visible = {"CUDA_VISIBLE_DEVICES": "4,6,7"}
    assert choose(environment=visible) == Cards("gpu", ("4", "6", "7"), ("0", "1", "2"), 3)
    assert choose(environment=visible, devices=("7", "4")) == Cards("gpu", ("7", "4"), ("2", "0"), 2)


def test_an_npu_under_ascend_s_variable_counts_from_0(monkeypatch):
    monkeypatch.setattr(cards, "ask_paddle", lambda: {"npu": 2, "cpu": 1})
    assert choose("npu", {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}).numbers == ("0", "1")
    assert choose("npu", {"NPU_VISIBLE_DEVICES": "4,5"}, devices=("5",)).numbers == ("1",)


def test_on_cpu_there_are_processes(monkeypatch):
    assert choose("cpu", processes=3) == Cards("cpu", (), (), 3)
    monkeypatch.setattr(cards, "expected_kind", lambda: "cpu")
    assert choose() == Cards("cpu", (), (), 1)


def test_a_build_for_cards_that_sees_none_computes_on_cpu(monkeypatch):
    monkeypatch.setattr(cards, "ask_paddle", lambda: {"cpu": 1})
    assert choose(processes=2) == Cards("cpu", (), (), 2)


def plan(device=None, **options):
    return planned_cards(LaunchOptions(is_dry=True, **options), device, {})


@pytest.mark.parametrize("expected", ["gpu", "cpu"])
def test_an_estimate_is_for_as_many_cards_as_are_named_even_where_there_are_none(monkeypatch, expected):
    monkeypatch.setattr(cards, "expected_kind", lambda: expected)
    monkeypatch.setattr(cards, "ask_paddle", lambda: pytest.fail("nobody needs to be asked"))
    for device in (None, "gpu", "npu"):
        assert plan(device, processes=8).processes == 8
        assert plan(device, devices=("0", "1", "5")).names == ("0", "1", "5")
    assert plan("gpu", devices=("0",)).processes == plan("gpu", devices=("8",), processes=1).processes == 1
    assert plan("cpu", processes=3) == Cards("cpu", (), (), 3)


def test_without_a_number_an_estimate_is_for_the_cards_of_a_run(monkeypatch, capsys):
    assert plan().processes == 4
    monkeypatch.setattr(cards, "ask_paddle", lambda: {"cpu": 1})
    assert plan().processes == 1
    assert "write --nproc N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "options", "parts"),
    [
        ("gpu", {"devices": ("8",)}, ["--devices 8 names one card", "--nproc 8", "--nproc 1"]),
        (None, {"devices": ("8",)}, ["--devices 8 names one card"]),
        ("gpu", {"devices": ("a", "b")}, ["no gpu a"]),
        ("gpu:1", {"processes": 2}, ["'gpu:1' names one card"]),
        ("npu", {}, ["'npu' cannot be used", "--nproc N"]),
    ],
)
def test_an_estimate_of_another_number_than_was_meant_is_refused(device, options, parts):
    with pytest.raises(UserError) as error:
        plan(device, **options)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("device", "environment", "options", "parts"),
    [
        ("npu:3", {}, {}, ["'npu:3' names one card", "device=npu", "--devices 3"]),
        ("cpu", {}, {"devices": ("0", "1")}, ["--devices 0,1 names cards", "--nproc"]),
        ("npu", {}, {}, ["'npu' cannot be used", "gpu, cpu"]),
        (None, {}, {"processes": 5}, ["--nproc 5", "there are 4: 0, 1, 2, 3"]),
        (None, {"CUDA_VISIBLE_DEVICES": "4,5"}, {"devices": ("0",)}, ["no gpu 0", "visible are 4, 5"]),
        (None, {}, {"devices": ("a",)}, ["no gpu a"]),
    ],
)
def test_wrong_cards_are_named_with_those_that_there_are(device, environment, options, parts):
    with pytest.raises(UserError) as error:
        choose(device, environment, **options)
    assert all(part in str(error.value) for part in parts), str(error.value)
