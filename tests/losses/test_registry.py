import pytest

from ldam_plugins import create_loss, list_losses
from ldam_plugins.losses import ClassificationLoss, LDAMLoss, loss_class, loss_options, losses_with

COUNTS = [5000, 1077, 232, 50]


@pytest.mark.parametrize("name", list_losses())
def test_options_of_a_loss_are_what_it_takes_and_keeps(name):
    loss = create_loss(name, COUNTS)
    assert type(loss) is loss_class(name)
    assert issubclass(loss_class(name), ClassificationLoss)
    options = {option: getattr(loss, option) for option in loss_options(name)}
    assert repr(create_loss(name, COUNTS, **options)) == repr(loss)
    assert {"reduction", "ignore_index"} <= {*options}
    assert all(losses_with(option)[name] == value for option, value in options.items())


def test_a_class_by_its_name():
    assert loss_class("ldam") is LDAMLoss


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: create_loss("ladm", COUNTS), ValueError, r"'ladm'\. Did you mean .*'ldam'"),
        (lambda: loss_options("ladm"), ValueError, r"'ladm'\. Did you mean .*'ldam'"),
        (lambda: create_loss("ce", COUNTS, tau=1), TypeError, r"an option of 'ce'.*got 'tau'"),
    ],
)
def test_what_is_not_known_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
