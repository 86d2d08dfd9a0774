"""A tokenizer of words, trained on the texts of a training set by the tokenizers library."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ldam_plugins._validation import check_int, invalid

PAD, UNKNOWN = "[PAD]", "[UNK]"
_WORDS = r"\w+(?:'\w+)*|[!?]"


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 20_000, min_frequency: int = 2, max_length: int = 256
) -> PreTrainedTokenizerFast:
    r"""Tokenizer that knows the most frequent words of ``texts``, with id 0 for padding.

    Words are runs of letters, digits and underscores, apostrophes inside included, in lower case
    and without accents; ``!`` and ``?`` are words too, and so is each Chinese character. Other
    signs and the tag ``<br />`` separate words. A word that is not known is ``[UNK]``, id 1. Texts
    longer than ``max_length`` words lose their beginning if they are truncated: opinions and
    questions come at the end. Equal texts give the equal tokenizer, and it is saved and loaded as
    any other of transformers.

    Args:
        texts: The training texts, read once.
        vocab_size: Known words at most, with the two special ones, at least 3.
        min_frequency: Occurrences that a word needs to be known, at least 1.
        max_length: Words that a truncated text keeps, at least 1.

    Raises:
        ValueError: an argument out of range, or no word in ``texts`` is frequent enough.

    Example:
        >>> tokenizer = train_tokenizer(["It works!", "It doesn't work..."], min_frequency=1)
        >>> tokenizer.tokenize("DOESN'T it break?")
        ["doesn't", 'it', '[UNK]', '[UNK]']
    """
    check_int("vocab_size", vocab_size, low=3)
    check_int("min_frequency", min_frequency, low=1)
    check_int("max_length", max_length, low=1)
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("<br />", " "), normalizers.BertNormalizer(lowercase=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[PAD, UNKNOWN],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == 2:
        expected = f"texts in which a word occurs {min_frequency} times"
        raise invalid("texts", expected, "none")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        truncation_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
