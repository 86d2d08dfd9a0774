"""For transformers: a callback of the Trainer, losses by name, a Trainer for streams, a BiLSTM."""

from ldam_plugins.integrations.transformers import bilstm, loss_mapping
from ldam_plugins.integrations.transformers.bilstm import (
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
)
from ldam_plugins.integrations.transformers.callback import DRWCallback
from ldam_plugins.integrations.transformers.fast_attention import use_fast_dropout
from ldam_plugins.integrations.transformers.rebalance import RebalanceCallback
from ldam_plugins.integrations.transformers.sharpness_aware import SharpnessAwareTrainer
from ldam_plugins.integrations.transformers.streaming import StreamingTrainer
from ldam_plugins.integrations.transformers.weight_average import WeightAverageTrainer

__all__ = [
    "BiLSTMConfig",
    "BiLSTMForSequenceClassification",
    "DRWCallback",
    "RebalanceCallback",
    "SharpnessAwareTrainer",
    "StreamingTrainer",
    "WeightAverageTrainer",
    "register",
    "use_fast_dropout",
]


def register() -> None:
    """Make ``loss_type = "LDAM"`` and the BiLSTM known to transformers; importing this does it."""
    loss_mapping.register()
    bilstm.register()


loss_mapping.register()
