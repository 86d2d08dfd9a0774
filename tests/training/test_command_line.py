import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields

import options as recipe_options
import pytest
import text_lt
import vision_lt
from paths import RECIPES

from ldam_plugins import choices, list_losses
from ldam_plugins.benchmark.tuning import AROUND
from ldam_plugins.losses import losses_with
from ldam_plugins.posthoc import METHODS
from ldam_plugins.training.command_line import (
    begin_study,
    flag_names,
    is_ours,
    make_parser,
    parse_flags,
    say_errors_briefly,
)
from ldam_plugins.training.options import invalid, option
from ldam_plugins.training.run_dir import claim_output_dir

KINDS = {"vision": vision_lt.VisionOptions, "text": text_lt.TextOptions}


@dataclass
class Some:
    """Some options."""

    epochs: int = option(3, "epochs")
    lr: float | None = option(None, "rate [by the model]")
    names: list[str] = option([], "names")
    big_word: str = option("a", "word", choices=("a", "bc"))
    fast: bool = option(True, "fast")
    deep: bool = option(False, "deep")


def test_flags_make_the_dataclass():
    assert parse_flags(Some, []) == Some()
    words = [
        "--epochs=4",
        "--lr",
        "1e-2",
        "--names",
        "x",
        "y",
        "--big-word",
        "bc",
        "--no-fast",
        "--deep",
    ]
    assert parse_flags(Some, words) == Some(4, 0.01, ["x", "y"], "bc", False, True)
    assert parse_flags(Some, ["--deep", "no", "--fast", "yes"]) == Some()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epoch 4", "There is no option '--epoch'. Did you mean --epochs or --deep?"),
        ("--zzz", "There is no option '--zzz'. --help lists all."),
        ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        ("--big_word b", "`big_word` must be one of 'a', 'bc', got 'b'. Did you mean 'bc'?"),
        ("--deep maybe", "argument --deep: yes or no is expected, got 'maybe'"),
        ("word", "There is no option 'word'. --help lists all."),
    ],
)
def test_a_bad_flag_is_told(words, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_flags(Some, words.split())
    assert str(caught.value) == message


def test_names_of_flags():
    assert flag_names(["preset", "--val-split=0.1", "--lr", "-1"]) == {"val_split", "lr"}


@pytest.mark.parametrize("recipe", KINDS)
def test_every_option_is_in_one_group_of_the_help(recipe):
    kind = KINDS[recipe]
    grouped = [name for names in recipe_options.GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    assert {field.name for field in fields(kind)} <= set(grouped)
    known = {field.name for each in KINDS.values() for field in fields(each)}
    assert set(grouped) <= known
    text = make_parser(kind, groups=recipe_options.GROUPS).format_help()
    assert "evaluation and selection:" in text
    assert "epochs of training" in text


def test_words_of_the_command_line_are_those_of_the_package():
    assert list(choices.LOSSES) == list_losses()
    assert list(choices.POSTHOC_METHODS) == list(METHODS)
    assert set(choices.SEARCHED) == {*AROUND, "beta"}
    for name, described in (("gamma", "focal [2] and vector_scaling [0.15]"), ("tau", "[1]")):
        (field,) = (f for f in fields(recipe_options.CoreOptions) if f.name == name)
        for loss, default in losses_with(name).items():
            assert f"{loss} [{default:g}]" in field.metadata["help"]
        assert described in field.metadata["help"]
    named = {n for loss in list_losses() for n in recipe_options.LOSS_OPTIONS if losses_with(n)}
    assert named == recipe_options.LOSS_OPTIONS


def folder_options(folder, *flags):
    words = ["--epochs", "3", "--sched", "constant", "--schedule", "rw", *flags]
    words += ["--output_dir", str(folder)]
    return recipe_options.parse_options(KINDS["vision"], words, default="digits_lt")


@pytest.mark.parametrize("inside", ["", "run", "deep/run"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_read(tmp_path, inside):
    (tmp_path / "notes").write_text("of someone else")
    with pytest.raises(ValueError, match=r"`output_dir` must be a folder that can be written, got"):
        recipe_options.check_folder(folder_options(tmp_path / "notes" / inside))
    recipe_options.check_folder(folder_options(tmp_path / "deep" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_run_with_other_options_is_not_resumed_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="a folder that holds a run to resume"):
        recipe_options.check_folder(folder_options(tmp_path, "--resume"))
    options = {**asdict(folder_options(tmp_path)), "class_names": ["a", "b"]}
    claim_output_dir(tmp_path, options, resume=False)
    recipe_options.check_folder(folder_options(tmp_path, "--resume"))
    recipe_options.check_folder(folder_options(tmp_path, "--resume", "--epochs", "4", "--quiet"))
    for flags, told in (
        (("--lr", "2"), "lr: 0.1 there, 2.0 now"),
        (("--epochs", "2"), "epochs: 3"),
    ):
        with pytest.raises(ValueError, match=told):
            recipe_options.check_folder(folder_options(tmp_path, "--resume", *flags))
    growing = folder_options(tmp_path, "--resume", "--epochs", "4", "--sched", "cosine")
    with pytest.raises(ValueError, match=r"`epochs` must be 3 .*--sched cosine lowers"):
        recipe_options.check_folder(growing)


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


def test_warnings_of_this_package_are_a_line(monkeypatch):
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    monkeypatch.setattr("sys.argv", ["vision_lt.py"])
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    say_errors_briefly()
    of_ours, of_others = choices.__file__, os.__file__
    worded = warnings.formatwarning
    told = "vision_lt.py: warning: weights and margins\n"
    assert worded("weights and margins", UserWarning, of_ours, 3) == told
    assert f"{of_others}:3: UserWarning: slow" in worded("slow", UserWarning, of_others, 3, line="")


@pytest.mark.parametrize("flags", [[], ["--traceback"]], ids=str)
def test_errors_of_a_study_are_a_line_unless_asked(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr("sys.argv", ["posthoc.py", *flags])
    before = sys.excepthook
    assert begin_study(lambda: "options") == "options"
    assert (sys.excepthook is before) == bool(flags)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    error = capsys.readouterr().err
    assert (error == "\nposthoc.py: interrupted.\n") != bool(flags)


@pytest.mark.parametrize(
    ("recipe", "flags", "told"),
    [
        ("benchmark.py", ["--methods", "ldam/none:no_option=1", "--dry_run"], "no_option"),
        ("linear_probe.py", [], "`runs` must be"),
        ("inspect_data.py", ["nowhere", "--kind", "images"], "`dataset` must be"),
    ],
)
def test_studies_tell_their_errors_in_a_line(recipe, flags, told, tmp_path):
    command = [sys.executable, str(RECIPES / recipe), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.startswith(f"{recipe}: error: ")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


HELP = """
import contextlib, io, runpy, sys
heavy = {"torch", "timm", "transformers", "datasets", "pandas", "scipy", "sklearn", "matplotlib"}
sys.path.insert(0, sys.argv[1])
for recipe in sys.argv[2:]:
    said, sys.argv = io.StringIO(), [recipe, "--help"]
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(recipe, run_name="__main__")
    assert not heavy & set(sys.modules), (recipe, heavy & set(sys.modules))
    assert said.getvalue().startswith("usage: "), recipe
"""


def test_help_of_every_recipe_is_given_without_a_heavy_import():
    code = 'if __name__ == "__main__":'
    recipes = [str(path) for path in sorted(RECIPES.glob("*.py")) if code in path.read_text()]
    assert len(recipes) > 15
    subprocess.run([sys.executable, "-c", HELP, str(RECIPES), *recipes], check=True, timeout=120)


def test_errors_for_users_are_told_from_faults_in_the_code():
    from ldam_plugins.training.options import check_choice

    with pytest.raises(ValueError, match="one of") as caught:
        check_choice("loss", "x", ["y"])
    assert is_ours(caught.value)
    assert not is_ours(raised(ValueError("of another library")))
    with pytest.raises(TypeError) as caught:
        parse_flags(Some, None)
    assert not is_ours(caught.value)
    assert not is_ours(invalid("a", "b", 1))  # never raised


def recipe_process(*flags, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(RECIPES / "vision_lt.py"), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **more,
    )


def test_the_help_and_a_misspelt_flag_need_no_torch():
    code = "import sys, options; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=RECIPES, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    process = recipe_process("--lerning_rate", 1)
    out, error = process.communicate(timeout=120)
    assert (out, process.returncode) == ("", 2)
    assert error.startswith("vision_lt.py: error: There is no option '--lerning_rate'. Did you")
    assert len(error.splitlines()) == 1


def test_ctrl_c_leaves_a_run_to_resume_and_a_second_run_says_what_to_type(tmp_path):
    flags = ["--epochs", 4000, "--output_dir", tmp_path, "--eval_test_every", 0]
    flags += ["--auto_tune", "off", "--traceback"]
    process = recipe_process(*flags[:-1], start_new_session=True)
    until = time.monotonic() + 300
    while not list(tmp_path.glob("checkpoints/epoch_*")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in error
    said = error.replace("\r", "\n").strip().splitlines()[-1]
    assert said == f"vision_lt.py: interrupted; --resume goes on from what {tmp_path} keeps."
    again = recipe_process(*flags[:-1])
    out, error = again.communicate(timeout=120)
    assert (out, again.returncode) == ("", 2)
    assert "add --resume to go on, or --overwrite to delete that run" in error
    assert len(error.splitlines()) == 1
    shown = recipe_process(*flags)
    _, error = shown.communicate(timeout=120)
    assert (shown.returncode, "Traceback" in error) == (1, True)
