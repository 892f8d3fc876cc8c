"""What `--gpu` accepts, what it becomes, and whether the table of cards holds together."""

import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowmem.errors import ConfigError, HardwareError
from lowmem.planner.calibration import Calibration
from lowmem.planner.hardware import (
    SmiReading,
    available_memory,
    card_facts,
    find_card,
    processor,
    rates_of_device,
)
from lowmem.units import GIB, MIB

ROOT = Path(__file__).parents[2]
TABLE = tomllib.loads((ROOT / "configs" / "cards.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("gpu", "mib"),
    [
        ("8GB", 8188),
        ("10GB", 10240),
        ("12GB", 12282),
        ("16GB", 16376),
        ("24GB", 24564),
        ("24 gb", 24564),
        ("80GB", 81559),
        ("24GiB", 24576),
        ("20000MiB", 20000),
        ("8192 mib", 8192),
    ],
)
def test_gb_is_a_class_of_card_and_other_units_are_exact(gpu: str, mib: int) -> None:
    assert find_card(gpu, "auto").total == mib * MIB


def test_a_class_nobody_sells_says_what_it_was_taken_for() -> None:
    card = find_card("18GB", "auto")
    assert card.total == 18414 * MIB  # 18 * 1024 * 0.999 = 18413.6
    assert "18414 MiB" in card.name


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("RTX_4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("rtx4090-24gb", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090-laptop"),
        ("rtx3060", "rtx3060-12gb"),
        ("rtx3060-12gb", "rtx3060-12gb"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070ti-super"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
    ],
)
def test_cards_are_found_as_people_and_drivers_write_them(gpu: str, name: str) -> None:
    assert find_card(gpu, "auto").name == card_facts(gpu).name == name


def test_usable_is_what_context_desktop_and_margin_leave() -> None:
    card = find_card("rtx4090", "auto")
    assert (card.context, card.others, card.source) == (500 * MIB, 300 * MIB, "preset")
    assert card.usable_bytes == 24564 * MIB - 800 * MIB - round(0.03 * 24564 * MIB)
    assert find_card("a100-80gb", "auto").others == 0
    assert find_card("80GB", "auto").others == 0


@pytest.mark.parametrize("gib", TABLE["classes"])
def test_a_class_has_the_rates_of_a_card_with_about_its_memory(gib: str) -> None:
    row = TABLE["classes"][gib]
    like = card_facts(row["like"])
    assert like.total == pytest.approx(row["mib"] * MIB, rel=0.01)
    assert find_card(f"{gib}GB", "auto").rates == like.rates


def test_a_size_that_is_no_card_has_no_rates() -> None:
    assert find_card("24GiB", "auto").rates is None
    assert find_card("18GB", "auto").rates is None
    assert find_card("auto", "cpu").rates is None


@pytest.mark.parametrize(
    ("driver", "gib", "card"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA H200", 141, "h200"),
        ("NVIDIA GeForce RTX 3060", 12, "rtx3060-12gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 8, "rtx4060ti-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "rtx4060ti-16gb"),
        ("Imagined Accelerator 9", 24, None),
    ],
)
def test_rates_of_a_device_at_hand(driver: str, gib: int, card: str | None) -> None:
    rates = rates_of_device(driver, gib * GIB)
    assert rates == (card_facts(card).rates if card else None)


@pytest.mark.parametrize("gpu", ["0GB", "0", "24", "100MiB", "5000GB", "2TB", "-5GB", "4x"])
def test_sizes_that_no_card_has_are_refused(gpu: str) -> None:
    with pytest.raises(ConfigError, match=f"gpu = '{gpu}'") as caught:
        find_card(gpu, "auto")
    assert caught.value.exit_code == 2
    assert "24GB" in caught.value.why
    assert caught.value.fix


@pytest.mark.parametrize(
    ("gpu", "fix"), [("24", "24GB"), (" 16 ", "16GB"), ("4090", "rtx4090"), ("0", "24GB")]
)
def test_a_number_without_a_unit_is_not_guessed(gpu: str, fix: str) -> None:
    with pytest.raises(ConfigError, match="has no unit") as caught:
        find_card(gpu, "auto")
    assert caught.value.fix == f'gpu = "{fix}"'


@pytest.mark.parametrize(
    "gpu", ["banana", "", "(", "rtx", "rtx30", "t4-0gb", "9" * 400 + "GB", "t4" + "9" * 400 + "gb"]
)
def test_what_is_no_card_at_all_is_refused(gpu: str) -> None:
    with pytest.raises(ConfigError):
        find_card(gpu, "auto")


def test_a_misspelt_card_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="rtx4099") as caught:
        find_card("rtx4099", "auto")
    assert "rtx4090" in caught.value.fix


def test_a_name_with_two_sizes_asks_which() -> None:
    with pytest.raises(ConfigError, match="several sizes") as caught:
        find_card("RTX 4060 Ti", "auto")
    assert caught.value.why == "known are rtx4060ti-8gb, rtx4060ti-16gb"
    with pytest.raises(ConfigError, match="no such card"):
        find_card("rtx4090-48gb", "auto")


@pytest.fixture
def cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 24 GB card on which a desktop and our young context use 1,000 MiB, and torch holds 64."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((24217 - 1064) * MIB, 24217 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 64 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="4b1f"))
    driver = [SmiReading("77aa", "1", 0), SmiReading("4b1f", "581.57", 0)]
    monkeypatch.setattr(SmiReading, "all", lambda: driver)


@pytest.mark.usefixtures("cuda_device")
def test_auto_measures_the_device_at_hand() -> None:
    card = find_card("auto", "auto")
    assert (card.name, card.source, card.kind) == ("NVIDIA GeForce RTX 4090", "measured", "cuda")
    assert card.total == 24217 * MIB
    assert card.context + card.others == 1000 * MIB


@pytest.mark.usefixtures("cuda_device")
@pytest.mark.parametrize(("driver", "used"), [("581.57", True), ("582.00", False)])
def test_auto_takes_the_constants_measured_on_this_card_with_this_driver(
    driver: str, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path))
    kept = Calibration(
        date="2026-11-21T13:00:00Z",
        lowmem="0.1.0",
        torch=torch.__version__,
        driver=driver,
        name="NVIDIA GeForce RTX 4090",
        uuid="4b1f",
        total=24217 * MIB,
        context=400 * MIB,
        workspace=17 * MIB,
    )
    kept.write()
    card = find_card("auto", "auto")
    assert (card.context, card.others) == ((400 * MIB, 600 * MIB) if used else (500 * MIB,) * 2)
    assert (card.calibration is not None) is used
    assert card.presets == (["margin"] if used else ["context", "margin", "workspace"])


@pytest.mark.usefixtures("cuda_device")
def test_auto_on_the_cpu_counts_host_memory_even_beside_a_gpu() -> None:
    card = find_card("auto", "cpu")
    assert (card.kind, card.context, card.others) == ("cpu", 0, 0)
    assert card.usable_bytes == pytest.approx(0.9 * card.total)


def test_without_cuda_auto_is_the_host_and_cuda_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_card("auto", "auto").kind == "cpu"
    with pytest.raises(HardwareError, match="no CUDA device"):
        find_card("auto", "cuda")
    assert find_card("24GB", "cuda").kind == "cuda"  # planning needs no device


def test_planning_for_a_named_card_imports_no_torch() -> None:
    code = "from lowmem.planner.hardware import find_card; find_card('rtx4090', 'auto')"
    code += "; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_host_memory_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 32000 kB\nMemFree:  100 kB\nMemAvailable:   20000 kB\n")
    assert available_memory(meminfo) == 20000 * 1024
    assert available_memory(tmp_path / "none") > GIB // 4


def test_a_processor_has_the_name_that_it_gives_itself(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("vendor_id\t: x\nmodel name\t: Imagined 9 @ 3 GHz\n")
    assert processor(tmp_path / "cpuinfo").startswith("Imagined 9 @ 3 GHz, ")
    assert processor(tmp_path / "none").endswith(" cores")


def test_every_card_of_the_table_is_found_and_plausible() -> None:
    assert len(TABLE["cards"]) >= 45
    for name, row in TABLE["cards"].items():
        for word in (name, *row.get("also", ())):
            assert card_facts(word).name == name
        facts = card_facts(name)
        assert facts.total == row["mib"] * MIB
        assert 6000 <= row["mib"] <= 200_000
        assert 150 < facts.bandwidth < 10_000
        assert 5 < facts.tflops < 3000
        assert facts.desktop is row["desktop"]
        assert facts.watts is None or 50 < facts.watts <= 1000


def test_a_size_in_a_name_is_its_memory() -> None:
    for name, row in TABLE["cards"].items():
        word = name.rpartition("-")[2]
        if word.endswith("gb"):
            assert row["mib"] / 1024 == pytest.approx(int(word[:-2]), rel=0.02)


def test_a_plan_for_a_class_fits_every_desktop_card_of_it() -> None:
    """What a class may reserve leaves context and desktop on its smallest member."""
    for number in TABLE["classes"]:
        plan = find_card(f"{number}GB", "auto")
        for row in TABLE["cards"].values():
            if row["desktop"] and abs(row["mib"] / 1024 / int(number) - 1) < 0.02:
                assert plan.usable_bytes + plan.context + plan.others <= row["mib"] * MIB
