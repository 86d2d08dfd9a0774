import io

import pandas as pd
from PIL import Image

from ldam_plugins.reports.mistakes import MOST_A_CLASS, PICTURE, read_mistakes, write_mistakes
from ldam_plugins.training.run_dir import PREDICTION_FILES


def write_predictions(folder, labels, predicted, probability, part="test"):
    columns = {"label": labels, "predicted": predicted, "probability": probability}
    table = pd.DataFrame({"example": [f"e{row}" for row in range(len(labels))], **columns})
    table.to_csv(folder / PREDICTION_FILES[part], index=False)


def test_the_surest_mistakes_come_first_and_few_of_a_class(tmp_path):
    labels = ["NA"] * 5 + ["1", "1", "2"]
    predicted = ["1"] * 5 + ["1", "2", "NA"]
    sure = [0.5, 0.9, 0.6, 0.8, 0.7, 1.0, 0.95, 0.4]
    write_predictions(tmp_path, labels, predicted, sure, part="validation")
    texts = [f"text {row}\nof two lines, 'quoted'" for row in range(8)]
    write_mistakes(tmp_path, texts.__getitem__, "validation")
    found = read_mistakes(tmp_path)
    assert MOST_A_CLASS == 3
    assert [each.example for each in found] == ["e6", "e1", "e3", "e4", "e7"]
    assert (found[0].label, found[0].predicted, found[0].probability) == ("1", "2", 0.95)
    assert found[1].label == "NA"
    assert found[1].text.startswith("text 1\nof two lines, 'quoted'")
    assert all(each.picture is None for each in found)


def test_pictures_are_kept_small_beside_the_table(tmp_path):
    write_predictions(tmp_path, ["a", "b", "b"], ["b", "b", "a"], [0.6, 0.9, 0.7])
    images = [Image.new(mode, size) for mode, size in (("RGBA", (400, 20)), ("L", (1, 1)))]
    images.append(Image.new("I;16", (8, 8)))
    write_mistakes(tmp_path, images.__getitem__)
    first, second = read_mistakes(tmp_path)
    assert (first.example, second.example) == ("e2", "e0")
    assert Image.open(io.BytesIO(second.picture)).size == (PICTURE, PICTURE // 20)
    assert Image.open(io.BytesIO(first.picture)).size == (8, 8)
    assert first.text == ""


def test_a_run_without_predictions_or_mistakes_has_none(tmp_path):
    write_mistakes(tmp_path, str)
    assert read_mistakes(tmp_path) == []
    write_predictions(tmp_path, ["a"], ["a"], [1.0])
    write_mistakes(tmp_path, str)
    assert read_mistakes(tmp_path) == []
