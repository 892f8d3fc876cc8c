"""Rates of a device."""

from lowmem.train.rates import measured_rates


def test_rates_are_of_products_and_copies() -> None:
    """On the CPU, where the time of one product can be taken by hand."""
    tflops, bandwidth = measured_rates("cpu", side=64, seconds=0.02)
    assert 1e-6 < tflops < 10
    assert 1e-3 < bandwidth < 10_000
