"""The rules of the layout, read off the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ldam_plugins"
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
# Every module may import those before it, none after it; names of one line are peers.
LAYERS = [
    {"_checks", "tensors"},
    {"counts", "chunked_cosines", "host_updates"},
    {"run_lock"},
    {"long_tail", "reduction", "runtime", "run_files", "intervals", "pages", "preset_files"}
    | {"model_outputs"},
    {"margin_cross_entropy", "margin_cross_entropy_triton", "run_folder"},
    {"functional"},
    {"loss_base", "schedules", "metrics", "tables"},
    {"losses"},
    {"samplers", "combinations", "head_layers", "head_trace", "evaluate_metric", "plots", "grid"},
    {"head_names"},
    {"head_fit", "head_guard", "updates"},
    {"heads", "image_sources", "image_files", "reports", "docstrings", "grid_run", "probe"},
    {"experiments", "grid_slurm"},
    {"experiment_tables", "experiment_plots"},
    {"experiment_report"},
    {"image_annotations", "image_tables"},
    {"image_layouts"},
    {"image_loaders", "text_data"},
    {"data"},
    {"batches", "batch_norm"},
    {"timm_plugin", "hf_dropout", "hf_labels", "hf_loss_mapping", "hf_tokenizer"},
    {"hf_bilstm", "hf_text", "hf_setup", "hf_saved_model"},
    {"hf_mixup", "hf_updates"},
    {"hf_run"},
    {"hf_plugin"},
]


def imports_of(path):
    """(module, whether at the top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in top
            if node.module == "ldam_plugins":
                names = (f"ldam_plugins.{alias.name}" for alias in node.names)
                yield from ((n, id(node) in top) for n in names if is_module(n))


def is_module(name):
    return (PACKAGE / f"{name.removeprefix('ldam_plugins.')}.py").exists()


def modules():
    return [path for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_imports_point_downward(path):
    place = {name: level for level, layer in enumerate(LAYERS) for name in layer}
    assert path.stem in place, f"give {path.stem} its place in LAYERS"
    for name, _ in imports_of(path):
        if name.startswith("ldam_plugins."):
            other = name.split(".")[1]
            assert place[other] <= place[path.stem], f"{path.stem} imports {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_hosts_are_imported_by_their_plugins_only(path):
    hosts = {name.split(".")[0] for name, _ in imports_of(path)} & {"timm", "transformers", "peft"}
    allowed = {"timm"} if path.stem == "timm_plugin" else set()
    allowed |= {"transformers", "peft"} if path.stem.startswith("hf_") else set()
    assert hosts <= allowed


def test_package_imports_torch_and_numpy_only():
    heavy = ["timm", "transformers", "datasets", "accelerate", "evaluate", "matplotlib", "sklearn"]
    heavy += ["torch._dynamo", "triton"]  # parts of torch that take longer than the rest of it
    code = f"import sys, ldam_plugins; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    import ldam_plugins

    for name in ldam_plugins.__all__:
        assert getattr(ldam_plugins, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ldam_plugins.no_such_name


@pytest.mark.parametrize("path", [*modules(), *RECIPES], ids=lambda p: p.stem)
def test_functions_stay_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            has_doc = ast.get_docstring(node) is not None
            body = node.body[1:] if has_doc else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_assemble_and_do_not_compute(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            decorators = [ast.unparse(d) for d in node.decorator_list]
            assert decorators == ["dataclass"], f"{node.name}: a class other than the options"
    formulas = {"exp", "log_softmax", "softmax", "one_hot", "cross_entropy", "backward"}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for function in called - {"accelerator.backward"}:
        assert function.split(".")[-1] not in formulas, f"{function} belongs in the package"
