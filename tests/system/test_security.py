"""What a run reads cannot run code, and every way round that is closed in the source."""

import ast
import os
import pickle
import shutil

import options as recipe_options
import pytest
import text_lt
import torch
from datasets import ClassLabel, Dataset
from image_sets import write
from paths import PACKAGE, RECIPES, ROOT
from transformers import BertConfig, BertForSequenceClassification
from vision_runs import vision_run

from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer

TINY = ["--epochs", "1", "--start", "0", "--mixed_precision", "no"]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def vision(out, *flags):
    return vision_run(out, *TINY, "--ratio", "100", "--ema_decay", "0.5", *flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    vision(out)
    return out


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "struck")))
    assert (tmp_path / "struck").exists()


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_checkpoints_of_a_vision_run_cannot_run_code(run, name, form, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (checkpoint / name).exists()
    payload = Payload(tmp_path / "struck")
    if form == "torch":
        torch.save(payload, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(payload, protocol=2))
    if name == "optimizer.bin":
        with pytest.raises(pickle.UnpicklingError):
            vision(tmp_path / "run", "--resume")
    else:  # Accelerate goes on without states it cannot load; every epoch sets its own
        vision(tmp_path / "run", "--resume")
    assert not (tmp_path / "struck").exists()


def test_no_pickle_of_its_own_is_looked_for(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert not list(checkpoint.glob("custom_checkpoint*"))
    torch.save(Payload(tmp_path / "struck"), checkpoint / "custom_checkpoint_0.pkl")
    with pytest.raises(RuntimeError, match="custom checkpoints"):
        vision(tmp_path / "run", "--resume")
    assert not (tmp_path / "struck").exists()


def test_models_of_the_hub_bring_no_code(tmp_path):
    BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "model")
    train_tokenizer(["a b a b"], max_length=8).save_pretrained(tmp_path / "model")
    code = f"import os\nos.mkdir({str(tmp_path / 'struck')!r})\nclass Config: pass\n"
    write(tmp_path / "model" / "own.py", code)
    write(
        tmp_path / "model" / "config.json",
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", '
        '"AutoModelForSequenceClassification": "own.Config"}}',
    )
    flags = [*TINY, "--dataset", "stdlib_docstrings", "--model", str(tmp_path / "model")]
    parsed = recipe_options.parse_options(text_lt.TextOptions, flags, default="")
    train = Dataset.from_dict({"label": [0, 1]})
    train = train.cast_column("label", ClassLabel(names=["x", "y"]))
    loss = parsed.make_loss(text_lt.ClassCounts([1, 1]))
    with pytest.raises(ValueError, match="trust_remote_code"):
        text_lt.make_model(parsed, train, loss)
    assert not (tmp_path / "struck").exists()


SOURCES = [*PACKAGE.rglob("*.py"), *RECIPES.glob("*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_loads_no_pickle_and_runs_no_text(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            assert not named & {"pickle", "dill", "joblib", "marshal", "shelve"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {
                "eval",
                "exec",
                "os.system",
                "os.popen",
                "yaml.load",
                "torch.load",
            }
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("trust_remote_code", "False") == "False"
            assert given.get("shell", "False") == "False"
            assert given.get("allow_pickle", "False") == "False"
            assert given.get("weights_only", "True") == "True"
