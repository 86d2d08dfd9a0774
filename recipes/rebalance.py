"""Make a trained image or text classifier fair to rare classes in minutes, without training.

    python recipes/rebalance.py runs/photos                              # a run of this package
    python recipes/rebalance.py path/to/bert --dataset tickets.csv --test_split 0.2
    python recipes/rebalance.py output/train/resnet18 --dataset photos   # of timm's train.py
    python recipes/rebalance.py local-dir:path/to/model --dataset photos --method logit_adjustment
    python recipes/rebalance.py runs/photos --target_prior estimate --target_data new_photos

MODEL, the first word, is a run folder, a folder that transformers wrote, a folder or file
(``model_best.pth.tar``) of timm's ``train.py``, or a name of timm (``local-dir:...``,
``hf-hub:...``). Its features are taken once, and the head on top is changed by a method of
``ldam_plugins.posthoc``: by ``auto`` by the one that cross-fitting finds best, if that is more than
noise, else by none. What is chosen is chosen on held-out samples (``--val_split``, or those of the
run; methods that learn a head learn from the training samples as well), else on training samples;
with ``--choose_on 0.5`` on that share of the test set, which is then no test set any more. The rest
of the test set is measured before and after.

The options of the data are those of ``vision_lt.py`` and ``text_lt.py``; of a run they are known.
Left in ``--output_dir``: ``model/`` in the form of its host, which loads it alone, ``metrics.json``
and ``report.html``.
"""

from __future__ import annotations

from trained_options import ESTIMATE, RebalanceOptions, command_line

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = command_line(RebalanceOptions)

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trained import (
    AUTOCAST,
    Data,
    Host,
    data_settings,
    divide_test,
    find_precision,
    head_layer,
    labels_of,
    load,
    rows_of,
)

from ldam_plugins import ClassCounts
from ldam_plugins.data.unlabelled import READ, unlabelled_images, unlabelled_texts
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.transformers.trained_model import TEXTS
from ldam_plugins.posthoc import (
    METHODS,
    Features,
    estimate_prior,
    extract_features,
    implied_prior,
    rebalance_head,
)
from ldam_plugins.posthoc.methods import AUTO, NONE
from ldam_plugins.reports import write_rebalance_report
from ldam_plugins.reports.console import files_left, header, worded_classes
from ldam_plugins.reports.rebalance_report import metric_rows, verdict
from ldam_plugins.training import (
    claim_output_dir,
    default_device,
    keep_freed_memory,
    run_metrics,
    write_metrics,
)
from ldam_plugins.training.options import (
    invalid,
)
from ldam_plugins.training.run_dir import check_is_folder, check_no_run

LEAST_SHARE = 1e-6  # a share of 0 would forbid a class for good
COMPARED = 64  # test samples by which the saved model is compared with what was measured


def main(options: RebalanceOptions, flags: list[str] | None = None) -> dict[str, Any]:
    """Re-balance a model; returns what ``metrics.json`` holds.

    Args:
        options: What is done to which model.
        flags: Options of the data.
    """
    output_dir = Path(str(options.output_dir))
    check_is_folder(output_dir)
    if not options.overwrite:
        check_no_run(output_dir, resumes=False)
    began = time.perf_counter()
    host, data = load(options, flags or [])
    if not options.quiet:
        print_header(options, host, data)
    chosen_on, chosen, test = choose_parts(options, data)
    check_head(options, host.model)
    device = default_device()
    names = data.counts.class_names
    tuned = find_precision(
        options,
        host,
        lambda: rows_of(test, np.arange(min(options.batch_size, len(labels_of(test))))),
        lambda: len(labels_of(chosen)) + len(labels_of(test)),
        device,
    )
    extract_any = partial(
        extract_features,
        host.model,
        device=device,
        autocast=AUTOCAST[tuned.precision],
        progress=not options.quiet,
    )
    extract = partial(extract_any, class_names=names)
    with keep_freed_memory(device):
        target, estimate = options.target(), None
        unlabelled = None
        if target == ESTIMATE:
            unlabelled = target_logits(options, host, extract_any)
        features = extract(host.make_loader(chosen))
        learn_from = None
        if chosen_on == "validation" and learns(options):
            learn_from = extract(host.make_loader(data.parts["train"].samples))
        tested = extract(host.make_loader(test))
    if unlabelled is not None:
        estimate = estimate_target(options, data.counts, unlabelled, features, chosen_on)
        target = estimate["prior"]
    done = rebalance_head(
        host.model,
        features,
        data.counts,
        options.method,
        strength=options.strength,
        target_prior=target,
        source_prior=options.source_prior,
        by=options.by,
        folds=options.folds,
        seed=options.seed,
        calibrate=options.calibrate and chosen_on != "train",
        test=tested,
        learn_from=learn_from,
    )
    host.model.cpu()
    settings = {**data_settings(data.options), **asdict(options), "choose_on": chosen_on}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        host.save(folder, tuple(names or ()), output_dir.name)
        check_saved(host, folder, test)
        # Only now, so that an error leaves nothing behind.
        claim_output_dir(output_dir, settings, resume=False, overwrite=options.overwrite)
        shutil.copytree(folder, output_dir / "model")
    before, after = ({**each} for each in (done.before, done.after))
    before.pop("confusion")
    seconds = time.perf_counter() - began
    metrics = run_metrics(
        options=settings,
        class_counts=data.counts,
        device=device,
        mixed_precision=tuned.precision,
        rebalance={**done.to_dict(), "chosen_on": chosen_on},
        **({} if estimate is None else {"target_estimate": estimate}),
        before=before,
        train_seconds=seconds,
        examples_per_second=(len(features) + len(tested)) / seconds,
        test=after,
    )
    write_metrics(output_dir, metrics)
    write_rebalance_report(output_dir)
    if not options.quiet:
        print_outcome(options, metrics, data.counts)
    return metrics


def learns(options: RebalanceOptions) -> bool:
    """Whether a method may learn a head from labelled samples."""
    names = AUTO if options.method == "auto" else (options.method,)
    return any(METHODS[name].learns for name in names)


def target_logits(
    options: RebalanceOptions, host: Host, extract: Callable[[Any], Features]
) -> torch.Tensor:
    """The logits of the unlabelled data whose class shares are estimated."""
    place, logits = str(options.target_data), []
    try:
        for samples in target_samples(host, place):
            found = extract(host.make_loader(samples))
            logits.append(found.logits[found.labels == READ])  # without images that are unreadable
    except (OSError, ValueError) as error:
        told = str(error).replace("`dataset`", "`target_data`")
        raise ValueError(told) from error
    if not sum(map(len, logits)):
        raise invalid("target_data", "data with at least one sample that can be read", place)
    return torch.cat(logits)


def target_samples(host: Host, place: str) -> Iterator[Any]:
    """The unlabelled samples, in parts; of texts those that are not empty."""
    if host.kind != TEXTS:
        yield from unlabelled_images(place)
        return
    for part in unlabelled_texts(place):
        texts = [text for text in part.texts() if text and text.strip()]
        if texts:
            yield Dataset.from_dict({"text": texts, "label": [READ] * len(texts)})


def estimate_target(
    options: RebalanceOptions,
    counts: ClassCounts,
    logits: torch.Tensor,
    features: Features,
    chosen_on: str,
) -> dict[str, Any]:
    """The class shares of the unlabelled data, and why they cannot be trusted, if so.

    Args:
        options: What is done.
        counts: Training samples per class.
        logits: Of the unlabelled data.
        features: What the choice is made on.
        chosen_on: What they are of.
    """
    source, temperature = counts.prior(dtype=torch.float64), 1.0
    if options.source_prior == "implied":
        source, temperature = astuple(implied_prior(features.logits, features.labels))
    held_out = None
    if chosen_on != "train":
        held_out = (features.logits / temperature, features.labels)
    found = estimate_prior(logits / temperature, source, held_out=held_out)
    reasons = [*found.reasons]
    if held_out is None:
        reasons.append(
            "nothing is held out, so whether the probabilities are calibrated is not known"
        )
    least = found.prior.clamp_min(LEAST_SHARE)
    prior = (least / least.sum()).tolist()
    names = [str(name) for name in counts.class_names or range(len(counts))]
    if not options.quiet:
        print(f"class shares of {options.target_data}, {len(logits)} samples:")
        for name, share, error in zip(names, prior, found.standard_error.tolist(), strict=True):
            print(f"  {name}: {share:.3f} +- {1.96 * error:.3f}")
    if reasons:
        warnings.warn(
            f"the class shares of {options.target_data} cannot be trusted: {'; '.join(reasons)}.",
            stacklevel=2,
        )
    return {
        "data": options.target_data,
        "samples": len(logits),
        "prior": prior,
        "standard_error": found.standard_error.tolist(),
        "is_trusted": not reasons,
        "reasons": reasons,
    }


def check_head(options: RebalanceOptions, model: Any) -> None:
    """Refuse what would give a bias to a head that is built without one, and so is lost."""
    layer = head_layer(model)
    if cosine_heads(model) or layer.bias is not None:
        return
    without = sorted(name for name, method in METHODS.items() if not method.has_bias)
    if options.method not in ("auto", NONE, *without) or options.target_prior != "uniform":
        expected = "one that needs no bias, with --target_prior uniform"
        hint = f"The head of this model has none, and its host would leave it out: {without}."
        raise invalid("method", expected, options.method, hint=hint)


def choose_parts(options: RebalanceOptions, data: Data) -> tuple[str, Any, Any]:
    """Where the choice is made, the samples of it, and those that are measured."""
    parts, test = data.parts, data.parts["test"]
    word = options.choose_on
    if word == "auto":
        word = "validation" if "validation" in parts else "train"
    if word == "validation" and "validation" not in parts:
        hint = "Name a split or give a share by --val_split, or choose on a share of the test set."
        raise invalid("choose_on", "another part: nothing is held out", word, hint=hint)
    if word in parts:
        return word, parts[word].samples, test.samples
    chosen, measured = divide_test(test, options.test_share(), options.seed)
    return f"{word} of test", chosen, measured


def check_saved(host: Host, folder: Path, test: Any) -> None:
    """Check that what lies in the folder gives the logits that were measured."""
    some = rows_of(test, np.arange(min(COMPARED, len(labels_of(test)))))
    own, loaded = (
        extract_features(model.cpu(), host.make_loader(some)).logits
        for model in (host.model, host.load(folder))
    )
    if not torch.allclose(own, loaded, rtol=1e-4, atol=1e-4 * float(own.abs().max())):
        difference = float((own - loaded).abs().max())
        expected = "a model that its host saves and loads as it is"
        raise invalid("model", expected, f"one whose logits differ by {difference:.3g}")


def print_header(options: RebalanceOptions, host: Host, data: Data) -> None:
    """Print what is changed and on what data, before anything is computed."""
    sizes = ", ".join(f"{len(part.labels)} {name}" for name, part in data.parts.items())
    order = "by its config" if host.class_names else "in the order of the data, as it names none"
    facts = {
        "model": f"{options.model}, {type(host.model).__name__}",
        "data": f"{data.options.dataset}, {host.kind}: {sizes}",
        "classes": worded_classes(data.counts),
        "their order": order,
        "method": options.method,
    }
    print(header(facts), flush=True)


def print_outcome(
    options: RebalanceOptions, metrics: Mapping[str, Any], counts: ClassCounts
) -> None:
    """Print before and after, what was chosen and where the files are."""
    from tabulate import tabulate

    names = ("", "before", "after", "difference")
    print(f"\n{tabulate(metric_rows(metrics, counts), names, disable_numparse=True)}\n")
    print("\n".join(verdict(metrics)))
    print(f"\n{files_left(str(options.output_dir))}")


if __name__ == "__main__":
    main(*chosen)
