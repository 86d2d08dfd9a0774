import pytest
from made_records import method

from ldam_plugins.benchmark.regret import regrets
from ldam_plugins.benchmark.tables import regret_rows

ERRORS = {  # by set, learning rate and epochs
    "runs/photos": {(1e-4, 10): [30.0], (5e-4, 10): [21.0], (1e-4, 20): [20.0], (5e-4, 20): [25.0]},
    "runs/birds": {(1e-4, 10): [40.0], (5e-4, 10): [12.0], (1e-4, 20): [30.0], (5e-4, 20): [13.0]},
}


def grid(errors):
    return [
        run
        for dataset, cells in errors.items()
        for (lr, epochs), values in cells.items()
        for run in method("ldam", "drw", values, dataset=dataset, lr=lr, epochs=epochs)
    ]


def test_choice_beside_the_best_of_each_set():
    photos, birds = regrets(grid(ERRORS), {"lr": "0.0005", "epochs": "10"})
    assert (photos.dataset, photos.samples, photos.classes) == ("photos", 435, 4)
    assert (photos.error, photos.best_error, photos.tried) == pytest.approx((21.0, 20.0, 4))
    assert photos.best == {"lr": "0.0001", "epochs": "20"}
    assert photos.points == pytest.approx(1.0)
    assert birds.points == 0.0
    assert birds.best == {"lr": "0.0005", "epochs": "10"}


def test_errors_are_means_over_seeds():
    errors = {"a": {(1.0, 1): [10.0, 20.0], (2.0, 1): [14.0, 15.0]}}
    errors["b"] = {(1.0, 2): [10.0], (2.0, 2): [14.0]}
    first, second = regrets(grid(errors), {"lr": "1"})
    assert (first.error, first.best_error) == pytest.approx((15.0, 14.5))
    assert (second.error, second.points) == pytest.approx((10.0, 0.0))


def test_rows_end_with_the_mean_and_the_most():
    rows = regret_rows(grid(ERRORS), {"lr": "0.0005", "epochs": "10"})
    assert [row["more error, points"] for row in rows] == ["1.0", "0.0", "0.5 (at most 1.0)"]
    assert [row["best of 4 %"] for row in rows] == ["20.0", "12.0", "16.0"]
    assert rows[0]["the best has"] == "lr 0.0001, epochs 20"


def test_bad_choices():
    with pytest.raises(ValueError, match=r"`choice` must be of options that vary: .*lr.*'beta'"):
        regrets(grid(ERRORS), {"beta": "0.9"})
    with pytest.raises(ValueError, match=r"run once on runs.photos, of 4 .*lr 0.0005: 2 times"):
        regrets(grid(ERRORS), {"lr": "0.0005"})
    with pytest.raises(ValueError, match="lr 3, epochs 10: 0 times"):
        regrets(grid(ERRORS), {"lr": "3", "epochs": "10"})
