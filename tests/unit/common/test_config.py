"""Options: their help, YAML and back, layers, and one clear line for every mistake."""

import contextlib
import dataclasses
import inspect
import io
import re
from collections.abc import Iterator

import pytest
import yaml

from ssl_vit.commands.cli import find_recipe, layered, recipes, split_config
from ssl_vit.commands.pretrain_options import PretrainConfig
from ssl_vit.common.config import EncoderConfig, InitConfig, RunConfig
from ssl_vit.common.errors import UserError, did_you_mean
from ssl_vit.common.layers import flatten, known_keys, parse, to_yaml, written, yaml_flags
from ssl_vit.common.rates import PretrainOptim
from ssl_vit.common.reading import DataConfig
from ssl_vit.common.schedules import Length
from ssl_vit.methods import method_of
from ssl_vit.options.mae import MAEConfig
from ssl_vit.pretrain import parse_options
from tests.conftest import ROOT

KIND = PretrainConfig[MAEConfig]
DEFAULT = PretrainConfig(method=MAEConfig())
KEYS = known_keys(DEFAULT)
GROUPS = {
    "run": RunConfig,
    "data": DataConfig,
    "init": InitConfig,
    "encoder": EncoderConfig,
    "optim": PretrainOptim,
    "method": MAEConfig,
}


def read(*flags: str, files: tuple = (), default=DEFAULT) -> PretrainConfig:
    return layered(default, files, list(flags), "prog", "about", KIND)


def changed(**groups: dict) -> PretrainConfig:
    """The default with some values of some groups changed."""
    parts = {g: dataclasses.replace(getattr(DEFAULT, g), **v) for g, v in groups.items()}
    return dataclasses.replace(DEFAULT, **parts)


def docstrings(kind: type) -> Iterator[tuple[str, str]]:
    """(field, the string below it) of a dataclass' source and its bases'."""
    source = "".join(inspect.getsource(base) for base in kind.__mro__ if base is not object)
    for field in dataclasses.fields(kind):
        found = re.search(rf'^    {field.name}:[^\n]*\n    """(.*?)"""', source, re.M | re.S)
        yield field.name, found[1] if found else ""


# --- help ---------------------------------------------------------------------------------------


def words(text: str) -> str:
    """The text without frames, colours, line breaks and hyphenation."""
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text)
    return " ".join(text.split())


@pytest.fixture(scope="module")
def help_text() -> str:
    box = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(box):
        patch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as left:
            read("--help")
    assert left.value.code == 0
    return box.getvalue()


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_has_its_meaning_in_the_help(group, help_text):
    shown = words(help_text)
    for name, meaning in docstrings(GROUPS[group]):
        assert meaning, f"{group}.{name} has no docstring"
        flag = f"--{group}.{name.replace('_', '-')}"
        assert f"{flag} " in shown
        assert words(meaning) in shown, f"{flag}: its docstring is not in the help"


def test_the_help_lists_no_other_options(help_text):
    """Those of the groups, and no more; every line of them fits into 80 columns."""
    flags = set(re.findall(r"(?<!\S)--([a-z]+\.[a-z0-9-]+)", words(help_text)))
    assert {f.replace("-", "_") for f in flags} == set(KEYS)
    assert max(len(line) for line in help_text.splitlines()) <= 80


# --- YAML ---------------------------------------------------------------------------------------

CHANGED = changed(
    run={"out": "a folder/with spaces: and colon", "seed": 7, "length": "1.5ep", "resume": "never"},
    data={"channels": 5, "mean": (0.1, 0.2, 0.3, 1e-7, 5.0), "std": (1.0,) * 5, "workers": 0},
    encoder={"image_size": (32, 48), "positions": "sincos", "layer_scale": 1e-5, "registers": 4},
    optim={"lr": 3e-4, "betas": (0.9, 0.95), "clip_by": "parameter", "min_lr": 1e-12},
    method={"normalize_target": False, "crop_scale": (0.08, 1.0), "mask_ratio": 1 / 3},
)


@pytest.mark.parametrize("config", [DEFAULT, CHANGED], ids=["default", "changed"])
def test_yaml_reads_back_to_an_equal_object(config, tmp_path):
    """From any default: what the file says wins over all of it."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    for default in (DEFAULT, CHANGED):
        assert read(files=(file,), default=default) == config


def test_yaml_names_every_option():
    assert set(flatten(yaml.safe_load(to_yaml(DEFAULT)))) == set(KEYS)
    assert set(yaml.safe_load(to_yaml(DEFAULT))) == set(GROUPS)


def test_later_layers_win(tmp_path):
    """Defaults < first file < second file < command line, option by option."""
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("optim: {lr: 1e-3, clip: 1, weight_decay: 0.1}\ndata: {channels: 1}\n")
    second.write_text("optim:\n  clip: 2\n  weight-decay: 0.2\n")
    config = read("--optim.weight-decay", "0.3", files=(first, second))
    expected = {"lr": 1e-3, "clip": 2.0, "weight_decay": 0.3}
    assert config == changed(optim=expected, data={"channels": 1})
    assert read("--optim.weight-decay=0.3").optim.weight_decay == 0.3


def test_flags_of_every_kind():
    flags = "--encoder.image-size 32 48 --optim.betas 0.5 0.6 --method.normalize-target False"
    config = read(*flags.split(), "--optim.lr", "1e-3", "--data.mean", "--run.out", "")
    assert config.encoder.image_size == (32, 48)
    assert config.optim.betas == (0.5, 0.6)
    assert config.method.normalize_target is False
    assert config.optim.lr == 1e-3
    assert config.data.mean == ()
    assert read("--optim.lr", "None").optim.lr is None


def test_switches_may_stand_alone():
    """On the command line, anywhere, in either spelling; with a value they are as ever."""
    flags = ["--run.compile", "--optim.lr", "1e-3", "--method.normalize-target", "False"]
    config = read(*flags, "--run.activation_checkpointing", "--dry-run")
    switches = config.run.compile, config.run.activation_checkpointing, config.dry_run
    assert switches == (True,) * 3
    assert (config.optim.lr, config.method.normalize_target) == (1e-3, False)
    assert read("--run.compile=False", default=config).run.compile is False


def test_switches_in_a_file_need_their_value(tmp_path):
    file = tmp_path / "own.yaml"
    for value in ("[]", "null", "perhaps"):
        file.write_text(f"run: {{compile: {value}}}")
        with pytest.raises(UserError, match=r"own.yaml.*--run.compile"):
            read(files=(file,))
    file.write_text("dry_run: true")
    with pytest.raises(UserError, match="unknown key 'dry_run'"):
        read(files=(file,))


def test_a_dry_run_leaves_no_trace_in_yaml():
    assert to_yaml(read("--dry-run")) == to_yaml(DEFAULT)


# Those of fine-tuning are read by its own door, and tested with it.
PRETRAINING = [
    p for p in sorted((ROOT / "configs").glob("*.yaml")) if not p.stem.startswith("finetune_")
]


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda p: p.stem)
def test_recipes_parse(path):
    """By path and by name, with a header that says the command; each says something."""
    method = method_of(path.stem)
    name, config = parse_options([method, "--config", str(path)])
    assert name == method
    assert config == parse_options([method, "--config", path.stem])[1]
    tree = flatten(yaml.safe_load(path.read_text()))
    assert tree
    found = flatten(dataclasses.asdict(config))
    for key, value in tree.items():
        value = float(value) if isinstance(found[key], float) else value
        assert found[key] == (tuple(value) if isinstance(value, list) else value)
    head = path.read_text().split("\nrun:")[0].split("\ndata:")[0]
    assert f"-m ssl_vit.pretrain {method}" in head
    assert all(line.startswith("#") or not line for line in head.splitlines())


def test_recipes_are_found_by_name():
    assert {"mae_digits", "mae_cifar10"} <= set(recipes())
    assert find_recipe("mae_digits") == recipes()["mae_digits"]
    with pytest.raises(UserError, match=r"--config is 'mae_digit'.*nearest.*mae_digits"):
        find_recipe("mae_digit")
    with pytest.raises(UserError, match=r"'zzz'.*recipes: .*mae_digits"):
        find_recipe("zzz")


def test_config_may_stand_anywhere():
    argv = ["--a", "1", "--config", "x", "--b", "2", "--config=y"]
    assert split_config(argv) == (["x", "y"], ["--a", "1", "--b", "2"])
    with pytest.raises(UserError, match="--config needs a YAML file"):
        split_config(["--a", "--config"])


# --- the pretraining door's own layers ----------------------------------------------------------


def test_a_methods_defaults_lie_below_the_file_and_above_ours(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("data: {train: 'folder:/somewhere/my images'}\n")
    config = parse_options(["mae", "--config", str(file)])[1]
    assert config.encoder.positions == "sincos"
    assert config.optim.betas == (0.9, 0.95)
    assert config.run.out == "runs/mae-my-images"
    file.write_text("encoder: {positions: learned}\nrun: {out: here}\n")
    config = parse_options(["mae", "--config", str(file), "--optim.betas", "0.1", "0.2"])[1]
    assert config.encoder.positions == "learned"
    assert config.optim.betas == (0.1, 0.2)
    assert config.run.out == "here"


def test_without_anything_the_digits_are_learned():
    config = parse_options(["mae"])[1]
    assert config == parse_options(["mae", "--config", "mae_digits"])[1]
    assert config.data.train == "digits:train"
    assert parse_options(["mae", "--data.train", "folder:x"])[1].run.length == RunConfig.length


@pytest.mark.parametrize("argv", [[], ["--run.seed", "1"], ["mea"]])
def test_the_method_must_be_named(argv):
    with pytest.raises(UserError, match="mae"):
        parse_options(argv)


# --- mistakes -----------------------------------------------------------------------------------


def one_line(error: UserError, *parts: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert "  " not in text
    assert not re.search("---|───", text)
    assert len(text) < 300
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim: {lrr: 1}", ["unknown key 'optim.lrr'", "optim.lr"]),
        ("optim: {batch-sise: 1}", ["unknown key 'optim.batch-sise'", "optim.batch_size"]),
        ("lr: 1", ["unknown key 'lr'"]),
        ("optm: {lr: 1}", ["unknown key 'optm.lr'", "optim.lr"]),
        ("method: {decoder_widht: 1}", ["unknown key", "method.decoder_width"]),
        ("optim: {batch_size: many}", ["--optim.batch-size", "many"]),
        ("optim: {batch_size: 1.5}", ["--optim.batch-size", "1.5"]),
        ("run: {precision: fp8}", ["--run.precision", "fp8", "bf16"]),
        ("optim: {betas: [0.9]}", ["--optim.betas"]),
        ("optim: {lr: -1}", ["--optim.lr is -1"]),
        ("run: {length: 100}", ["--run.length is '100'", "10ep"]),
        ("method: {mask_ratio: 1.5}", ["--method.mask-ratio is 1.5"]),
        ("data: {channels: 0}", ["--data.channels is 0"]),
        ("data: {mean: [0.5]}", ["--data.mean and --data.std"]),
        ("method: {normalize_target: perhaps}", ["--method.normalize-target", "perhaps"]),
        ("optim: [1, 2]", ["unknown key 'optim'"]),
        ("optim: {lr: [", ["cannot be read as YAML"]),
        ("- a\n- b", ["must hold groups"]),
        ("a: !!python/object/apply:os.system ['true']", ["cannot be read as YAML"]),
    ],
)
def test_mistakes_in_a_file_name_the_file_in_one_line(text, parts, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read(files=(file,))
    one_line(caught.value, "mine.yaml", *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--optim.lrr", "1"], ["'--optim.lrr'", "nearest", "--optim.lr"]),
        (["--optim.batch_sise=1"], ["--optim.batch_sise=1", "--optim.batch-size"]),
        (["--lr", "1"], ["unknown option '--lr'"]),
        (["stray"], ["unknown option 'stray'"]),
        (["--optim.lr"], ["--optim.lr"]),
        (["--optim.lr", "fast"], ["--optim.lr", "fast"]),
        (["--run.precision", "fp8"], ["--run.precision", "fp8"]),
        (["--run.compile", "perhaps"], ["--run.compile", "perhaps"]),
        (["--dry-rn"], ["'--dry-rn'", "nearest", "--dry-run"]),
        (["--optim.accumulate", "0"], ["--optim.accumulate is 0"]),
    ],
)
def test_mistakes_on_the_command_line_say_so_in_one_line(flags, parts):
    with pytest.raises(UserError) as caught:
        read(*flags)
    one_line(caught.value, "command line", *parts)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.yaml: cannot be read"):
        yaml_flags(tmp_path / "gone.yaml", KEYS)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary.yaml: cannot be read"):
        yaml_flags(tmp_path / "binary.yaml", KEYS)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert yaml_flags(tmp_path / "empty.yaml", KEYS) == []


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RunConfig, {"length": "0ep"}),
        (RunConfig, {"save_every": "often"}),
        (RunConfig, {"keep": 0}),
        (RunConfig, {"log_every": 0}),
        (DataConfig, {"workers": -2}),
        (DataConfig, {"holdout": -1}),
        (DataConfig, {"max_bad": 1.5}),
        (DataConfig, {"mean": (0.5,) * 2, "std": (0.5,) * 2}),
        (DataConfig, {"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}),
        (EncoderConfig, {"image_size": (1, 2, 3)}),
        (EncoderConfig, {"width": -1}),
        (EncoderConfig, {"drop_path": 1.0}),
        (EncoderConfig, {"layer_scale": -1e-5}),
        (EncoderConfig, {"registers": -2}),
        (PretrainOptim, {"batch_size": 0}),
        (PretrainOptim, {"base_lr": float("nan")}),
        (PretrainOptim, {"weight_decay": -0.1}),
        (PretrainOptim, {"lr": 0.0}),
        (PretrainOptim, {"betas": (0.9, 1.0)}),
        (PretrainOptim, {"warmup": "10"}),
        (PretrainOptim, {"freeze_encoder": "10"}),
        (PretrainOptim, {"release": "-1st"}),
        (PretrainOptim, {"encoder_lr": 0.0}),
        (PretrainOptim, {"layer_decay": 1.1}),
        (PretrainOptim, {"patch_lr": 0.0}),
    ],
)
def test_values_out_of_range_are_refused_by_name(kind, options):
    group = {v: k for k, v in GROUPS.items()}[kind]
    flag = f"--{group}.{next(iter(options)).replace('_', '-')}"
    with pytest.raises(UserError, match=rf"{flag} |--data.(mean|std)"):
        kind(**options)


# --- lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps"),
    [("10ep", 70), ("0.5ep", 4), ("1.5ep", 10), ("5000st", 5000), (" 3st ", 3), ("0ep", 0)],
)
def test_lengths(text, steps):
    assert Length.parse(text, "--x").steps(7) == steps


@pytest.mark.parametrize("text", ["", "10", "ep", "-1ep", "10 ep", "1e3st", "10epochs", "nanep"])
def test_lengths_that_are_none(text):
    with pytest.raises(UserError, match=r"--x is .*; allowed: epochs as 10ep, or steps as 500st"):
        Length.parse(text, "--x")


def test_did_you_mean():
    assert did_you_mean("vit_smal", ["vit_small", "resnet"]) == " (nearest known: vit_small)"
    assert did_you_mean("qqq", ["vit_small", "resnet"]) == ""


def test_parse_leaves_the_default_alone():
    before = to_yaml(DEFAULT)
    parse(DEFAULT, ["--run.seed", "5"], "command line", "prog", kind=KIND)
    assert to_yaml(DEFAULT) == before


def test_options_of_earlier_files_that_have_moved(tmp_path):
    """Those of DINOv2's rates are now of the optimizer, for all methods."""
    file = tmp_path / "config.yaml"
    file.write_text("method: {layer_decay: 0.5, patch_lr: 0.3}")
    flags = ["--optim.layer-decay", "0.5", "--optim.patch-lr", "0.3"]
    assert yaml_flags(file, KEYS) == flags
    assert written(yaml.safe_load(file.read_text())) == {
        "optim.layer_decay": 0.5,
        "optim.patch_lr": 0.3,
    }
