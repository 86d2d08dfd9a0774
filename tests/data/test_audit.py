import io
import json
import random
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from ldam_plugins.data import LabelledImages, audit_images, audit_texts, duplicates
from ldam_plugins.data.audit_classes import compare_priors, look_alikes
from ldam_plugins.data.readers.base import FileSource, text_table
from ldam_plugins.training.files import to_json


def pattern(seed, size=(60, 40)):
    pixels = np.random.RandomState(seed).randint(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image, form="PNG", **options):
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def images_of(folder, files, names=("ant", "bee")):
    """A set of (content, label) in the order given."""
    folder.mkdir()
    for row, (content, _) in enumerate(files):
        (folder / f"{row}.png").write_bytes(content)
    source = FileSource(folder, [f"{row}.png" for row in range(len(files))])
    return LabelledImages(source, np.array([label for _, label in files]), names)


def pairs(table):
    sides = (("split", "index"), ("other_split", "other_index"))
    return [tuple((row[s], row[i]) for s, i in sides) for row in table.to_dict("records")]


@pytest.fixture
def planted(tmp_path):
    """Images with what is to be found in them."""
    shots = {seed: encoded(pattern(seed)) for seed in range(12)}
    brighter = encoded(
        pattern(1).resize((90, 60)).point(lambda v: 0.8 * v + 30), "JPEG", quality=70
    )
    train = [(shots[seed], seed % 2) for seed in range(8)]
    train += [(shots[0], 0), (shots[2][:200], 0), (encoded(Image.new("RGB", (60, 40), "red")), 1)]
    train += [(encoded(Image.new("RGB", (60, 40), "blue")), 1)]
    test = [(shots[8], 0), (shots[3], 1), (shots[4], 1), (brighter, 1), (shots[9], 1)]
    return images_of(tmp_path / "train", train), images_of(tmp_path / "test", test)


def test_images_that_were_planted_are_found(planted):
    audit = audit_images(*planted)
    assert audit.counts == {"train": [6, 6], "test": [1, 4]}
    assert audit.equal == 3
    assert audit.near == 1
    expected = [
        (("test", 1), ("train", 3)),
        (("test", 2), ("train", 4)),
        (("test", 3), ("train", 1)),
    ]
    assert pairs(audit.leaks) == expected
    assert audit.leaks["difference"].tolist() == [0, 0, 0]  # the hash does not see the brightness
    assert audit.leaks["match"].tolist() == ["equal", "equal", "near"]
    assert pairs(audit.conflicts) == [(("train", 4), ("test", 2))]
    columns = ["label", "other_label", "match"]
    assert audit.conflicts[columns].values.tolist() == [["ant", "bee", "equal"]]
    together = audit.duplicates.groupby("group")[["split", "index"]].apply(
        lambda g: g.values.tolist()
    )
    assert sorted(together) == [
        [["train", 0], ["train", 8]],
        [["train", 1], ["test", 3]],
        [["train", 3], ["test", 1]],
        [["train", 4], ["test", 2]],
    ]
    assert audit.duplicates["content"].nunique() == 5
    (bad,) = audit.unreadable.to_dict("records")
    assert (bad["split"], bad["index"], bad["example"][-5:]) == ("train", 9, "9.png")
    assert "truncated" in bad["reason"]
    assert audit.images.one_colour == 2
    assert audit.images.sizes == {"60 x 40": 15, "90 x 60": 1}
    assert audit.images.formats == {"PNG": 15, "JPEG": 1}
    content = json.loads(to_json(audit.to_dict(), name="audit"))
    assert content["rows"] == {"duplicates": 8, "leaks": 3, "conflicts": 1, "unreadable": 1}


def test_image_facts(tmp_path):
    turned = pattern(0).getexif()
    turned[0x0112] = 6
    files = [
        encoded(pattern(0), "JPEG", exif=turned),
        encoded(pattern(1).convert("L")),
        encoded(pattern(2, (200, 20))),
        encoded(pattern(3), "GIF", save_all=True, append_images=[pattern(4)]),
        encoded(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27)),
    ]
    facts = audit_images(images_of(tmp_path / "set", [(file, 0) for file in files], "a")).images
    assert (facts.rotated, facts.elongated, facts.animated, facts.one_colour) == (1, 1, 1, 0)
    assert facts.modes == {"RGB": 2, "L": 1, "P": 1, "I;16": 1}
    assert facts.width["greatest"] == 200


@pytest.mark.parametrize(("side", "near"), [(31, 0), (32, 1)])
def test_small_images_are_near_to_none(tmp_path, side, near):
    files = [pattern(0, (side, 40)), pattern(0, (side, 40)).point(lambda v: 0.9 * v)]
    audit = audit_images(images_of(tmp_path / "set", [(encoded(f), 0) for f in files], "a"))
    assert (audit.equal, audit.near) == (0, near)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match="`train` must be a set of images of which one can be read"
    ):
        audit_images(images_of(tmp_path / "set", [(b"no image", 0)], "a"))


@pytest.mark.parametrize("distance", [0, 1, 4, 6, 9, 16])
def test_all_near_hashes_are_found(distance, monkeypatch):
    monkeypatch.setattr(duplicates, "MIN_CORRELATION", -1)
    generator = random.Random(distance)
    hashes = [generator.getrandbits(64) for _ in range(40)]
    for base in hashes[:40]:
        for flips in range(1, 12, 2):
            flipped = sum(1 << bit for bit in generator.sample(range(64), flips))
            hashes.append(base ^ flipped)
    array = np.array(hashes, dtype=np.uint64)
    near = duplicates.near_images(array, np.zeros((len(array), 1, 3), np.uint8), distance)
    found = {
        (min(i, j), max(i, j)): bits
        for i, j, bits in zip(near.first, near.second, near.difference, strict=True)
    }
    distances = {
        (i, j): (hashes[i] ^ hashes[j]).bit_count() for i, j in combinations(range(280), 2)
    }
    assert found == {pair: bits for pair, bits in distances.items() if bits <= distance}
    assert len(found) == len(near.first)


def test_equal_hashes_of_unlike_images_are_no_duplicates():
    generator = np.random.RandomState(0)
    one = generator.randint(0, 255, (16, 3))
    noise = generator.randint(0, 2, (16, 3))  # of a single colour but for that
    parts = [one, one * 0.5 + 60, 255 - one, 100 + noise, 50 + noise]
    thumbnails = np.stack(parts).astype(np.uint8)
    near = duplicates.near_images(np.zeros(5, np.uint64), thumbnails, 6)
    assert (near.first.tolist(), near.second.tolist()) == ([0], [1])
    tinted = thumbnails[[0, 2]] // 8 + np.array([180, 0, 90], np.uint8)  # alike in colour alone
    assert not len(duplicates.near_images(np.zeros(2, np.uint64), tinted, 6).first)


def texts_of(rows, names=("a", "b")):
    texts, labels = zip(*rows, strict=True)
    return text_table(list(texts), np.array(labels), names)


LONG = "The parcel was left with the neighbours, who are on holiday until the end of the month"


def test_texts_that_were_planted_are_found():
    other = [f"A text of its own, number {n}: {n * 7919} {n * 104729}" for n in range(50)]
    train = texts_of(
        [
            *[(text, n % 2) for n, text in enumerate(other)],
            (LONG, 0),
            ("Where is my card?", 0),
            ("  where is\tMY card? ", 1),
            ("!?", 1),
        ]
    )
    test = texts_of(
        [(LONG + "!", 1), ("\uff37here is my card?", 0), ("Nothing like the others", 0)]
    )
    audit = audit_texts(train, test)
    assert audit.sizes == {"train": 54, "test": 3}
    assert (audit.equal, audit.near, audit.near_complete) == (2, 1, True)
    assert pairs(audit.leaks) == [(("test", 0), ("train", 50)), (("test", 1), ("train", 51))]
    assert pairs(audit.conflicts) == [
        (("train", 51), ("train", 52)),
        (("train", 50), ("test", 0)),
    ]
    assert audit.conflicts["match"].tolist() == ["equal", "near"]
    runs = len({LONG.casefold()[start : start + 5] for start in range(len(LONG) - 4)})
    assert audit.leaks["difference"].tolist() == pytest.approx([1 / (1 + runs), 0])
    assert audit.texts.empty == 1
    assert audit.texts.tokens is None
    assert audit.leaks["other_example"].tolist() == [LONG, "Where is my card?"]


def test_a_leak_names_the_nearest_training_example():
    other = "A shop that sells bread and nothing else was opened in the street behind the church"
    train = texts_of([(LONG + " of May", 0), (LONG + " I", 0)])
    test = texts_of([(LONG, 0), (other, 0), (other + "!", 0)])
    audit = audit_texts(train, test)
    assert pairs(audit.leaks) == [(("test", 0), ("train", 1))]
    assert audit.near == 4
    assert audit.conflicts.empty


def test_tokens_that_would_be_cut():
    train = texts_of([("a b c", 0), ("a b c d e f g", 1), ("a", 0)])

    def tokenizer(texts):
        return {"input_ids": [text.split() for text in texts]}

    facts = audit_texts(train, tokenizer=tokenizer, max_length=5).texts
    assert (facts.cut_texts, facts.cut_tokens) == (1, 2 / 11)
    assert facts.tokens["greatest"] == facts.words["greatest"] == 7


@pytest.mark.parametrize("similarity", [0.6, 0.8, 1])
def test_near_texts_are_those_of_exact_similarity(similarity):
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=6)) for _ in range(200)]
    texts = []
    for _ in range(40):
        base = generator.choices(words, k=30)
        texts += [" ".join(base), " ".join([*base[:-3], *generator.choices(words, k=3)])]
        texts += [" ".join(base[:20] + generator.choices(words, k=10))]
    sets = [set(duplicates.shingles(text).tolist()) for text in texts]
    exact = {
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if len(sets[i] & sets[j]) >= similarity * len(sets[i] | sets[j])
    }
    sign = duplicates.text_signer()
    near = duplicates.near_texts(np.stack([*map(sign, texts)]), texts.__getitem__, similarity)
    found = set(zip(near.first.tolist(), near.second.tolist(), strict=True))
    assert found <= exact
    assert len(found) >= (0.97 if similarity >= 0.8 else 0.6) * len(exact)


def test_a_crowd_of_near_texts_is_one_group():
    texts = [
        f"Your order {n:05} has been shipped and will be with you tomorrow" for n in range(300)
    ]
    audit = audit_texts(texts_of([(text, 0) for text in texts]), near_similarity=0.7)
    assert audit.duplicates["group"].nunique() == 1
    assert len(audit.duplicates) == 300


def test_search_that_stops_says_so(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 5)
    texts = [f"Your order {n:05} has been shipped and will be with you tomorrow" for n in range(30)]
    audit = audit_texts(texts_of([(text, 0) for text in texts]))
    assert not audit.near_complete


def test_classes_that_one_side_lacks():
    names = ("a", "b", "c")
    audit = audit_texts(texts_of([("x", 0), ("y", 1)], names), texts_of([("z", 2)], names))
    assert (audit.absent("train"), audit.absent("test")) == (["c"], ["a", "b"])
    assert audit.groups() == {"many": [], "medium": [], "few": [0, 1], "absent": [2]}
    assert audit.prior.shape == "different"
    with pytest.raises(ValueError, match=r"`test` must be a set with the classes of `train`.*'c'"):
        audit_texts(texts_of([("x", 0)]), texts_of([("x", 0)], names))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["Cat", "cat ", "CAT", "dog"], [["Cat", "cat ", "CAT"]]),
        (["lap_top", "lap-top", "laptop"], [["lap_top", "lap-top"]]),
        (["caf\u00e9", "cafe\u0301", "cafe"], [["caf\u00e9", "cafe\u0301", "cafe"]]),
        (["1", "01", "1.0", "10"], [["1", "01", "1.0"]]),
        (["cat\u200b", "cat"], [["cat\u200b", "cat"]]),
        (["C", "C++", "C#", "n01", "n1", "?", "!"], []),
        (["\u0915\u093f", "\u0915\u0940"], []),
    ],
)
def test_spellings_of_one_name(names, found):
    assert look_alikes(names) == found


@pytest.mark.parametrize(
    ("train", "test", "shape"),
    [
        ([900, 90, 10], [450, 45, 5], "same"),
        ([900, 90, 10], [88, 12, 0], "same"),
        ([900, 90, 10], [40, 40, 40], "balanced"),
        ([900, 90, 10], [500, 400, 100], "different"),
        ([100, 100, 100], [50, 50, 50], "same"),
        ([100, 100, 0], [50, 50, 9], "different"),
    ],
)
def test_priors(train, test, shape):
    assert compare_priors(np.array(train), np.array(test), "abc").shape == shape


@pytest.mark.parametrize(
    ("audit", "library"), [(audit_images, "imagehash"), (audit_texts, "datasketch")]
)
def test_missing_library_is_named(audit, library, monkeypatch):
    monkeypatch.setattr("ldam_plugins.data.audit.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf'pip install "{library}".*\[inspect\]'):
        audit(None)
