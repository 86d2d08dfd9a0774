"""Runs for which a measurement is made whatever their length, and that bf16 wins."""

from ldam_plugins.training import auto_tune
from ldam_plugins.training.race import Race


def bf16_wins(monkeypatch, cache):
    """From now on; returns the names of the contenders of each race."""
    races = []

    def won(contenders, budget, clock):
        for call in contenders.values():
            call()
        races.append([*contenders])
        return Race({"float32": 0.4, "bf16": 0.2}, {"bf16": 0.5}, 0.03, "bf16", 1.0)

    monkeypatch.setattr(auto_tune, "LEAST_PASSES", 0)
    monkeypatch.setattr(auto_tune, "WORTH", 0)
    monkeypatch.setattr(auto_tune, "race", won)
    monkeypatch.setattr(auto_tune, "cached_assets_path", lambda *names: cache)
    return races
