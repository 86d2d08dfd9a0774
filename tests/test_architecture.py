"""The rules of the layout, read off the source."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module

import pytest
from paths import PACKAGE, RECIPES, ROOT

RECIPES = sorted(RECIPES.glob("*.py"))
# The rooms of the package, low to high: each may import those before it and itself.
ROOMS = ["_index_page", "_lazy", "_validation", "_tensor_checks", "choices", "_call_stack"]
ROOMS += ["counts", "schedules", "kernels", "losses", "heads", "metrics"]
ROOMS += [
    "data",
    "samplers",
    "training",
    "posthoc",
    "reports",
    "integrations",
    "benchmark",
    "command",
]
OLD_PATHS = {  # where each has moved, and a name that was there
    "ldam_plugins.timm_plugin": ("ldam_plugins.integrations.timm", "LongTailTask"),
    "ldam_plugins.hf_bilstm": ("ldam_plugins.integrations.transformers.bilstm", "BiLSTMConfig"),
    "ldam_plugins.hf_dropout": (
        "ldam_plugins.integrations.transformers.fast_attention",
        "use_fast_dropout",
    ),
    "ldam_plugins.batch_norm": ("ldam_plugins.kernels.batch_norm", "use_fast_batch_norm"),
    "ldam_plugins.runtime": ("ldam_plugins.training", "keep_freed_memory"),
    "ldam_plugins.combinations": ("ldam_plugins.losses.reweighting", "apply_stage"),
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
    return module.split(".")[1] if "." in module else None


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
for name in ["ldam_plugins", "ldam_plugins._moved", *OLD_PATHS]:
    MODULES.pop(name)


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
    if module.startswith(("ldam_plugins.integrations.timm", "ldam_plugins.integrations.timm.task")):
        allowed = {"timm", "peft"}
    if module.startswith(("ldam_plugins.integrations.transformers", "ldam_plugins.hf_")):
        allowed = {"transformers", "peft"}
    assert hosts & {"timm", "transformers", "peft"} <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_one_module_looks_at_the_call_stack(module):
    names = {
        node.attr
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Attribute)
    }
    if module != "ldam_plugins._call_stack":
        assert not names & {"_getframe", "currentframe", "f_back"}


@pytest.mark.parametrize("old", OLD_PATHS)
def test_old_paths_say_where_their_names_are(old):
    new, name = OLD_PATHS[old]
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"`{old}` has moved to `{new}`") as caught:
        module = import_module(old)
    assert getattr(module, name) is getattr(import_module(new), name)
    assert len(caught) == 1


def test_package_imports_torch_and_numpy_only():
    heavy = ["timm", "transformers", "datasets", "accelerate", "evaluate", "matplotlib", "sklearn"]
    heavy += ["pandas", "scipy"]
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
def test_recipes_import_no_private_module_and_hold_no_formula(path):
    for name, _ in imports_of(path):
        assert not any(part.startswith("_") for part in name.split(".")[1:]), f"imports {name}"
    tree = ast.parse(path.read_text())
    formulas = {"exp", "log_softmax", "softmax", "one_hot", "cross_entropy", "backward"}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for function in called - {"accelerator.backward"}:
        assert function.split(".")[-1] not in formulas, f"{function} belongs in the package"
