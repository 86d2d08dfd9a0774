import copy
import io

import numpy as np
import pytest
from PIL import Image

from ldam_plugins.benchmark.plots import PLOTS, _curve, digest, heat_map


def test_plots_tell_what_they_were_drawn_from(records):
    for _, draw in PLOTS.values():
        light, dark = draw(records), draw(records, dark=True)
        with Image.open(io.BytesIO(light)) as plot:
            assert plot.info["Results"] == digest(records)
            assert plot.size[0] == 1200
        assert light != dark
    changed = copy.deepcopy(records)
    changed[0]["test"]["top1_error"] += 1
    assert digest(changed) != digest(records)
    assert digest(records[::-1]) == digest(records)
    with pytest.raises(ValueError, match="two losses"):
        heat_map(records[:3])


def test_curve_goes_from_head_to_tail_whatever_the_order_of_classes(records):
    run = copy.deepcopy(records[0])
    run["class_counts"] = [5, 300, 30]
    run["test"]["per_class_accuracy"] = [0.1, 0.9, None]
    places, accuracy = _curve([run])
    assert (places.tolist(), accuracy.tolist()) == ([0, 2], [90.0, 10.0])
    run["class_counts"] = list(range(100, 0, -1))
    run["test"]["per_class_accuracy"] = np.linspace(1, 0, 100).tolist()
    places, accuracy = _curve([run])
    assert len(places) == 25
    assert accuracy[0] == pytest.approx(100 * np.linspace(1, 0, 100)[:4].mean())
