"""The loss is checked when it is there: at once on a CPU, a step later on an accelerator."""

from types import SimpleNamespace

import pytest
import torch

from bayestune.training.callbacks import FiniteLoss, NotFiniteError

ARGS = SimpleNamespace(output_dir="out")


class OnAccelerator:
    """A loss that is still being computed: to read it before its event has come is a mistake."""

    device = torch.device("cuda", 0)

    def __init__(self, value, log):
        self.value = value
        self.log = log

    def detach(self):
        return self

    def to(self, device, non_blocking):
        assert (device, non_blocking) == ("cpu", True)
        return self

    def __float__(self):
        self.log.append("read")
        return self.value


@pytest.fixture
def log(monkeypatch):
    events = []
    event = SimpleNamespace(synchronize=lambda: events.append("waited"))
    stream = SimpleNamespace(record_event=lambda: event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: stream)
    return events


@pytest.fixture
def finite():
    return FiniteLoss()


def state(step):
    return SimpleNamespace(global_step=step, max_steps=9)


def control(**asked):
    return SimpleNamespace(**{"should_save": False, "should_log": False, **asked})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_on_a_cpu_a_bad_loss_stops_its_own_step(finite, value):
    finite.record(torch.tensor(1.0), state(3), ARGS)
    message = f"is {value} at step 5 of 9; training stopped, checkpoints in out"
    with pytest.raises(NotFiniteError, match=message):
        finite.record(torch.tensor(value), state(4), ARGS)


def test_on_an_accelerator_a_step_is_not_waited_for_and_the_next_one_finds_it(finite, log):
    finite.record(OnAccelerator(float("nan"), log), state(4), ARGS)
    finite.on_step_end(ARGS, state(5), control())
    assert log == []
    with pytest.raises(NotFiniteError, match="the loss is nan at step 5 of 9"):
        finite.record(OnAccelerator(1.0, log), state(5), ARGS)
    assert log == ["waited", "read"]


@pytest.mark.parametrize(
    ("step", "asked"),
    [(5, {"should_save": True}), (5, {"should_log": True}), (9, {})],
    ids=["save", "log", "end"],
)
def test_nothing_is_saved_or_logged_before_the_loss_was_checked(finite, log, step, asked):
    finite.record(OnAccelerator(float("nan"), log), state(step - 1), ARGS)
    with pytest.raises(NotFiniteError):
        finite.on_step_end(ARGS, state(step), control(**asked))


def test_a_good_loss_is_read_once(finite, log):
    finite.record(OnAccelerator(1.0, log), state(0), ARGS)
    finite.check()
    finite.check()
    assert log == ["waited", "read"]
