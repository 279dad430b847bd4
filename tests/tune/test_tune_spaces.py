"""What is searched, and which configurations a seed draws."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everbatch import config
from everbatch.declared import Range
from everbatch.tune.drive import missing
from everbatch.tune.ledger import Ledger
from everbatch.tune.pair import ScenarioPair
from everbatch.tune.plan import Plan, SearchOptions
from everbatch.tune.spaces import Method, draw, draw_all, gtep, plain_space, space_from
from everbatch.tune.stream import SCENARIO, flat
from everbatch.tune.two_phase import TwoPhase
from processes import ROOT


@pytest.mark.parametrize(("name", "path"), [
    ("gdumb", "gdumb.capacity"), ("agem", "episodic.capacity"), ("icarl", "nearest_mean.capacity"),
    ("er+sam", None), ("lwf", None), ("er_ace", None)])
def test_every_memory_holds_as_much_as_replay_does(name: str, path: str | None) -> None:
    found = Method(name)
    assert found.capacities == ([] if path is None else [path])
    shared = {} if path is None else {path: 20}
    assert found.within({"replay.capacity": 20}) == {**shared, **found.options}
    assert found.within({"replay.capacity": 20, **dict.fromkeys(found.capacities, 7)}) == found.options


def plan(options: SearchOptions, folder: Path) -> Plan:
    return Plan(options, dict(SCENARIO), [2, 1, 1, 1], [0, 1], "digits", "0" * 64, folder)


def test_a_seed_draws_the_same_configurations_and_another_seed_others() -> None:
    space = Method("dark_er_pp").space
    assert draw_all(space, 3, 12) == draw_all(space, 3, 12)
    assert draw_all(space, 3, 12) != draw_all(space, 4, 12)
    assert draw(space, 3, 7) == draw_all(space, 3, 12)[7]  # whatever else is drawn
    assert all(values[path] in tuple(space[path]) for values in draw_all(space, 0, 40) for path in space)  # type: ignore[arg-type]


def test_an_interval_is_drawn_inside_and_by_orders_of_magnitude() -> None:
    drawn = [draw({"optimizer.lr": Range(1e-4, 1.0, log=True)}, 0, i)["optimizer.lr"] for i in range(400)]
    assert all(1e-4 <= value <= 1 for value in drawn)
    assert 0.4 < sum(value < 1e-2 for value in drawn) / 400 < 0.6
    even = [draw({"optimizer.lr": Range(1.0, 3.0)}, 0, i)["optimizer.lr"] for i in range(400)]
    assert 1.9 < sum(even) / 400 < 2.1


def test_a_method_searches_what_its_parts_declare_and_use() -> None:
    assert "replay.alpha" not in Method("er").space and "replay.alpha" in Method("derpp").space
    assert Method("der++").options == Method("dark_er_pp").options == {"replay.method": "dark_er_pp"}
    assert {"optimizer.refresh.gamma", "optimizer.refresh.every", "replay.beta"} <= Method("er+refresh").space.keys()
    assert Method("mas").options == {"replay": None, "optimizer.mas": {}}
    assert "replay.beta" not in Method("er_ace+sam").space and "optimizer.sam.rho" in Method("er_ace+sam").space
    assert Method("finetune").options == {"replay": None}


def test_a_space_is_read_as_it_is_written() -> None:
    for space in (gtep("podnet"), Method("er+sam").space, {"optimizer.lr": Range(0.1, 0.2, log=True)}):
        again = space_from(plain_space(space), "space")
        assert plain_space(again) == plain_space(space) and draw_all(again, 1, 5) == draw_all(space, 1, 5)


def test_options_may_be_nested_or_dotted() -> None:
    tree = {"trainer": {"epochs": 1, "schedule": {"kind": "cosine"}}, "replay.capacity": 3, "optimizer": {"ewc": {}}}
    assert flat(tree) == {"trainer.epochs": 1, "trainer.schedule.kind": "cosine", "replay.capacity": 3, "optimizer.ewc": {}}
    given = SearchOptions(methods=("er",), space={"all": {"optimizer": {"lr": {"low": 0.1, "high": 0.2}}}})
    assert given.space_of("er")["optimizer.lr"] == Range(0.1, 0.2)


SEARCHED: list[tuple[dict[str, Any], str]] = [
    ({"methods": ("dark_er_p",)}, "did you mean 'dark_er_pp'?"),
    ({"methods": ("er+refrsh",)}, "did you mean 'refresh'?"),
    ({"methods": ("er+dark_er",)}, "must join methods that agree"),
    ({"methods": ("der",)}, "must be dark_er or dark_er_pp"),
    ({"methods": ("er", "er")}, "must be named once"),
    ({"methods": ()}, "must name at least one"),
    ({"scheduler": "pbt"}, "changes values in the middle of a stream"),
    ({"scheduler": "Population_Based_Training"}, "changes values in the middle of a stream"),
    ({"scheduler": "asha"}, "which drops slow learners"),
    ({"scheduler": "rase"}, "did you mean 'race'?"),
    ({"race": True, "searcher": "optuna"}, "must be one of them"),
    ({"trials": 0}, "must be an integer >= 1"),
    ({"time_limit": 0.0}, "must be a finite number > 0"),
    ({"ranks": 0}, "must be an integer >= 1"),
]


@pytest.mark.parametrize(("options", "said"), SEARCHED)
def test_a_search_that_cannot_be_is_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="(tune|method): ") as caught:
        SearchOptions(**options)
    assert said in str(caught.value)


SPACES: list[tuple[dict[str, Any], str]] = [
    ({"space": {"er": {"optimizer.lrr": [0.1]}}}, "did you mean 'optimizer.lr'?"),
    ({"space": {"err": {"optimizer.lr": [0.1]}}}, "did you mean 'er'?"),
    ({"space": {"er": {"replay.beta": []}}}, "must be a list of values, or low and high"),
    ({"space": {"er": {"replay.beta": [0.5, -1.0]}}}, "beta=-1.0"),
    ({"space": {"er": {"replay.beta": {"low": 2, "high": 1}}}}, "must be finite, and ascend"),
    ({"space": {"er": {"replay.capacity": [20, 50]}}}, "it belongs to the scenario"),
    ({"space": {"er": {"trainer.seed": [0, 1]}}}, "the protocol sets it"),
    ({"space": {"er": {"data.source": ["other.npz"]}}}, "the protocol sets it"),
    ({"space": {"er": {"data.sources": [["other.npz"]]}}}, "the protocol sets it"),
    ({"space": {"er": {"data": [{"sources": ["other.npz"]}]}}}, "the protocol sets it"),
    ({"space": {"er": {"optimizer": ["mine.yaml"]}}}, "be the options themselves"),
    ({"space": {"er": {"replay": [{"capacity": 50}]}}}, "it belongs to the scenario"),
    ({"space": {"er": {"replay.alpha": [0.1, 0.5]}}}, "replay.alpha in the space of er, must be left out; no effect: "),
    ({"gtep": "icral"}, "did you mean 'icarl'?"),
    ({"gtep": "icarl"}, "unknown key 'T'"),
    ({"ranks": 2}, "with engine.kind=plain, must be 1"),
]


@pytest.mark.parametrize(("options", "said"), SPACES)
def test_a_space_that_cannot_be_is_refused_before_the_first_trial(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        plan(SearchOptions(**{"methods": ("er",), **options}), tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_published_list_can_be_searched(tmp_path: Path) -> None:
    made = plan(SearchOptions(methods=("er",), gtep="replay", trials=3), tmp_path)
    assert made.values["er"][0]["trainer.epochs"] == 160 and "replay.beta" not in made.values["er"][0]
    trial = made.trial("er", 0, made.values["er"][0], [0])
    assert trial.options[2]["trainer.schedule.kind"] in ("steps", "cosine")


OVERRIDDEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"optimizer.lr": 0.5}, {}, "optimizer.lr=0.5 in the scenario and optimizer.lr in the space of er, must be in one of them"),
    ({"trainer.epochs": 10}, {"gtep": "replay"}, "trainer.epochs=10 in the scenario and trainer.epochs in the space of er"),
    ({"trainer.schedule.kind": "cosine"}, {"space": {"all": {"trainer": [{"schedule": {"kind": "constant"}}]}}},
     "trainer.schedule.kind='cosine' in the scenario and trainer.schedule.kind in the space of er"),
    ({"optimizer.base": "sgd"}, {"bounds": ("lamb",)}, "optimizer.base='sgd' in the scenario, must be 'adamw' or left out; lamb"),
]


@pytest.mark.parametrize(("scenario", "options", "said"), OVERRIDDEN)
def test_a_scenario_option_that_a_method_would_override_is_refused(
    scenario: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path,
) -> None:
    search = SearchOptions(**{"methods": ("er",), **options})
    with pytest.raises(ValueError) as caught:
        Plan(search, {**SCENARIO, **scenario}, [2, 1, 1, 1], [0, 1], "digits", "0" * 64, tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(said)):  # before anything is prepared
        TwoPhase(pair=ScenarioPair(scenario=scenario), search=search)


# ------------------------------------------------------------------------------------------------------------------ rounds
def filled(score: Callable[[dict[str, Any], int], float | None]) -> Callable[[list[Any]], None]:
    """Instead of Ray: units with scores from a function; None is a failure."""
    def go(trials: list[Any]) -> None:
        for trial in trials:
            for order, key in trial.units:
                value = score(trial.options[2], order)
                outcome = ({"failed": "diverged", "cause": "nan"} if value is None
                           else {"avg_acc": value, "acc": value, "accuracies": [value]})
                about = {"key": key, "options": {}, "order": order, "seconds": 1.0, "cpu_seconds": 1.0}
                Ledger(trial.ledger).write({**about, **outcome})
                if value is None:
                    break
    return go


def test_a_race_leaves_the_worse_half_behind_whatever_ends_first(tmp_path: Path) -> None:
    def score(values: dict[str, Any], order: int) -> float:
        return values["optimizer.lr"] * 5 + values["replay.beta"] / 10 + order / 100

    results = []
    for turn, way in enumerate((list, reversed)):
        made = plan(SearchOptions(methods=("er",), trials=9, race=True), tmp_path / str(turn))
        made.run(lambda trials, way=way: filled(score)(list(way(trials))))  # type: ignore[misc]
        results.append(made.results()["er"])
    assert results[0] == results[1]
    states = [row["status"] for row in results[0]["configurations"]]
    assert states.count("complete") < 9 and {"complete", "raced_out"} == set(states)
    best = max((row for row in results[0]["configurations"]), key=lambda row: (row["orders"][0]["avg_acc"], -row["id"]))
    assert results[0]["chosen"] == best["id"] and len(best["orders"]) == 2


def test_a_configuration_with_one_failed_order_is_listed_and_never_chosen(tmp_path: Path) -> None:
    made = plan(SearchOptions(methods=("er",), trials=6), tmp_path)
    best = max(range(6), key=lambda i: (made.values["er"][i]["optimizer.lr"], -i))
    best_values = made.values["er"][best]
    made.run(filled(lambda v, order: None if v == best_values and order == 1 else v["optimizer.lr"]))
    found = made.results()["er"]
    assert found["configurations"][best]["status"] == "failed" and found["chosen"] != best
    assert {"id": best, "order": 1, "failed": "diverged", "cause": "nan"} in found["failures"]


def test_equal_configurations_share_their_units(tmp_path: Path) -> None:
    space = {"er": {"replay.beta": [0.5], "replay.replay_batch": [16]}}
    made = plan(SearchOptions(methods=("er",), trials=8, space=space), tmp_path)
    ran: list[Any] = []
    made.run(lambda trials: (ran.extend(trials), filled(lambda v, order: v["optimizer.lr"])(trials))[1])
    assert len(ran) == len({str(values) for values in made.values["er"]}) < 8
    assert all(row["status"] == "complete" for row in made.results()["er"]["configurations"])
    assert made.cost()["streams"] == 2 * len(ran)


def test_a_half_written_unit_is_no_unit(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    whole = {"key": "a", "avg_acc": 0.5, "order": 0}
    ledger.write(whole)
    ledger.path("b").write_text('{"key": "b", "avg_acc": 0.')
    ledger.path("c").write_text('{"key": "other", "avg_acc": 0.5}')
    assert ledger.read("a") == whole and ledger.read("b") is None and ledger.read("c") is None and ledger.read("d") is None
    ledger.write({**whole, "avg_acc": 0.9})
    assert ledger.read("a") == whole  # what is finished is never replaced
    with pytest.raises(ValueError):
        ledger.write({"key": "e", "avg_acc": float("nan")})
    assert ledger.read("e") is None


# ------------------------------------------------------------------------------------------------------------------ recipe
def test_the_recipe_and_the_lines_of_the_readme_parse() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "recipes" / "two_phase.py").read_text()
    lines = [line.split("  ")[0] for line in re.findall(r"^python recipes/two_phase\.py(.*)$", text, flags=re.MULTILINE)]
    assert len(lines) >= 6
    for line in lines:
        made = config.parse(TwoPhase, line.split(), default_yaml=ROOT / "recipes" / "two_phase.yaml")
        assert [*made.commands()] == ["prepare", "search", "evaluate", "conventional"]


def test_the_default_is_156_streams_and_the_published_size_is_one_word() -> None:
    def streams(*words: str) -> int:
        made = config.parse(TwoPhase, list(words), default_yaml=ROOT / "recipes" / "two_phase.yaml").commands()
        pair, options = made["prepare"], made["search"]
        searched = len(options.methods) * options.trials * pair.orders
        return 2 * searched + (2 * len(options.methods) + len(options.bounds)) * pair.evaluation_orders

    assert streams() == 156 and streams("faithful=true") == 660


def test_an_option_that_faithful_sets_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(TwoPhase, ["faithful=true", "search.trials=12"])
    assert "search.trials has no effect here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="search.trials=5 has no effect here, must be left out; faithful=true sets it"):
        TwoPhase(faithful=True, search=SearchOptions(trials=5))


def test_only_the_evaluation_is_told_where_its_data_is() -> None:
    made = TwoPhase(output="runs/x", nonce="/safe/nonce").commands()
    search = str(vars(made["search"]))
    assert "evaluation" not in search and "nonce" not in search and made["search"].data == "runs/x/tuning"
    assert made["evaluate"].nonce == made["conventional"].nonce == made["prepare"].nonce == "/safe/nonce"


@pytest.mark.slow
def test_optuna_proposes_the_same_whichever_trial_ends_first_and_runs_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    best = {"optimizer.lr": 0.05, "replay.beta": 1.0}

    def score(values: dict[str, Any], order: int) -> float | None:
        if values["replay.replay_batch"] == 16:
            return None  # a failure, which a proposal must live with
        return 0.5 + 0.2 * sum(values[path] == value for path, value in best.items())

    found = []
    for turn, way in enumerate((list, reversed)):
        made = plan(SearchOptions(methods=("er",), trials=30, searcher="optuna"), tmp_path / str(turn))
        made.run(lambda trials, way=way: filled(score)(list(way(trials))))  # type: ignore[misc]
        found.append(made.values)
    assert found[0] == found[1] and len(found[0]["er"]) == 30
    again, ran = plan(SearchOptions(methods=("er",), trials=30, searcher="optuna"), tmp_path / "0"), []
    again.run(lambda trials: ran.extend(trial for trial in trials if missing(trial)))
    assert again.values == found[0] and ran == []  # the ledger says what was proposed after it
    scores = [sum(values[path] == value for path, value in best.items()) for values in found[0]["er"]]
    assert sum(scores[15:]) > 2 * sum(scores[:15])  # it learns


def test_the_commands_are_named_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    from everbatch.tune.commands import COMMANDS, main

    assert main(["--help"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[1:-1]] == list(COMMANDS) == ["prepare", "search", "evaluate", "conventional"]
    assert main([]) == 2 and main(["serch"]) == 2 and "did you mean 'search'?" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- commands
def test_the_commands_are_found_from_both_doors(capsys: pytest.CaptureFixture[str]) -> None:
    from everbatch.cli import main as everbatch
    from everbatch.tune.commands import main

    assert everbatch(["tune", "--help"]) == 0 and "conventional" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["search", "evaluation=there"])
    assert capsys.readouterr().err.startswith("search: unknown key 'evaluation'")
