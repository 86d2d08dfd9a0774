import pytest
from made_records import method


@pytest.fixture
def records():
    return [
        *method("ce", "none", [30.0, 31.0, 29.5]),
        *method("ce", "drw", [27.0, 28.4, 26.1]),
        *method("ldam", "none", [29.0, 32.0, 29.7]),
        *method("ldam", "drw", [20.0, 20.8, 19.9]),
    ]
