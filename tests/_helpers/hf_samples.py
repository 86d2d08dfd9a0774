"""Tiny classifiers of transformers with random weights, tiny data, and a Trainer for both."""

import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value
from transformers import Trainer, TrainerCallback, TrainingArguments

CLASSES = 3
COUNTS = [16, 6, 2]
_TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE = {"image_size": 16, "patch_size": 8}
_GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
_XLNET = {"vocab_size": 50, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
_T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
_DISTIL = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

TEXT_MODELS = {
    "Bert": _TEXT,
    "DistilBert": _DISTIL,
    "Roberta": _TEXT,
    "DebertaV2": _TEXT,
    "XLNet": _XLNET,
    "ModernBert": {**_TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "Electra": {**_TEXT, "embedding_size": 16},
    "GPT2": {**_GPT2, **_SPECIAL},
    "Llama": {**_TEXT, "num_key_value_heads": 2},
    "T5": {**_T5, **_SPECIAL, "decoder_start_token_id": 0},
}
IMAGE_MODELS = {
    "ViT": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **_IMAGE},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "Swin": {"image_size": 16, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    | {"window_size": 2, "patch_size": 4},
    "TimmWrapper": {"architecture": "test_vit", "model_args": {"img_size": 16}},
}
MODELS = {**TEXT_MODELS, **IMAGE_MODELS}


def make_model(name="Bert", *, dropout=0.0, num_labels=CLASSES, **changes):
    options = {**MODELS[name], "num_labels": num_labels, **changes}
    config = getattr(transformers, f"{name}Config")(**options)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, dropout)
    task = "Sequence" if name in TEXT_MODELS else "Image"
    torch.manual_seed(0)
    return getattr(transformers, f"{name}For{task}Classification")(config)


def make_data(name="Bert", counts=COUNTS, *, seed=1):
    """One row a sample, classes in an order that mixes them unevenly."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    draw = torch.Generator().manual_seed(seed)
    labels = labels[torch.randperm(len(labels), generator=draw)]
    size = (len(labels), 3, 16, 16) if name in IMAGE_MODELS else (len(labels), 8)
    if name in IMAGE_MODELS:
        return Dataset.from_dict(
            {"pixel_values": torch.randn(size, generator=draw).tolist(), "label": labels.tolist()}
        )
    tokens = torch.randint(3, 50, size, generator=draw)
    tokens[:, -1] = 2
    columns = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "label": labels}
    return Dataset.from_dict({key: column.tolist() for key, column in columns.items()})


def text_hub(path):
    """Two classes of 40 and 12 training texts in hub layout."""
    path.mkdir(exist_ok=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    for split, counts in (("train", (40, 12)), ("test", (9, 9))):
        texts = [
            f"{'pear' if c else 'iron'} {'and ' * (i % 5)}"
            for c in (0, 1)
            for i in range(counts[c])
        ]
        labels = [c for c in (0, 1) for _ in range(counts[c])]
        rows = Dataset.from_dict({"text": texts, "label": labels}, features=features)
        rows.to_parquet(path / f"{split}-00000-of-00001.parquet")
    return path


def tensors(data):
    """The whole data set as one batch, without labels, and the labels."""
    columns = data.with_format("torch")[:]
    labels = columns.pop("label")
    return columns, labels


class Spy(TrainerCallback):
    """Note class weights and losses at every update."""

    def __init__(self, criterion_of):
        self.criterion_of = criterion_of
        self.weights = []

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(self.criterion_of.criterion.weight.tolist())


def make_trainer(folder, model=None, data=None, callbacks=(), *, kind=Trainer, **options):
    given = {key: options.pop(key) for key in _TRAINER_OPTIONS & set(options)}
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{**defaults, **options},
    )
    model = make_model() if model is None and "model_init" not in given else model
    data = make_data() if data is None else data
    return kind(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks), **given)


_TRAINER_OPTIONS = {"compute_loss_func", "compute_metrics", "data_collator", "eval_dataset"}
_TRAINER_OPTIONS |= {"model_init", "optimizers"}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def ldam_oracle(logits, labels, counts=COUNTS, *, weights=None, items=None):
    """Weighted LDAM of the paper, by the formula and nothing of the package."""
    n = torch.tensor(counts, dtype=torch.float64)
    margins = (0.5 * (n / n.min()) ** -0.25).float()
    weights = torch.ones(len(counts)) if weights is None else weights
    mean_weight = (n.float() * weights).sum() / n.sum().float()
    shifted = logits.clone()
    rows = torch.arange(len(labels))
    shifted[rows, labels] = shifted[rows, labels] - 30 * margins[labels]
    losses = -shifted.log_softmax(1)[rows, labels]
    items = len(labels) if items is None else items
    return (weights[labels] * losses).sum() / (items * mean_weight)


def effective_weights(counts=COUNTS, beta=0.9999):
    raw = torch.tensor([(1 - beta) / (1 - beta**n) for n in counts], dtype=torch.float64)
    return (raw / raw.sum() * len(counts)).float()
