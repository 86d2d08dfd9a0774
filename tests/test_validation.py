import pytest

from ldam_plugins._validation import check_choice, check_int, check_real, invalid


def test_an_error_names_the_argument_the_rule_the_value_and_the_way_out():
    error = invalid("beta", "in [0, 1)", 1.0, hint="Use 0.9999.")
    assert type(error) is ValueError
    assert str(error) == "`beta` must be in [0, 1), got 1.0. Use 0.9999."
    assert str(invalid("beta", "a number", "x", error=TypeError)) == (
        "`beta` must be a number, got 'x'"
    )


@pytest.mark.parametrize("value", [True, "1", None, 1j])
def test_what_is_no_number_is_of_a_wrong_type(value):
    with pytest.raises(TypeError, match="`x` must be"):
        check_real("x", value)
    with pytest.raises(TypeError, match="`x` must be an integer"):
        check_int("x", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.0, 10**400])
def test_numbers_outside_of_an_interval(value):
    with pytest.raises(ValueError, match=r"`x` must be in \[0, 1\), got"):
        check_real("x", value, low=0, high=1, high_open=True)


def test_bounds_are_inside_where_they_are_closed():
    assert check_real("x", 0, low=0, high=1) == 0.0
    assert check_int("x", 3, low=3, high=3) == 3
    with pytest.raises(ValueError, match="`x` must be an integer >= 4, got 3"):
        check_int("x", 3, low=4)


def test_near_names_come_before_the_hint():
    assert check_choice("loss", "ce", ["ce", "focal"]) == "ce"
    with pytest.raises(
        ValueError, match=r"`loss` must be one of 'ce', 'focal', got 'fokal'.*fo"
    ) as e:
        check_choice("loss", "fokal", ["ce", "focal"], hint="See --help.")
    assert "Did you mean 'focal'?" in str(e.value)
    assert "See --help." in str(e.value)
