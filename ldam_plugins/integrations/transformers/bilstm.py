"""A bidirectional LSTM classifier as a model of transformers, found by the Auto classes.

Importing this module registers ``model_type = "bilstm"``. The module needs nothing of this
package: ``save_pretrained`` puts a copy of it beside the weights, so that
``AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`` loads a saved
model where the package is not installed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple


class BiLSTMConfig(PreTrainedConfig):
    """Sizes of a :class:`BiLSTMForSequenceClassification`.

    Attributes:
        vocab_size: tokens the embeddings know.
        embedding_size: E, length of an embedding.
        hidden_size: H, length of the state of one direction; features have length 2 H.
        num_hidden_layers: bidirectional layers.
        embedding_dropout: share of the entries of the embedded text that are dropped.
        hidden_dropout: likewise between the layers.
        classifier_dropout: likewise of the features the classifier gets.
        initializer_range: standard deviation of the embeddings and of the classifier.
        pad_token_id: token that stands for nothing.
    """

    model_type = "bilstm"

    vocab_size: int = 20_000
    embedding_size: int = 100
    hidden_size: int = 64
    num_hidden_layers: int = 2
    embedding_dropout: float = 0.5
    hidden_dropout: float = 0.3
    classifier_dropout: float = 0.5
    initializer_range: float = 0.1
    pad_token_id: int = 0


class BiLSTMForSequenceClassification(PreTrainedModel):
    """Bidirectional LSTM layers, the mean of their states over the text, and a linear classifier.

    Padding has no influence, wherever it stands: each direction reads its tokens from its own end
    on and the padding after them, and the mean is over tokens only.
    """

    config_class = BiLSTMConfig
    config: BiLSTMConfig
    base_model_prefix = "bilstm"

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id
        )
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(
            BidirectionalLayer(
                2 * config.hidden_size if index else config.embedding_size, config.hidden_size
            )
            for index in range(config.num_hidden_layers)
        )
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)
        self.classifier_dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (N, C) of texts ``input_ids`` (N, T), and their loss if there are ``labels``.

        Args:
            input_ids: token ids, (N, T) int64.
            attention_mask: (N, T), 1 for tokens and 0 for padding, which may stand anywhere.
                Default: everything but ``config.pad_token_id``.
            labels: class indices (N,), or what else the loss of the host takes.
            **kwargs: handed on to the loss of the host, as ``num_items_in_batch``.
        """
        if attention_mask is None:
            attention_mask = input_ids.ne(self.config.pad_token_id)
        tokens, lengths = _tokens_first(input_ids, attention_mask)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        is_token = place < lengths[:, None]
        mirrored = torch.where(is_token, lengths[:, None] - 1 - place, place)
        states = self.embedding_dropout(self.embed_tokens(tokens))
        for index, layer in enumerate(self.layers):
            states = layer(self.hidden_dropout(states) if index else states, mirrored)
        total = states.masked_fill(~is_token[:, :, None], 0).sum(1)
        features = total / lengths[:, None].clamp(min=1)
        logits = self.classifier(self.classifier_dropout(features))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):
            # A forget gate that begins open carries gradients along the text.
            bias = torch.zeros(4 * module.hidden_size)
            bias[module.hidden_size : 2 * module.hidden_size] = 1
            init.copy_(module.bias_ih_l0, bias)


class BidirectionalLayer(nn.Module):
    """One LSTM from the left and one from the right: (N, T, D) -> (N, T, 2 H).

    ``nn.LSTM(bidirectional=True)`` would read the padding before the text from the right. With
    packed sequences it does not, but then the backward pass takes ten times as long on CPUs (torch
    2.15).
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.rightward = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.leftward = nn.LSTM(input_size, hidden_size, batch_first=True)

    def forward(self, inputs: Tensor, mirrored: Tensor) -> Tensor:
        """States at each place; ``mirrored`` (N, T) is the place that each place changes with."""
        with _as_the_cpu_can(inputs):
            from_left, _ = self.rightward(inputs)
            from_right, _ = self.leftward(_reordered(inputs, mirrored))
        return torch.cat([from_left, _reordered(from_right, mirrored)], dim=-1)


def _as_the_cpu_can(inputs: Tensor) -> AbstractContextManager[Any]:
    """No autocast to bfloat16 on CPUs before AVX-512, for which oneDNN has no such LSTM."""
    narrow = inputs.is_cpu and inputs.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    narrow = narrow and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if narrow and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return torch.autocast("cpu", enabled=False)
    return nullcontext()


def register() -> None:
    """Make ``model_type = "bilstm"`` known to the Auto classes; also run on import."""
    AutoConfig.register(BiLSTMConfig.model_type, BiLSTMConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(
        BiLSTMConfig, BiLSTMForSequenceClassification, exist_ok=True
    )
    BiLSTMConfig.register_for_auto_class()
    BiLSTMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")


def _tokens_first(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the tokens of each row before its padding, in their order; return their number too."""
    mask = attention_mask.ne(0)
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    return input_ids.gather(1, order), mask.sum(1)


def _reordered(states: Tensor, places: Tensor) -> Tensor:
    return states.gather(1, places[:, :, None].expand_as(states))


register()
