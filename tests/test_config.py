"""The configuration tree: layers, overrides, help, messages, and the round trip through the dumped file."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from everbatch.config import ConfigError, build, dump, help_text, parse, resolved
from everbatch.errors import check_real


class Sharp:
    """A mixin, as far as configuration is concerned."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sharpness term."""

        rho: float = 0.05
        """Radius in parameter units, >= 0."""

        def __post_init__(self) -> None:
            check_real("Sharp", "rho", self.rho, 0.0)


@dataclass(frozen=True, kw_only=True)
class Average:
    """Average of the weights."""

    decay: float = 0.99
    """Decay per step, in [0, 1)."""


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True, kw_only=True)
class Updates:
    lr: float = 0.1
    """Learning rate at the end of warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment, 90% and 99.9%."""
    sharp: Sharp.Config = field(default_factory=Sharp.Config)
    average: Average | None = None


@dataclass
class Recipe:
    """Trains nothing.

    But has every kind of option.
    """

    data: str = "digits"
    """Where samples come from."""
    out: Path = Path("runs/test")
    """Folder of the run."""
    dry_run: bool = False
    """Print the configuration and stop."""
    name: Optional[str] = None  # noqa: UP045
    kind: Literal["reservoir", "balanced"] = "reservoir"
    threshold: Literal["auto"] | float = "auto"
    seeds: list[int] = field(default_factory=lambda: [0])
    colour: Colour = Colour.RED
    updates: Updates = field(default_factory=Updates)
    """What moves the weights."""
    warmup: Average | None = field(default_factory=lambda: Average(decay=0.5))
    deepspeed: dict[str, Any] | None = None


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(Recipe, list(argv))
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err.strip()


def test_nothing_given_is_the_defaults() -> None:
    assert parse(Recipe, []) == Recipe()


@pytest.mark.parametrize("argv", [["updates.lr=1e-3"], ["--updates.lr=1e-3"], ["--updates.lr", "1e-3"]])
def test_three_spellings_of_an_override(argv: list[str]) -> None:
    assert parse(Recipe, argv).updates == Updates(lr=0.001)


def test_overrides_of_every_kind() -> None:
    config = parse(Recipe, [
        "--dry-run", "data=a=b c", "out=/x/y", "name=null", "kind=balanced", "threshold=0.5", "seeds=[1, 2]",
        "colour=BLUE", "updates.betas=[0.5, 1]", "--updates.sharp.rho", "0", "updates.average={}", "warmup=null",
        "deepspeed.bf16.enabled=true", "deepspeed={zero_optimization: {stage: 2}}",
    ])
    assert config == Recipe(
        data="a=b c", out=Path("/x/y"), dry_run=True, kind="balanced", threshold=0.5, seeds=[1, 2], colour=Colour.BLUE,
        updates=Updates(betas=(0.5, 1.0), sharp=Sharp.Config(rho=0.0), average=Average()), warmup=None,
        deepspeed={"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    )
    assert isinstance(config.updates.betas, tuple) and isinstance(config.updates.sharp.rho, float)


def test_text_options_are_taken_literally() -> None:
    assert [parse(Recipe, [f"data={text}"]).data for text in ("5", "null", "1e-3", "[x", "no")] == [
        "5", "null", "1e-3", "[x", "no"]
    assert not parse(Recipe, ["dry-run=false"]).dry_run


def test_layers_later_wins(tmp_path: Path) -> None:
    base, one, two = (tmp_path / name for name in ("base.yaml", "one.yaml", "two.json"))
    base.write_text("updates: {lr: 1, betas: [0, 0]}\nseeds: [9]\n")
    one.write_text("updates.lr: 2e-0\nwarmup: null\nupdates: {average: {decay: 0.1}}\n")
    two.write_text('{\t"updates": {"lr": 3}}')
    config = parse(Recipe, ["updates.betas=[0, 1]", "--config", str(one), f"--config={two}"], default_yaml=base)
    assert config == Recipe(
        seeds=[9], warmup=None, updates=Updates(lr=3.0, betas=(0.0, 1.0), average=Average(decay=0.1)))


def test_an_optional_part_keeps_its_other_defaults_and_comes_back_after_null() -> None:
    assert parse(Recipe, ["warmup=null", "warmup={}"]).warmup == Average(decay=0.5)
    assert parse(Recipe, ["warmup=null"]).warmup is None


def test_a_group_or_a_free_tree_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0, "bf16": {"enabled": true}}')
    (tmp_path / "updates.yaml").write_text("lr: 7.0")
    config = parse(Recipe, [
        f"deepspeed={tmp_path}/ds.json", "deepspeed.bf16.enabled=false", f"updates={tmp_path}/updates.yaml"])
    assert config.deepspeed == {"gradient_clipping": 0, "bf16": {"enabled": False}}
    assert config.updates == Updates(lr=7.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["updates.shrp.rho=1"], "recipe: unknown key 'updates.shrp.rho', did you mean 'updates.sharp.rho'?"),
        (["updates.sharp.roh=1"], "recipe: unknown key 'updates.sharp.roh', did you mean 'updates.sharp.rho'?"),
        (["rho=1"], "recipe: unknown key 'rho', did you mean 'updates.sharp.rho'?"),
        (["data.x=1"], "recipe: unknown key 'data.x', did you mean 'data'?"),
        (["updates.lr=fast"], "recipe: updates.lr='fast', must be a number"),
        (["updates.lr=null"], "recipe: updates.lr=null, must be a number"),
        (["updates.lr=true"], "recipe: updates.lr=true, must be a number"),
        (["updates.lr=.nan"], "recipe: updates.lr: holds NaN, must be a number"),
        (["updates.betas=[1]"], "recipe: updates.betas=[1], must be a list of 2: a number, a number"),
        (["seeds=[1.5]"], "recipe: seeds=[1.5], must be a list, each a whole number"),
        (["seeds=3"], "recipe: seeds=3, must be a list, each a whole number; in brackets: seeds=[3]"),
        (["updates.lr=nan"], "recipe: updates.lr='nan', must be a number"),
        (["kind=reservoire"], "recipe: kind='reservoire', must be one of 'reservoir', 'balanced'; did you mean 'reservoir'?"),
        (["kind=best"], "recipe: kind='best', must be one of 'reservoir', 'balanced'"),
        (["threshold=high"], "recipe: threshold='high', must be one of 'auto' or a number"),
        (["colour=GREEN"], "recipe: colour='GREEN', must be one of RED, BLUE"),
        (["dry_run=yes"], "recipe: dry_run='yes', must be true or false"),
        (
            ["updates=3"],
            "recipe: updates=3, must be keys and values, the name of a file of them; "
            "its keys: lr, betas, sharp, average",
        ),
        (
            ["updates.sharp.rho=-0.1"],
            "recipe: updates.sharp.rho: Sharp: rho=-0.1, must be a finite number >= 0",
        ),
        (["digits"], "recipe: unexpected argument 'digits', must be key=value, --key value or --config FILE"),
        (["--updates.lr"], "recipe: updates.lr: a value is missing, must be --updates.lr VALUE or updates.lr=VALUE"),
        (["--config", "none.yaml"], "recipe: cannot read 'none.yaml': No such file or directory"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert fails(capsys, *argv) == message


@pytest.mark.parametrize(("key", "meant"), [
    ("updates.learning_rate", "updates.lr"), ("learning-rate", "updates.lr"), ("LR", "updates.lr"), ("updates.Lr", "updates.lr"),
    ("dataset", "data"), ("deep_speed", "deepspeed"), ("updates.average.dcay", "updates.average.decay"),
    ("zzz", None), ("updates.shrap.rho", "updates.sharp.rho"), ("random_seed", "seeds")])
def test_the_names_that_others_use_are_understood(capsys: pytest.CaptureFixture[str], key: str, meant: str | None) -> None:
    said = fails(capsys, f"{key}=1")
    assert (f"did you mean {meant!r}?" in said) if meant else "known here: data, out" in said


def test_choices_in_another_case_and_infinity_in_plain_letters() -> None:
    config = parse(Recipe, ["kind=Balanced", "updates.lr=inf", "updates.betas=[-Infinity, 1]", "colour=RED", "data=Digits"])
    assert config.kind == "balanced" and config.data == "Digits"
    assert config.updates == Updates(lr=math.inf, betas=(-math.inf, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("updates: {lr: 1, lr: 2}", "{file}, line 1: duplicate key 'lr'"),
        ("data: a\ndata: b", "{file}, line 2: duplicate key 'data'"),
        (
            "data: !!python/object/apply:os.system [ls]",
            "{file}, line 1: the tag '!!python/object/apply:os.system' is refused: only plain values are read, "
            "never objects",
        ),
        ("updates: {sharp: {roh: 1}}", "unknown key 'updates.sharp.roh', did you mean 'updates.sharp.rho'?"),
        ("updates: {lr: .NaN}", "updates.lr: holds NaN, must be a number"),
        ("data: 5", "data=5, must be text"),
        ("updates: {lr: '0.1'}", "updates.lr='0.1', must be a number"),
        ("[1]", "'{file}': holds list, must hold keys and values"),
        ("data: [a", "{file}, line 1: expected ',' or ']', but got '<stream end>'"),
        ("updates: {lr: 1}\nupdates.lr: 2", "duplicate key 'updates.lr': it is given in two spellings"),
        ("dry-run: true\ndry_run: false", "duplicate key 'dry_run': it is given in two spellings"),
        ("warmup: null\nwarmup.decay: 0.1", "duplicate key 'warmup.decay': it is given in two spellings"),
        ("warmup.decay: 0.1\nwarmup: null", "duplicate key 'warmup': it is given in two spellings"),
        ("deepspeed: {a: {b: 1}, a.b: 2}", "duplicate key 'deepspeed.a.b': it is given in two spellings"),
        ("deepspeed: {a: 1}\ndeepspeed.a.b: 2", "duplicate key 'deepspeed.a.b': it is given in two spellings"),
    ],
)
def test_bad_files_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert fails(capsys, "--config", str(file)) == "recipe: " + message.format(file=file)


def test_keys_of_one_group_may_be_dotted_and_nested(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("updates: {lr: 1}\nupdates.betas: [0, 0]\ndeepspeed: {a: 1}\ndeepspeed.b: 2\n")
    config = parse(Recipe, ["--config", str(file)])
    assert config.updates == Updates(lr=1.0, betas=(0.0, 0.0)) and config.deepspeed == {"a": 1, "b": 2}


def test_a_key_of_thousands_of_parts_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nested too deep" in fails(capsys, f"deepspeed.{'a.' * 5000}b=1")


def test_only_one_process_of_a_node_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse(Recipe, ["nonsense=1"])
    assert stop.value.code == 2 and capsys.readouterr().err == ""


def test_a_required_option() -> None:
    Needy = dataclasses.make_dataclass("Needy", [("folder", str), ("inner", Updates)])
    with pytest.raises(ConfigError, match=r"^folder: is missing, must be text; give folder=VALUE$"):
        build(Needy)
    assert build(Needy, {"folder": "x"}).inner == Updates()


def test_two_dataclasses_for_one_field_are_refused() -> None:
    Vague = dataclasses.make_dataclass("Vague", [("part", Average | Updates, None)])
    with pytest.raises(TypeError, match="part is .* must be one dataclass"):
        build(Vague)


@pytest.mark.parametrize("name", ["config.yaml", "deep/config.yaml"])
def test_the_dumped_file_gives_the_same_configuration(tmp_path: Path, name: str) -> None:
    config = parse(Recipe, [
        "updates.lr=1e-05", "data=1e-3", "name=no", "updates.average.decay=0.3", "warmup=null", "colour=BLUE",
        "threshold=0.25", "seeds=[]", "out=a b", "dry_run=true",
        "deepspeed={a: {b: '1e-3', c: 1e9, d: null}, e: [1, x]}",
    ])
    dump(config, tmp_path / name)
    again = parse(Recipe, ["--config", str(tmp_path / name)])
    assert again == config and resolved(again) == resolved(config)
    assert again.deepspeed == {"a": {"b": "1e-3", "c": 1e9, "d": None}, "e": [1, "x"]}
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == ["config.yaml"]


def test_infinity_survives_the_round_trip(tmp_path: Path) -> None:
    config = build(Recipe, {"updates": {"lr": math.inf}})
    dump(config, tmp_path / "c.yaml")
    assert parse(Recipe, ["--config", str(tmp_path / "c.yaml")]) == config


def test_print_config_can_be_fed_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Recipe, ["updates.lr=3", "--print-config"])
    assert stop.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(Recipe, ["--config", str(file)]) == Recipe(updates=Updates(lr=3.0))


def test_help_documents_every_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("updates: {lr: 0.025}")
    with pytest.raises(SystemExit) as stop:
        parse(Recipe, ["--help"], default_yaml=base, prog="demo")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in (
        "--data DATA Where samples come from. (type: str, default: digits)",
        "--updates.lr LR Learning rate at the end of warm-up. (type: float, default: 0.025)",
        "Decay of the first and second moment, 90% and 99.9%.",
        "--updates.sharp.rho RHO Radius in parameter units, >= 0. (type: float, default: 0.05)",
        "--updates.average.decay DECAY Decay per step, in [0, 1). (type: float, default: 0.99)",
        "Off by default: updates.average={} or any of its options turns it on",
        "usage: demo", "Trains nothing.",
    ):
        assert option in shown, option
    assert all(f"--{key}" in shown for key in ("out", "dry_run", "name", "kind", "threshold", "seeds", "warmup.decay"))
    assert "seeds+" not in shown


def test_help_of_a_class_made_at_run_time() -> None:
    Made = dataclasses.make_dataclass("Made", [("x", int, field(default=1, metadata={"help": "A count."}))])
    assert "A count." in help_text(Made)


def test_help_is_fast_and_needs_no_torch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent("""
        import sys, time
        start = time.process_time()
        from dataclasses import dataclass
        from everbatch.config import help_text
        @dataclass
        class Recipe:
            x: int = 1
        help_text(Recipe)
        assert "torch" not in sys.modules
        print(time.process_time() - start)
    """))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "lib")}
    times = [float(subprocess.check_output([sys.executable, script], text=True, env=environment)) for _ in range(3)]
    assert min(times) < 1.0  # measured 0.2 s; more would mean that something heavy crept in


def test_no_code_is_named_by_a_value() -> None:
    spec = {"class_path": "subprocess.Popen", "init_args": {"args": "ls"}}
    assert build(Recipe, {"deepspeed": spec}).deepspeed == spec  # stays a mapping
    with pytest.raises(ConfigError, match="unknown key 'updates.class_path'"):
        build(Recipe, {"updates": spec})


@dataclass
class Base:
    a: int = 1
    """Text of a."""


@dataclass
class Derived(Base):
    b: int = 2
    """Text of b."""


def test_inherited_fields_keep_their_text() -> None:
    shown = help_text(Derived)
    assert "Text of a." in shown and "Text of b." in shown
