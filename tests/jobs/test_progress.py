import pytest

from longqlora.jobs.progress import duration, newest_step, step_of


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (18.2, "18 s"), (59.6, "1 min 0 s"), (221, "3 min 41 s"), (18120, "5 h 2 min")]
)
def test_a_time_has_two_units_at_most(seconds, text):
    assert duration(seconds) == text


def test_the_newest_step_is_found_in_a_log():
    lines = [f"12:00:0{step} INFO {step_of(step, 60, 60 - step)}: loss 4.1, 900 tokens/s\n" for step in (1, 2, 3)]
    assert newest_step("".join(lines)) == "step 3 of 60, 57 s left"
    assert newest_step("12:00:00 INFO 155648 parameters are trained\n") is None


def test_the_last_step_has_no_time_left():
    assert step_of(60, 60, 0.0) == "step 60 of 60"
