"""Records of runs that were not made: an experiment for the tests of what is made of one."""

COUNTS = [300, 100, 30, 5]


def record(loss, schedule, seed, error, **options):
    accuracy = 1 - error / 100
    test = {
        "top1_error": error,
        "balanced_accuracy": accuracy,
        "worst_class_accuracy": accuracy / 2,
        "per_class_accuracy": [accuracy] * 3 + [None],
        **{"many": accuracy, "medium": accuracy, "few": None, "nll": 1.0, "ece": 0.1},
    }
    base = {"dataset": "digits", "ratio": 100.0, "max_margin": None, "mixup": 0.0}
    base |= {"loss": loss, "schedule": schedule, "seed": seed, "output_dir": f"runs/{seed}"}
    return {
        "name": f"{loss}_{schedule}_{'_'.join(map(str, options.values()))}_s{seed}",
        "command": f"python recipes/vision_lt.py --seed {seed}",
        "options": {**base, **options},
        "versions": {"torch": "2.6", "timm": None},
        "class_counts": COUNTS,
        "device": "cpu",
        "train_seconds": 60.0,
        "examples_per_second": 100.0,
        "test": test,
    }


def method(loss, schedule, errors, **options):
    return [record(loss, schedule, seed, e, **options) for seed, e in enumerate(errors)]
