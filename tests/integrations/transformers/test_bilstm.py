import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ldam_plugins import fold_cosine_head, use_cosine_head
from ldam_plugins.integrations.transformers.bilstm import (
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
)
from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer

SIZES = {"vocab_size": 30, "embedding_size": 6, "hidden_size": 5, "num_labels": 3}


@pytest.fixture
def model():
    return BiLSTMForSequenceClassification(BiLSTMConfig(**SIZES, initializer_range=1.0)).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 30, (4, 7))


def bidirectional_oracle(model):
    """torch's own two-layer bidirectional LSTM with the weights of ``model``."""
    config = model.config
    oracle = nn.LSTM(config.embedding_size, config.hidden_size, 2, True, True, bidirectional=True)
    for index, layer in enumerate(model.layers):
        for part, suffix in ((layer.rightward, ""), (layer.leftward, "_reverse")):
            for name, value in part.state_dict().items():
                getattr(oracle, name.replace("_l0", f"_l{index}{suffix}")).data.copy_(value)
    return oracle


def test_equals_packed_bidirectional_lstm(model, tokens):
    lengths = torch.tensor([7, 1, 4, 6])
    mask = torch.arange(7) < lengths[:, None]
    packed = nn.utils.rnn.pack_padded_sequence(
        model.embed_tokens(tokens), lengths, batch_first=True, enforce_sorted=False
    )
    states, _ = bidirectional_oracle(model)(packed)
    states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
    mean = torch.stack([row[:n].mean(0) for row, n in zip(states, lengths, strict=True)])
    logits = model(input_ids=tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(logits, model.classifier(mean))


@pytest.mark.parametrize("pads", [[7, 8, 9], [0, 1, 2], [0, 4, 9], [2, 3, 5]])
def test_padding_changes_nothing_wherever_it_stands(model, tokens, pads):
    places = [place for place in range(10) if place not in pads]
    padded = torch.randint(1, 30, (4, 10))  # what stands under the mask does not count either
    padded[:, places] = tokens
    mask = torch.zeros(4, 10, dtype=torch.long)
    mask[:, places] = 1
    expected = model(input_ids=tokens).logits
    actual = model(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(model(input_ids=padded).logits, expected)


def test_without_a_mask_the_padding_token_is_padding(model, tokens):
    padded = torch.cat([tokens, torch.zeros(4, 2, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(input_ids=padded).logits, model(input_ids=tokens).logits)


def test_order_of_words_counts_in_both_directions(model, tokens):
    reference = model(input_ids=tokens).logits
    assert not torch.allclose(model(input_ids=tokens.flip(1)).logits, reference)


def test_a_text_without_tokens_has_finite_logits(model):
    empty = torch.zeros(2, 3, dtype=torch.long)
    torch.testing.assert_close(
        model(input_ids=empty).logits, model.classifier.bias.expand(2, 3), rtol=0, atol=0
    )


def test_loss_is_cross_entropy_divided_as_the_trainer_asks(model, tokens):
    labels = torch.tensor([0, 2, 1, 1])
    output = model(input_ids=tokens, labels=labels)
    expected = nn.functional.cross_entropy(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    split = model(input_ids=tokens, labels=labels, num_items_in_batch=torch.tensor(8))
    torch.testing.assert_close(split.loss, expected / 2)


def test_tuples_on_request(model, tokens):
    (logits,) = model(input_ids=tokens, return_dict=False)
    assert logits.shape == (4, 3)


def test_dropouts_act_in_training_only(tokens):
    off = {"embedding_dropout": 0.0, "hidden_dropout": 0.0, "classifier_dropout": 0.0}
    for name in off:
        config = BiLSTMConfig(**SIZES, **{**off, name: 0.5}, initializer_range=1.0)
        model = BiLSTMForSequenceClassification(config).train()
        first, second = (model(input_ids=tokens).logits for _ in range(2))
        assert not torch.equal(first, second), name
        model.eval()
        assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_begins_with_open_forget_gates(model):
    bias = model.layers[0].rightward.bias_ih_l0
    assert bias.tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 10


def test_auto_classes_load_what_was_saved(model, tokens, tmp_path):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is BiLSTMConfig
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is BiLSTMForSequenceClassification
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_embeddings_can_be_resized_and_replaced(model, tokens):
    before = model(input_ids=tokens).logits
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 40
    torch.testing.assert_close(model(input_ids=tokens).logits, before)
    model.set_input_embeddings(nn.Embedding(40, 6, padding_idx=0))
    assert not torch.allclose(model(input_ids=tokens).logits, before)


def test_cosine_head_is_found_and_folds_back(model, tokens):
    use_cosine_head(model, scale=30.0)
    logits = model(input_ids=tokens).logits
    assert logits.abs().max() <= 30
    fold_cosine_head(model, inputs=[{"input_ids": tokens}])
    assert type(model.classifier) is nn.Linear
    assert torch.equal(model(input_ids=tokens).logits.argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize("module", ["bilstm", "hf_bilstm"])  # the second is its name of old
def test_loads_without_the_package(module, model, tokens, tmp_path):
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"bilstm.', f'"{module}.'))
    (tmp_path / "model" / "bilstm.py").rename(tmp_path / "model" / f"{module}.py")
    for trust in (False, True):  # with the package
        options = {"trust_remote_code": trust}
        loaded = AutoModelForSequenceClassification.from_pretrained(config.parent, **options)
        assert type(loaded) is BiLSTMForSequenceClassification
        assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    torch.save(tokens, tmp_path / "tokens.pt")
    code = """
import sys
sys.modules["ldam_plugins"] = None
import torch
from transformers import AutoModelForSequenceClassification as Auto
model = Auto.from_pretrained("model", trust_remote_code=True)
torch.save(model(input_ids=torch.load("tokens.pt")).logits, "logits.pt")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(input_ids=tokens).logits)


TEXTS = ["The cat doesn't sit.", "the CAT sat!<br /><br />Why?", "A café_x, the 'end' 你好"]


def test_words_of_the_tokenizer():
    tokenizer = train_tokenizer(TEXTS, min_frequency=1)
    expected = ["the", "cat", "doesn't", "sit", "the", "cat", "sat", "!", "why", "?"]
    expected += ["a", "cafe_x", "the", "end", "你", "好"]
    assert [word for text in TEXTS for word in tokenizer.tokenize(text)] == expected
    assert set(tokenizer.get_vocab()) == {"[PAD]", "[UNK]", *expected}
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1)
    assert tokenizer.tokenize("the dog") == ["the", "[UNK]"]


def test_most_frequent_words_are_known():
    texts = ["a a a a b b b c c d"]
    assert set(train_tokenizer(texts).get_vocab()) == {"[PAD]", "[UNK]", "a", "b", "c"}
    assert set(train_tokenizer(texts, vocab_size=4).get_vocab()) == {"[PAD]", "[UNK]", "a", "b"}
    assert set(train_tokenizer(texts, min_frequency=4).get_vocab()) == {"[PAD]", "[UNK]", "a"}


def test_tokenizer_is_deterministic():
    texts = [f"word{i} word{i % 7} tie{i} tie{i}" for i in range(200)]
    first, second = (train_tokenizer(texts, vocab_size=50).get_vocab() for _ in range(2))
    assert first == second
    assert Counter(first.values()) == Counter(range(50))


def test_truncation_keeps_the_end(tmp_path):
    tokenizer = train_tokenizer(["a b c d e"], min_frequency=1, max_length=3)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, loaded):
        batch = each(["a b c d e", "a"], truncation=True, padding=True, return_tensors="pt")
        assert set(batch) == {"input_ids", "attention_mask"}
        assert each.convert_ids_to_tokens(batch["input_ids"][0]) == ["c", "d", "e"]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert loaded.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        (["a b"], {}, "`texts` must be texts in which a word occurs 2 times, got 'none'"),
        ([], {}, "`texts` must be texts in which"),
        (["a a"], {"vocab_size": 2}, "`vocab_size` must be an integer >= 3, got 2"),
        (["a a"], {"min_frequency": 0}, "`min_frequency` must be an integer >= 1, got 0"),
        (["a a"], {"max_length": 0}, "`max_length` must be an integer >= 1, got 0"),
    ],
)
def test_tokenizer_refuses(texts, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, **arguments)


def test_module_needs_nothing_of_the_package():
    source = Path(sys.modules[BiLSTMConfig.__module__].__file__).read_text()
    assert "import ldam_plugins" not in source
    assert "from ldam_plugins" not in source
