from dataclasses import dataclass

import pytest

from ldam_plugins.training.options import COUNT, POSITIVE, check_limits, option


@dataclass
class Options:
    lr: float = option(0.1, "learning rate")
    size: int | None = option(None, "side of the images")
    milestones: list[int] = option([80], "epochs")

    def __post_init__(self):
        check_limits(self, {"lr": POSITIVE, "size": COUNT, "milestones": COUNT})


def test_lists_are_copied_for_every_instance():
    Options().milestones.append(90)
    assert Options().milestones == [80]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lr": 0}, ValueError, "`lr` must be a finite number > 0, got 0.*another --lr or leave"),
        ({"lr": "1"}, TypeError, "`lr` must be a finite number > 0, got '1'"),
        ({"size": 1.5}, TypeError, "`size` must be an integer >= 1"),
        ({"milestones": [1, 0]}, ValueError, "`milestones` must be an integer >= 1 .*, got 0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        Options(**given)
