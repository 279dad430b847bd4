"""A record is what its search saw, or is refused; and what only the published checksum can tell."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from everbatch.tune import evaluate as judging
from everbatch.tune.evaluate import Conventional, Evaluate, conventional, evaluate, results
from everbatch.tune.ledger import canonical, sha256
from everbatch.tune.record import freeze, read, select, verify
from tuning import by_rate, fill, pair, prepared, recorded, reload

METHODS = {"methods": ("er",), "bounds": ("finetune",)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = prepared(tmp_path_factory.mktemp("records"))
    recorded(made, **METHODS)
    return made


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    made = prepared(tmp_path)
    recorded(made, **METHODS)
    return made


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Streams get their scores from a function, and are counted."""
    ran: list[Any] = []

    @contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    def drive(trials: list[Any], *_: Any) -> None:
        from everbatch.tune.drive import missing

        left = [trial for trial in trials if missing(trial)]
        ran.extend((trial.method, order) for trial in left for order, _ in trial.units)
        fill(left, by_rate)

    monkeypatch.setattr(judging, "cluster", nothing)
    monkeypatch.setattr(judging, "drive", drive)
    monkeypatch.setattr(judging, "report", lambda *_: "the report")  # drawn in a test of its own
    return ran


def judged(run: Path, record: Path | None = None, **options: Any) -> dict[str, Any]:
    path = record or run / "search" / "record.json"
    return evaluate(Evaluate(record=str(path), data=str(run / "evaluation"), **options))


def forged(run: Path, change: Callable[[dict[str, Any]], None], name: str, *, checksum: bool) -> Path:
    """A changed copy of the record, its checksum made anew or left as it was."""
    record = reload(run / "search" / "record.json")
    change(record["body"])
    if checksum:
        record["sha256"] = sha256(record["body"])
    path = run / "search" / f"{name}.json"
    path.write_bytes(canonical(record))
    return path


def er(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = body["methods"]["er"]
    return found


def worst(body: dict[str, Any]) -> int:
    rows = er(body)["configurations"]
    return min(rows, key=lambda row: row["orders"][0]["avg_acc"])["id"]  # type: ignore[no-any-return]


def swap_scores(body: dict[str, Any]) -> None:
    """What a forger of everything does: scores and choice, so that they agree."""
    i = worst(body)
    for unit in er(body)["configurations"][i]["orders"]:
        unit.update(avg_acc=0.999, acc=0.999, accuracies=[0.999])
    er(body)["chosen"] = i


def chosen(body: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = er(body)["configurations"][er(body)["chosen"]]
    return found


def unsearched(body: dict[str, Any]) -> None:
    row = {"id": 0, "values": {}, "status": "unsearched", "orders": []}
    er(body).update(space={}, paths=[], chosen=0, configurations=[row])


FORGED: list[tuple[str, Callable[[dict[str, Any]], None], bool, str]] = [
    ("a digit", lambda b: er(b)["configurations"][0]["orders"][0].update(acc=0.123), False, "it was changed since"),
    ("a value", lambda b: er(b)["configurations"][er(b)["chosen"]]["values"].update({"optimizer.lr": 0.3}), True,
     "be those that its seed draws from its space"),
    ("a value of a list that was widened",
     lambda b: (er(b)["space"]["optimizer.lr"].append(0.3),
                er(b)["configurations"][er(b)["chosen"]]["values"].update({"optimizer.lr": 0.3})), True,
     "be those that its seed draws from its space"),
    ("another choice", lambda b: er(b).update(chosen=worst(b)), True, "which its scores select"),
    ("a configuration left out", lambda b: er(b)["configurations"].pop(er(b)["chosen"]), True, "record: "),
    ("an order left out", lambda b: [row["orders"].pop() for row in er(b)["configurations"]], True, "which its scores select"),
    ("another capacity", lambda b: b["scenario"].update({"replay.capacity": 200}), True,
     "replay.capacity=200 in the tuning scenario, must be 8, as in the evaluation"),
    ("another commitment", lambda b: b.update(commitment="0" * 64), True, "committed to other evaluation data"),
    ("other orders", lambda b: b.update(evaluation_orders=[7]), True, "as prepared"),
    ("another kind", lambda b: b.update(kind="conventional"), True, "be a two-phase record"),
    ("values of a bound", lambda b: b["methods"]["finetune"]["configurations"][0]["values"].update({"optimizer.lr": 1.0}), True,
     "must have none"),
    ("a digit and its checksum", lambda b: er(b)["configurations"][worst(b)]["orders"][0].update(avg_acc=0.5401), True,
     "be the mean of its accuracies"),
    ("the last digit of all",
     lambda b: chosen(b)["orders"][0].update(avg_acc=math.nextafter(chosen(b)["orders"][0]["avg_acc"], 1)), True,
     "be the mean of its accuracies"),
    ("a final accuracy", lambda b: chosen(b)["orders"][1].update(acc=0.95), True, "be the last of its accuracies"),
    ("a score of 500 %", lambda b: [unit.update(avg_acc=5.0, acc=5.0, accuracies=[5.0]) for unit in chosen(b)["orders"]], True,
     "be numbers from 0 to 1"),
    ("a score below 0",
     lambda b: er(b)["configurations"][worst(b)]["orders"][0].update(avg_acc=-1, acc=-1, accuracies=[-1]), True,
     "be numbers from 0 to 1"),
    ("no accuracies", lambda b: chosen(b)["orders"][0].pop("accuracies"), True, "be numbers from 0 to 1"),
    ("an order twice", lambda b: chosen(b)["orders"].append(dict(chosen(b)["orders"][0])), True, "be those of the search"),
    ("an unfinished configuration", lambda b: er(b)["configurations"][worst(b)].update(status="raced_out"), True,
     "be 'complete', as its orders and failures say"),
    ("options of a bound", lambda b: b["methods"]["finetune"].update(options={"replay": None, "optimizer.lr": 0.77}), True,
     "options {'optimizer.lr': 0.77, 'replay': None} of finetune, must be {'replay': None}"),
    ("the name of a bound", lambda b: b["methods"].update(ewc=b["methods"].pop("finetune")), True,
     "methods er, ewc, must be er, finetune"),
    ("a method left out", lambda b: b["methods"].pop("finetune"), True, "methods er, must be er, finetune"),
    ("a search left out", unsearched, True, "er without a space, must be searched"),
    ("a bound with a space",
     lambda b: b["methods"]["finetune"].update(space={"optimizer.lr": [0.1]}, paths=["optimizer.lr"]), True,
     "finetune with a space, must be a bound"),
]


@pytest.mark.parametrize(("name", "change", "checksum", "said"), FORGED, ids=[case[0] for case in FORGED])
def test_a_changed_record_is_refused_and_nothing_is_opened(
    name: str, change: Callable[[dict[str, Any]], Any], checksum: bool, said: str, run: Path, without_ray: list[Any],
) -> None:
    with pytest.raises(ValueError) as caught:
        judged(run, forged(run, change, "forged", checksum=checksum))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (run / "evaluation" / "opened.json").exists() and not (run / "evaluation" / "open").exists() and not without_ray


def test_a_forger_of_everything_is_caught_by_the_published_checksum_alone(run: Path) -> None:
    published = read(run / "search" / "record.json")["sha256"]
    path = forged(run, swap_scores, "all", checksum=True)
    verify(read(path))  # passes: nothing in it contradicts itself
    assert read(path)["sha256"] != published


def test_what_was_proposed_lies_in_its_space_and_what_is_no_body_is_refused_in_one_line(run: Path) -> None:
    record = reload(run / "search" / "record.json")
    record["body"]["search"]["searcher"] = "optuna"  # of which only the space is known
    verify(record)
    chosen(record["body"])["values"]["optimizer.lr"] = 0.3
    with pytest.raises(ValueError, match="^record: configurations .* of er, must lie in its space$"):
        verify(record)
    del record["body"]["search"]
    with pytest.raises(ValueError, match="^record: a body that lacks 'search' .*, must be what `search` froze$"):
        verify(record)


def test_a_number_that_is_not_finite_is_no_record(run: Path) -> None:
    path = run / "search" / "nan.json"
    text = (run / "search" / "record.json").read_text()
    path.write_text(text.replace('"avg_acc":0.', '"avg_acc":NaN,"was":0.', 1))
    with pytest.raises(ValueError, match="cannot be read"):
        read(path)
    with pytest.raises(ValueError, match="no file"):
        read(run / "search" / "none.json")


def test_other_evaluation_data_is_refused(run: Path, tmp_path: Path) -> None:
    other = prepared(tmp_path, orders=2)  # the same files, another nonce
    with pytest.raises(ValueError, match="committed to other evaluation data"):
        judged(other, run / "search" / "record.json")


# ------------------------------------------------------------------------------------------------------------- evaluation
def test_the_choice_is_judged_once_on_exactly_the_declared_orders(
    fresh: Path, without_ray: list[Any], capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ValueError, match=r"order 1, must be one of those declared, \[2, 3, 4\]"):
        judged(fresh, orders=(1,))
    part = judged(fresh, orders=(3,))
    assert part["complete"] is False and "incomplete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="an evaluation without orders"):
        conventional(Conventional(data=str(fresh / "evaluation")))
    whole = judged(fresh)
    assert whole["complete"] and sorted(without_ray) == sorted((m, o) for m in ("er", "finetune") for o in (2, 3, 4))
    lines = (fresh / "evaluation" / "results.jsonl").read_bytes()
    assert judged(fresh)["rows"] == whole["rows"] and len(without_ray) == 6  # nothing is run twice, nothing is written twice
    assert (fresh / "evaluation" / "results.jsonl").read_bytes() == lines
    assert all(row["amended"] is False for row in whole["rows"])
    assert reload(fresh / "tuning" / "opened.json") and not whole["flags"]


def test_a_second_record_needs_amend_and_marks_everything(fresh: Path) -> None:
    judged(fresh)
    (fresh / "search").rename(fresh / "first")
    second = recorded(fresh, seed=5, **METHODS)
    with pytest.raises(ValueError, match="a second record .* for er, finetune on this pair.*amend=true"):
        judged(fresh, second)
    done = judged(fresh, second, amend=True)
    mine = read(second)["sha256"]
    assert {row["amended"] for row in done["rows"] if row["record"] == mine} == {True}
    assert any("amended: evaluated again for er, finetune" in flag for flag in done["flags"])
    again = judged(fresh, fresh / "first" / "record.json")  # the first one too, from now on
    assert any("amended" in flag for flag in again["flags"])


def test_a_search_after_the_data_was_opened_is_flagged(fresh: Path) -> None:
    judged(fresh)
    (fresh / "search").rename(fresh / "first")
    path = recorded(fresh, trials=4, seed=6, **METHODS)
    record = reload(path)
    record["body"]["frozen"] = 2.0e10  # later than now
    path.write_bytes(canonical({"body": record["body"], "sha256": sha256(record["body"])}))
    done = judged(fresh, path, amend=True)
    assert any("tuned again: the record was frozen after" in flag for flag in done["flags"])


def test_the_conventional_search_comes_last_and_its_record_may_not_be_judged(fresh: Path, without_ray: list[Any]) -> None:
    with pytest.raises(ValueError, match="no evaluation, must come after `evaluate`"):
        conventional(Conventional(data=str(fresh / "evaluation")))
    judged(fresh)
    before = len(without_ray)
    done = conventional(Conventional(data=str(fresh / "evaluation")))
    chosen, theirs = (er(record["body"]) for record in (done["two_phase"], done["record"]))
    assert chosen["configurations"][chosen["chosen"]]["values"] == theirs["configurations"][theirs["chosen"]]["values"]
    assert len(without_ray) == before + 2 * 5  # the search; its choice has been run on the new orders
    rows = {(row["protocol"], row["order"]): row["avg_acc"] for row in done["rows"] if row["method"] == "er"}
    assert all(rows["two-phase", order] == rows["conventional", order] for order in (2, 3, 4))  # the gap is exactly 0
    with pytest.raises(ValueError, match="be a two-phase record; a search on the evaluation data chooses nothing"):
        judged(fresh, fresh / "evaluation" / "conventional.json")


def test_a_line_that_a_kill_cut_off_is_written_again(fresh: Path) -> None:
    judged(fresh)
    path = fresh / "evaluation" / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-25])
    assert len(results(fresh / "evaluation")) == 5
    assert len(judged(fresh)["rows"]) == 6


# --------------------------------------------------------------------------------------------------------------- selection
def row(i: int, *scores: float, acc: float = 0.5, seconds: float = 1.0, status: str = "complete") -> dict[str, Any]:
    orders = [{"order": n, "avg_acc": score, "acc": acc, "seconds": seconds} for n, score in enumerate(scores)]
    return {"id": i, "status": status, "orders": orders}


def test_selection_by_average_then_final_accuracy_then_time_then_id() -> None:
    assert select([row(0, 0.5, 0.6), row(1, 0.6, 0.6)], [0, 1]) == 1
    assert select([row(0, 0.6, 0.6), row(1, 0.6, 0.6, acc=0.7)], [0, 1]) == 1
    assert select([row(0, 0.6, 0.6, seconds=2.0), row(1, 0.6, 0.6)], [0, 1]) == 1
    assert select([row(1, 0.6, 0.6), row(0, 0.6, 0.6)], [0, 1]) == 0
    assert select([row(0, 0.2, 0.2), row(1, 0.9), row(2, 0.9, 0.9, status="failed")], [0, 1]) == 0
    assert select([row(1, 0.9)], [0, 1]) is None


def test_no_success_is_an_error_and_no_record(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    with pytest.raises(ValueError, match="none of 5 configurations of er finished its orders: nan .*again=true"):
        recorded(run, lambda method, values, order: None)
    assert not (run / "search" / "record.json").exists()


def test_a_record_is_frozen_once(run: Path) -> None:
    body = copy.deepcopy(reload(run / "search" / "record.json")["body"])
    assert freeze(body, run / "search" / "record.json") == sha256(body)
    body["frozen"] += 1
    with pytest.raises(ValueError, match="another record .*, must be frozen once"):
        freeze(body, run / "search" / "record.json")


def test_the_record_holds_no_path_of_the_evaluation_data(run: Path) -> None:
    text = (run / "search" / "record.json").read_text()
    assert str(run) not in text
    assert json.loads(text)["body"]["commitment"] == reload(run / "evaluation" / "plan.json")["commitment"]
    assert pair(run).new_orders == [2, 3, 4]
