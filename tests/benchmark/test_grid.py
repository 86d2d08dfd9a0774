import pytest

from ldam_plugins.benchmark.grid import METHODS, Grid, expand
from ldam_plugins.losses import list_losses
from ldam_plugins.schedules import KINDS

KNOWN = ("epochs", "start", "beta", "max_margin", "mixup", "decay_milestones")


def names(**grid):
    return [cell.name for cell in expand(Grid(preset="digits_lt", **grid), KNOWN)]


def flags(cell):
    preset, *words = cell.arguments
    assert preset == "digits_lt"
    found = {}
    for word in words:
        if word.startswith("--"):
            found[word[2:]] = []
            last = word[2:]
        else:
            found[last].append(word)
    return found


def test_cells_are_all_combinations_seed_by_seed():
    found = names(
        methods=["erm", "ce/drs"], profiles=["exp", "step"], ratios=[10, 100], seeds=[3, 4]
    )
    assert len(found) == len(set(found)) == 16
    assert found[:2] == ["ce_none_exp_r10_s3", "ce_drs_exp_r10_s3"]
    assert [name[-2:] for name in found] == ["s3"] * 8 + ["s4"] * 8


def test_losses_and_schedules_are_crossed_and_methods_are_added_once():
    found = names(losses=["ce", "ldam"], schedules=["none", "drw"], methods=["erm", "hg_drs"])
    assert sorted(found) == [
        "ce_drw_s0",
        "ce_none_s0",
        "hinge_drs_s0",
        "ldam_drw_s0",
        "ldam_none_s0",
    ]


def test_arguments_of_a_cell():
    grid = Grid(
        preset="digits_lt",
        methods=["ldam_drw:max_margin=0.3:start=0.5"],
        ratios=[50],
        seeds=[7],
        settings=["epochs=40", "decay_milestones=32,36"],
        vary=["mixup=0,0.2"],
    )
    plain, mixed = expand(grid, KNOWN)
    assert plain.name == "ldam_drw_mixup-0_max_margin-0.3_start-0.5_r50_s7"
    assert mixed.name == "ldam_drw_mixup-0.2_max_margin-0.3_start-0.5_r50_s7"
    assert flags(mixed) == {
        "loss": ["ldam"],
        "schedule": ["drw"],
        "epochs": ["40"],
        "decay_milestones": ["32", "36"],
        "mixup": ["0.2"],
        "max_margin": ["0.3"],
        "start": ["0.5"],
        "ratio": ["50"],
        "seed": ["7"],
    }


def test_a_grid_without_a_preset_begins_with_its_flags():
    (cell,) = expand(Grid("", methods=["ldam_drw"], settings=["epochs=3"]), KNOWN)
    words = ("--loss", "ldam", "--schedule", "drw", "--epochs", "3", "--seed", "0")
    assert (cell.name, cell.arguments) == ("ldam_drw_s0", words)


def test_a_ratio_needs_a_profile_where_no_preset_has_one():
    with pytest.raises(
        ValueError, match=r"`ratios` must be left out .*got \[10\]\. Add --profiles"
    ):
        expand(
            Grid("", methods=["erm"], settings=["dataset=own"], ratios=[10]), (*KNOWN, "dataset")
        )
    (cell,) = expand(
        Grid("", methods=["erm"], ratios=[10]), KNOWN
    )  # the recipe's own preset has it
    assert cell.name == "ce_none_r10_s0"


def test_own_settings_of_a_method_win_and_the_long_tail_is_the_presets_unless_given():
    (cell,) = expand(
        Grid("digits_lt", methods=["ldam_drw:beta=0.9"], settings=["beta=0.99"]), KNOWN
    )
    assert flags(cell)["beta"] == ["0.9"]
    assert not {"ratio", "profile"} & set(flags(cell))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"methods": ["ldam_dwr"]}, r"`methods` must be.*'ldam_dwr'\. Did you mean 'ldam_drw'"),
        ({"methods": ["ladm/drw"]}, r"loss of method ladm/drw.*Did you mean 'ldam'"),
        ({"methods": ["ldam/dwr"]}, r"schedule of method ldam/dwr.*Did you mean 'drw'"),
        ({"methods": ["erm:epoch=3"]}, r"option in method erm:epoch=3.*Did you mean 'epochs'"),
        ({"methods": ["erm:epochs"]}, r"option=value, got 'epochs'"),
        ({"methods": ["erm"], "settings": ["epoch=3"]}, r"option in set.*Did you mean 'epochs'"),
        ({"methods": ["erm"], "settings": ["loss=ce"]}, r"got 'loss'\. Write --methods ce/none"),
        ({"methods": ["erm"], "settings": ["schedule=rw"]}, r"'schedule'\. Write --methods ce/rw"),
        ({"methods": ["erm"], "settings": ["profile=none"]}, r"Write --profiles none\."),
        ({"methods": ["erm"], "vary": ["ratio=9,10"]}, r"got 'ratio'\. Write --ratios 9 10\."),
        ({"methods": ["erm:seed=3"]}, r"leaves free, got 'seed'\. Write --seeds 3\."),
        ({"methods": ["erm"], "settings": ["output_dir=x"]}, r"Write --output_dir x\."),
        ({"methods": ["erm"], "settings": ["resume=no"]}, r"'resume'\. Begun cells go on by"),
        ({"methods": ["erm"], "vary": ["start=0.5,0.6"]}, r"`start` must be set for a method with"),
        ({"methods": ["erm:beta=0.9"]}, r"`beta`.*got 'none'.*ldam_drw:beta=0.9"),
        ({"losses": ["ce"]}, r"`schedules` must be given where `losses` are"),
        ({"losses": ["ec"], "schedules": ["none"]}, r"`losses`.*'ec'"),
        ({"losses": ["ce"], "schedules": ["now"]}, r"`schedules`.*'now'"),
        ({"methods": ["erm"], "profiles": ["expo"]}, r"`profiles`.*Did you mean 'exp'"),
        ({"methods": ["erm"], "ratios": [0.5]}, r"`ratios`"),
        ({"methods": ["erm"], "seeds": [-1]}, r"`seeds`"),
        ({"methods": ["erm"], "seeds": []}, r"at least one seed"),
        ({}, r"Name methods"),
    ],
)
def test_bad_entries_are_named_with_a_way_out(grid, message):
    with pytest.raises(ValueError, match=message):
        names(**grid)


def test_methods_have_losses_and_schedules_that_exist():
    pairs = [(method.loss, method.schedule) for method in METHODS.values()]
    assert len(set(pairs)) == len(pairs)
    assert all(loss in list_losses() and kind in KINDS for loss, kind in pairs)
