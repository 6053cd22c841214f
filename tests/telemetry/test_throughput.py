import pytest

from jaxtune.telemetry.throughput import Throughput, Window


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_window_lasts_until_its_last_step_is_done(clock):
    throughput = Throughput(flops_per_step=6e9, peak=1e12, clock=clock)
    throughput.resume()
    throughput.count(100)
    throughput.count(50)
    window = throughput.close()
    throughput.count(70)  # launched before the window's end is seen
    clock.now += 3.0
    assert window == Window(steps=2, tokens=150)
    assert throughput.rates(window) == {"tokens_per_second": 50.0, "flops_per_second": 4e9, "mfu": 4e-3}
    clock.now += 7.0
    assert throughput.rates(throughput.close())["tokens_per_second"] == 10.0


def test_evaluation_takes_no_time_and_loses_no_steps(clock):
    throughput = Throughput(flops_per_step=1.0, peak=None, clock=clock)
    throughput.resume()
    throughput.count(30)
    clock.now += 2.0
    throughput.pause()
    clock.now += 1000.0
    throughput.resume()
    throughput.count(30)
    clock.now += 4.0
    assert throughput.rates(throughput.close()) == {"tokens_per_second": 10.0, "flops_per_second": pytest.approx(1 / 3)}
