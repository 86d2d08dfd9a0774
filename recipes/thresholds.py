"""Choose from where on a trained model answers: a threshold of two classes, and when to abstain.

    python recipes/thresholds.py runs/spam --threshold_for precision=0.9
    python recipes/thresholds.py runs/spam --threshold_for cost=1:20   # false positive : miss
    python recipes/thresholds.py runs/photos --risk 0.05   # at most 5 % of the answers wrong
    python recipes/thresholds.py path/to/bert --dataset labelled.csv --threshold_for f1

MODEL, the first word, is what ``recipes/evaluate.py`` takes, and so are the options of the data.
The choice is made on the held-out samples of a run (``--val_split``), on labelled data without
parts, or with ``--choose_on 0.5`` on that share of the test set; the rest, or the whole test set,
then measures it.

``--threshold_for`` is for two classes: ``f1``, ``precision=P``, ``recall=R``, or ``cost=FP:FN``,
the costs of a false positive and a false negative; ``--positive`` is the rarer class unless told.
``--risk R`` is for any number of classes: below some confidence there is no answer, so that with
probability ``--confidence`` at most a share R of the answers to come is wrong.

What was chosen lies beside the model in ``thresholds.json``. ``recipes/predict.py`` uses it by
itself; the model is as it was, and whoever else loads it does not see it.
"""

from __future__ import annotations

from trained_options import ThresholdOptions, command_line

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = command_line(ThresholdOptions)

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate
from trained import (
    Data,
    Host,
    beside_model,
    divide_test,
    load,
    model_files,
)

from ldam_plugins.choices import THRESHOLDS_FILE
from ldam_plugins.metrics.predictions import probabilities
from ldam_plugins.posthoc import extract_features
from ldam_plugins.posthoc.thresholds import (
    Thresholds,
    choose_abstention,
    choose_threshold,
    clopper_pearson,
    needed_samples,
    threshold_figures,
    weights_digest,
)
from ldam_plugins.training import default_device, keep_freed_memory
from ldam_plugins.training.options import check_choice, invalid


class Scored(NamedTuple):
    """What the model says of some samples: probabilities (N, C) and labels (N,)."""

    probabilities: np.ndarray
    labels: np.ndarray


def main(options: ThresholdOptions, flags: list[str] | None = None) -> Thresholds:
    """Choose, save and print; returns what was chosen."""
    output = beside_model(options, THRESHOLDS_FILE) if options.output is None else options.output
    if output is None:
        hint = "Say by --output where to write, and give it to predict.py as --thresholds."
        raise invalid("model", "a folder that the thresholds go beside", options.model, hint=hint)
    output, files = Path(output), model_files(options)
    if output.exists() and not options.overwrite:
        hint = "Choose another --output, or --overwrite it."
        raise invalid("output", "a file that is not there", str(output), hint=hint)
    host, data = load(options, flags or [], measures=True)
    names = tuple(data.counts.class_names or ())
    positive = find_positive(options, data) if options.threshold_for else None
    chosen_on, chosen, measured = choose_parts(options, data)
    chosen, measured = (part and score(options, host, part) for part in (chosen, measured))
    made = Thresholds(names, weights=None if files is None else weights_digest(files))
    facts: dict[str, Any] = {"chosen_on": f"{len(chosen.labels)} samples ({chosen_on})"}
    if positive is not None:
        index, aim = names.index(positive), options.aim()
        scores, truth = chosen.probabilities[:, index], chosen.labels == index
        if truth.all() or not truth.any():
            shown = f"one of {int(truth.sum())} of {len(truth)} ({chosen_on})"
            raise invalid("positive", "a class of some samples, not of all", shown)
        found = choose_threshold(scores, truth, **aim)
        facts["threshold_for"] = options.threshold_for
        made = Thresholds(names, positive, found.threshold, weights=made.weights)
    if options.risk is not None:
        made = with_abstention(options, made, chosen, chosen_on)
        facts |= {"risk": options.risk, "confidence": options.confidence}
    tables = {chosen_on: chosen, "test": measured} if measured else {chosen_on: chosen}
    facts["figures"] = {name: figures(options, made, part) for name, part in tables.items()}
    made = Thresholds(names, made.positive, made.threshold, made.abstain_below, made.weights, facts)
    output.parent.mkdir(parents=True, exist_ok=True)
    made.save(output)
    if not options.quiet:
        print_outcome(made, output)
    return made


def find_positive(options: ThresholdOptions, data: Data) -> str:
    """The class that the threshold is about: the rarer one in training, unless told."""
    names, counts = data.counts.class_names or (), data.counts.counts
    if len(names) != 2:
        hint = "--risk R is for any number of them."
        expected = "left out for a model of other than two classes"
        raise invalid("threshold_for", expected, options.threshold_for, hint=hint)
    if options.positive is not None:
        return str(check_choice("positive", options.positive, names))
    return str(names[int(counts[1] <= counts[0])])


def choose_parts(options: ThresholdOptions, data: Data) -> tuple[str, Any, Any]:
    """Where the choice is made, its samples, and those that are measured, if there are any."""
    parts = {name: part.samples for name, part in data.parts.items()}
    if options.choose_on not in ("auto", "validation"):
        first, second = divide_test(data.parts["test"], options.share(), options.seed)
        return f"{options.choose_on} of test", first, second
    if options.choose_on == "auto" and list(parts) == ["test"]:
        return "all", parts["test"], None
    if "validation" not in parts:
        hint = "Give --val_split, a labelled --dataset without parts, or --choose_on 0.5 for half "
        hint += "of the test set; what was trained on would promise too much."
        expected = "another part: nothing is held out"
        raise invalid("choose_on", expected, options.choose_on, hint=hint)
    return "validation", parts["validation"], parts["test"]


def score(options: ThresholdOptions, host: Host, samples: Any) -> Scored:
    """What the model says of samples."""
    device = default_device()
    with keep_freed_memory(device):
        loader = host.make_loader(samples)
        found = extract_features(host.model, loader, device=device, progress=not options.quiet)
    return Scored(probabilities(found.logits).numpy(), found.labels.numpy())


def with_abstention(
    options: ThresholdOptions, made: Thresholds, chosen: Scored, chosen_on: str
) -> Thresholds:
    """The thresholds with a confidence below which there is no answer."""
    risk, level, samples = float(options.risk or 0), options.confidence, len(chosen.labels)
    answers, confidence, _ = made.decide(chosen.probabilities)
    found = choose_abstention(confidence, answers == chosen.labels, risk, level=level)
    if found.threshold is None:
        errors = int((answers != chosen.labels).sum())
        hint = f"Of {samples} samples ({chosen_on}) {errors} are wrong; at least "
        hint += f"{needed_samples(risk, level)} sure ones without an error are needed. "
        hint += "Hold out more, or allow a larger --risk or a smaller --confidence."
        raise invalid("risk", "one that the held-out samples can show", risk, hint=hint)
    return Thresholds(
        made.class_names, made.positive, made.threshold, found.threshold, made.weights
    )


def figures(options: ThresholdOptions, made: Thresholds, part: Scored) -> dict[str, Any]:
    """What the thresholds give on some samples, with 95 % intervals, and what there was before."""
    answers, _, abstained = made.decide(part.probabilities)
    wrong = answers != part.labels
    answered, errors = int((~abstained).sum()), int((wrong & ~abstained).sum())
    samples = len(wrong)
    found: dict[str, Any] = {"samples": samples}
    if made.abstain_below is not None:
        found |= {
            "coverage": answered / samples,
            "coverage_interval": clopper_pearson(answered, samples),
            "error_of_answered": errors / answered if answered else None,
            "error_of_answered_interval": clopper_pearson(errors, answered) if answered else None,
            "error_of_all": float(wrong.mean()),
        }
    if made.threshold is not None:
        index = made.class_names.index(str(made.positive))
        scores, truth = part.probabilities[:, index], part.labels == index
        if truth.any() and not truth.all():
            costs = options.aim().get("costs")
            for name, place in (("at_half", 0.5), ("at_threshold", made.threshold)):
                found[name] = threshold_figures(scores, truth, place, costs=costs)
    return found


def print_outcome(made: Thresholds, output: Path) -> None:
    """Print what was chosen, what it gives and where it is."""
    print(f"\n{made.worded()}\n")
    rows = []
    for name, found in made.facts["figures"].items():
        part = f"{name}, {found['samples']} samples"
        for measure in ("precision", "recall", "f1", "cost"):
            if measure in found.get("at_half", {}):
                two = (found[key] for key in ("at_half", "at_threshold"))
                rows.append([part, measure, *(worded(figure, measure) for figure in two)])
        if "coverage" in found:
            pair = ("1", worded_share(found["coverage"], found["coverage_interval"]))
            rows.append([part, "coverage", *pair])
            error, interval = found["error_of_answered"], found["error_of_answered_interval"]
            pair = (f"{found['error_of_all']:.3g}", worded_share(error, interval))
            rows.append([part, "error among the answered", *pair])
    print(tabulate(rows, ("", "", "before", "with thresholds"), disable_numparse=True))
    if "test" not in made.facts["figures"]:
        print("\nMeasured where it was chosen, so on other samples it is a little less.")
    print(f"\n{output}: predict.py uses it by itself (--thresholds none leaves it out).")


def worded(figure: dict[str, Any], measure: str) -> str:
    """A figure with its interval, if it has one."""
    return worded_share(figure[measure], figure["intervals"].get(measure))


def worded_share(value: float | None, interval: list[float] | None) -> str:
    """A number with its interval."""
    if value is None:
        return "-"
    return f"{value:.3g}" + (f" ({interval[0]:.3g}..{interval[1]:.3g})" if interval else "")


if __name__ == "__main__":
    main(*chosen)
