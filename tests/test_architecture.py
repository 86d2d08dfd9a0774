"""The rules of the layout, read off the source."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from paths import PACKAGE, RECIPES, ROOT

RECIPES = sorted(RECIPES.glob("*.py"))
# The rooms of the package, low to high: each may import those before it and itself.
ROOMS = ["_validation", "counts", "schedules", "kernels", "losses", "heads", "metrics", "data"]
ROOMS += ["samplers", "training", "posthoc", "reports", "integrations", "benchmark"]
# Modules that have not moved to their room yet.
ROOM_OF = {
    "_checks": "_validation",
    **dict.fromkeys(["tensors", "chunked_cosines", "margin_cross_entropy"], "kernels"),
    **dict.fromkeys(["margin_cross_entropy_triton", "batch_norm"], "kernels"),
    **dict.fromkeys(["host_updates", "model_outputs", "reduction", "functional"], "losses"),
    **dict.fromkeys(["loss_base", "combinations"], "losses"),
    **dict.fromkeys(["head_fit", "head_layers", "head_names", "head_guard", "head_trace"], "heads"),
    "probe": "metrics",
    **dict.fromkeys(["text_data", "long_tail", "batches", "docstrings"], "data"),
    **dict.fromkeys(["image_loaders", "image_sources", "image_files"], "data"),
    **dict.fromkeys(["image_layouts", "image_annotations", "image_tables"], "data"),
    **dict.fromkeys(["updates", "runtime", "run_files", "run_folder"], "training"),
    **dict.fromkeys(["run_lock", "preset_files"], "training"),
    **dict.fromkeys(["reports", "tables", "pages", "plots"], "reports"),
    **dict.fromkeys(["timm_plugin", "evaluate_metric"], "integrations"),
    **dict.fromkeys(["hf_plugin", "hf_run", "hf_setup", "hf_text", "hf_mixup"], "integrations"),
    **dict.fromkeys(["hf_labels", "hf_loss_mapping", "hf_bilstm", "hf_dropout"], "integrations"),
    **dict.fromkeys(["hf_tokenizer", "hf_updates", "hf_saved_model"], "integrations"),
    **dict.fromkeys(["experiments", "experiment_tables", "experiment_plots"], "benchmark"),
    **dict.fromkeys(["experiment_report", "intervals", "grid", "grid_run"], "benchmark"),
    "grid_slurm": "benchmark",
}


def imports_of(path):
    """(module, whether at the top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # what is imported from a package may be one of its modules
                name = f"{node.module}.{alias.name}"
                is_module = (ROOT / f"{name.replace('.', '/')}.py").exists()
                yield name if is_module else node.module, id(node) in top


def room(module):
    """The room of ``ldam_plugins.x.y``; None for the package itself."""
    parts = module.split(".")
    return ROOM_OF.get(parts[1], parts[1]) if len(parts) > 1 else None


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES.pop("ldam_plugins")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
    assert room(module) in ROOMS, f"{module} is in no room of ROOMS"
    for name, _ in imports_of(MODULES[module]):
        if name.startswith("ldam_plugins."):
            below = ROOMS[: ROOMS.index(room(module)) + 1]
            assert room(name) in below, f"{module} imports {name}"


def test_modules_of_a_room_import_in_no_circle():
    needs = {
        module: {n for n, top in imports_of(path) if top and n in MODULES and n != module}
        for module, path in MODULES.items()
    }
    assert len(list(TopologicalSorter(needs).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_hosts_are_imported_by_their_integrations_only(module):
    hosts = {name.split(".")[0] for name, _ in imports_of(MODULES[module])}
    allowed = set()
    if module.startswith(("ldam_plugins.integrations.timm", "ldam_plugins.timm_plugin")):
        allowed = {"timm"}
    if module.startswith(("ldam_plugins.integrations.transformers", "ldam_plugins.hf_")):
        allowed = {"transformers", "peft"}
    assert hosts & {"timm", "transformers", "peft"} <= allowed


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
