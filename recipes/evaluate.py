"""Measure a trained image or text classifier, by anyone: see ``evaluate_model.py``.

    python recipes/evaluate.py runs/photos --dataset new_photos

Python looks for modules beside the script it runs, so that here ``import evaluate`` finds this file
and not Hugging Face's library of that name. Imported, it therefore steps aside.
"""

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    from trained_options import EvaluateOptions, command_line

    chosen = command_line(EvaluateOptions)  # --help is answered before torch is imported
    from evaluate_model import main

    main(*chosen)
else:
    here = Path(__file__).resolve().parent
    path, own = sys.path, sys.modules.pop(__name__)
    sys.path = [entry for entry in path if Path(entry).resolve() != here]
    try:
        import_module(__name__)
    finally:
        sys.path = path
        sys.modules.setdefault(__name__, own)
