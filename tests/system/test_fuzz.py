"""Random damage to what users hand over: a ValueError that says so, or a run; nothing else.

The suite tries a few hundred cases, ``pytest -m exhaustive tests/system/test_fuzz.py`` 100,000.
"""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import tempfile
from pathlib import Path

import datasets
import options as recipe_options
import pytest
import text_lt
import vision_lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_sets import inaturalist, lists, png, table, write
from paths import RECIPES

from ldam_plugins import ClassCounts, DeferredSchedule
from ldam_plugins.data import load_images
from ldam_plugins.data.readers.base import decode_image

REFUSED = (ValueError, TypeError)
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


def damaged(whole: bytes):
    """Bytes with pieces overwritten, cut out, doubled or cut off."""
    places = st.integers(0, len(whole))

    def apply(edits):
        content = whole
        for kind, start, end, piece in edits:
            start, end = sorted((min(start, len(content)), min(end, len(content))))
            content = {
                "overwrite": content[:start] + piece + content[start + len(piece) :],
                "remove": content[:start] + content[end:],
                "double": content[:end] + content[start:],
                "insert": content[:start] + piece + content[start:],
                "cut": content[:start],
            }[kind]
        return content

    kinds = st.sampled_from(["overwrite", "remove", "double", "insert", "cut"])
    edit = st.tuples(kinds, places, places, st.binary(min_size=1, max_size=8))
    return st.lists(edit, min_size=1, max_size=4).map(apply)


WORDS = st.one_of(
    st.sampled_from(
        ["nan", "inf", "-1", "0", "1e999", "yes", "!!python/name:os.system", "'", "[", "~"]
    ),
    st.integers(-(10**12), 10**25).map(str),
    st.floats().map(str),
    st.text(max_size=12),
)
NAMES = st.sampled_from([field.name for field in recipe_options.fields(vision_lt.VisionOptions)])
PRESET = (RECIPES / "presets" / "cifar10_lt.yaml").read_bytes()
PRESETS = st.one_of(
    damaged(PRESET),
    st.lists(st.tuples(NAMES, WORDS).map(": ".join), max_size=5).map("\n".join).map(str.encode),
)


def check_preset(content):
    for kind in (vision_lt.VisionOptions, text_lt.TextOptions):
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder) / "preset.yaml", content)
            with contextlib.redirect_stderr(io.StringIO()):
                try:
                    parsed = recipe_options.parse_options(kind, [str(path)], default="")
                except (SystemExit, *REFUSED):
                    continue
            parsed.make_schedule()
            json.dumps(dataclasses.asdict(parsed), allow_nan=False)


NUMBERS = st.one_of(
    st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=3), st.integers(1, 10**9)
)


def check_counts(case):
    counts, beta, start = case
    try:
        made = ClassCounts(counts)
        weights = made.weights(beta)
        DeferredSchedule("drw", start)
        margins = made.margins(0.5)
    except REFUSED:
        return
    assert weights.isfinite().all()
    assert margins.isfinite().all()


def check_set(build, name, content):
    """Damage one file of a set; it is read in full or refused."""
    with tempfile.TemporaryDirectory() as folder:
        made = build(Path(folder) / "set")
        write(Path(folder) / "set" / name, content)
        try:
            train, test = load_images(**made)
            for part in (train, test):
                part.find_corrupt()
        except REFUSED:
            pass


@functools.cache
def originals():
    """The bytes that are damaged."""
    folder = Path(tempfile.mkdtemp())
    lists(folder / "a")
    inaturalist(folder / "b")
    table("train").to_parquet(folder / "train.parquet")
    found = {
        "list": (folder / "a" / "train.txt").read_bytes(),
        "json": (folder / "b" / "train2018.json").read_bytes(),
        "parquet": (folder / "train.parquet").read_bytes(),
    }
    shutil.rmtree(folder)
    return found


def check_parquet(content):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        write(root / "train.parquet", content)
        table("test").to_parquet(root / "test.parquet")
        datasets.disable_progress_bars()
        try:
            train, _ = load_images(root, cache_dir=Path(folder) / "cache")
            train.find_corrupt()
        except REFUSED:
            pass


def check_image(content):
    """Any exception is the row's: LabelledImages turns each into a ValueError that names it."""
    try:
        image = decode_image(io.BytesIO(content))
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        return
    assert image.mode == "RGB"


def jpeg():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 200, 30)).save(file, "JPEG")
    return file.getvalue()


# What is damaged, the check, and its cases in the suite and in the exhaustive run.
FUZZED = {
    "presets": (PRESETS, check_preset, 60, 10_000),
    "counts": (
        st.tuples(st.lists(NUMBERS, max_size=4), NUMBERS, NUMBERS),
        check_counts,
        150,
        40_000,
    ),
    "list file": (
        damaged(originals()["list"]),
        functools.partial(check_set, lists, "train.txt"),
        30,
        6_000,
    ),
    "JSON": (
        damaged(originals()["json"]),
        functools.partial(check_set, inaturalist, "train2018.json"),
        30,
        6_000,
    ),
    "parquet": (damaged(originals()["parquet"]), check_parquet, 10, 1_000),
    "PNG": (damaged(png("train", 0)), check_image, 80, 20_000),
    "JPEG": (damaged(jpeg()), check_image, 80, 20_000),
}


def run(name, cases, repeatable):
    strategy, check, *_ = FUZZED[name]

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=repeatable,
        suppress_health_check=SLOW,
    )
    @given(strategy)
    def fuzz(case):
        check(case)

    fuzz()


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("name", FUZZED)
def test_damage_is_told(name):
    run(name, FUZZED[name][2], True)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("name", FUZZED)
def test_damage_is_told_in_100_000_cases(name):
    run(name, FUZZED[name][3], False)


def test_the_exhaustive_run_has_as_many_cases_as_it_says():
    assert sum(cases for *_, cases in FUZZED.values()) >= 100_000
