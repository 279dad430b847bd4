"""A pair of scenarios: one to tune on, one to be judged on, with no class and no sample in common."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from everbatch.data import Source, load
from everbatch.data.memory import check_memory
from everbatch.data.notes import tell
from everbatch.errors import check, check_whole, nearest
from everbatch.rows import one_tensor
from everbatch.tune.hashes import Known, row_hashes
from everbatch.tune.ledger import canonical, sha256, write_atomically
from everbatch.tune.seal import Seal, ciphered
from everbatch.tune.spaces import check_scenario
from everbatch.tune.stream import SCENARIO, check_options, plain_options

__all__ = ["EvaluationData", "ScenarioPair", "prepare"]

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
SEALED, NONCE, PLAN, OPENED = "data.sealed", "nonce", "plan.json", "opened.json"


@dataclass(frozen=True, kw_only=True)
class ScenarioPair:
    """What is tuned on and what is judged on: two data sets, two folders, or disjoint classes of one."""

    tuning: str = "digits"
    """Data to tune on: digits, a folder of images, an .npz file, torchvision:NAME:ROOT, huggingface:PATH; see
    `everbatch.data.load`. Tuning validates on its test part."""
    evaluation: str = "digits"
    """Data to be judged on; the same text divides the classes of one data set."""
    tuning_classes: tuple[str | int, ...] = ()
    """Names of the classes to tune on; by default all, or the first half, in order, where both are one data set. Whole numbers
    stand for their digits, [0,1] for ["0","1"]."""
    evaluation_classes: tuple[str | int, ...] = ()
    """Names of the classes to be judged on; by default all, or the second half."""
    image_size: int | None = None
    """Side of the images in pixels; by default the size the data has."""
    increments: tuple[int, ...] = (2, 1, 1, 1)
    """Classes of each task; they sum to the number of classes on either side."""
    orders: int = 2
    """Class orders that tuning uses, seeds 0, 1, ... of numpy's legacy generator; the seed is that of the initialisation too."""
    evaluation_orders: int = 12
    """New class orders of the evaluation, the seeds after those; declared before tuning begins."""
    scenario: dict[str, Any] = field(default_factory=dict)
    """What is the same in both phases, for all methods: options of a class-incremental run by path ("replay.capacity": 20);
    none that a method is made of, and none that the search overrides."""

    def __post_init__(self) -> None:
        check_whole("tune", "orders", self.orders, 1)
        check_whole("tune", "evaluation_orders", self.evaluation_orders, 1)
        check(bool(self.increments), "tune", "increments=[]", "name the classes of each task")
        for count in self.increments:
            check_whole("tune", "increments", count, 1)
        for name in ("tuning_classes", "evaluation_classes"):
            given = getattr(self, name)
            good = all(isinstance(one, str | int) and not isinstance(one, bool) for one in given)
            check(good, "tune", f"{name}={list(given)}", "be a list, each text or a whole number")
            texts = tuple(str(one) for one in given)
            check(len(set(texts)) == len(texts), "tune", f"{name}={list(given)}", "name every class once")
            object.__setattr__(self, name, texts)
        shared = sorted({str(one) for one in self.tuning_classes} & {str(one) for one in self.evaluation_classes})
        check(not shared or self.tuning != self.evaluation, "tune", f"classes {shared[:5]} on both sides", "be on one side")
        check_scenario(plain_options(self.scenario, "scenario"))
        check_options([self.whole_scenario], self.increments)

    @property
    def whole_scenario(self) -> dict[str, Any]:
        """With what is left out as by default."""
        return {**SCENARIO, **plain_options(self.scenario, "scenario")}

    @property
    def tuning_orders(self) -> list[int]:
        """Seeds of the orders to tune on."""
        return list(range(self.orders))

    @property
    def new_orders(self) -> list[int]:
        """Seeds of the orders to be judged on."""
        return list(range(self.orders, self.orders + self.evaluation_orders))


class EvaluationData:
    """The sealed side, for `evaluate` and `conventional` alone. It refuses to be pickled: no trial can be handed it."""

    def __init__(self, folder: str | os.PathLike[str], nonce: str | None = None) -> None:
        self.folder = Path(folder)
        self._nonce = Path(nonce) if nonce else self.folder / NONCE
        check((self.folder / PLAN).is_file(), "tune", f"no {PLAN} in {str(folder)!r}",
              "be the folder that `prepare` wrote for the evaluation")
        self.plan: dict[str, Any] = json.loads((self.folder / PLAN).read_text())

    def __reduce__(self) -> NoReturn:
        from everbatch.tune.seal import LeakageError

        raise LeakageError("tune: a handle of evaluation data was pickled, must stay in the process of `evaluate`")

    def nonce(self) -> bytes:
        """What opens it."""
        check(self._nonce.is_file(), "tune", f"no nonce at {str(self._nonce)!r}", "be the file that `prepare` wrote",
              "say nonce=PATH")
        return bytes.fromhex(self._nonce.read_text().strip())

    def open(self) -> Path:
        """The data as a file that trials can read; unsealed the first time.

        Raises:
            ValueError: it is not what the plan says: another nonce, or sealed content that was changed.
        """
        path, want = self.folder / "open" / "data.npz", self.plan["data_sha256"]
        if not path.is_file() or sha256(path.read_bytes()) != want:
            content = ciphered(self.nonce(), (self.folder / SEALED).read_bytes())
            check(sha256(content) == want, "tune", f"{str(self.folder / SEALED)!r} opens to something else",
                  "be what `prepare` sealed, under its nonce")
            write_atomically(path, content)
        return path


def commitment(nonce: bytes, data_sha256: str, plan: Mapping[str, Any]) -> str:
    """SHA-256 that binds to the evaluation data and its plan before tuning, and tells nothing of them without the nonce."""
    return sha256([nonce.hex(), data_sha256, plan["scenario"], plan["increments"], plan["evaluation_orders"]])


def prepare(pair: ScenarioPair, output: str, nonce: str | None = None) -> dict[str, Any]:
    """Write OUTPUT/tuning, all that `search` sees, and OUTPUT/evaluation, sealed. Every sample of both sides is hashed.

    Args:
        pair: of scenarios.
        output: folder of the whole protocol.
        nonce: where the nonce is written; by default in OUTPUT/evaluation. Elsewhere (another disk, another machine), whoever
            reads the evaluation folder gets nothing but sealed bytes.

    Returns:
        What was written; `"written": False` where the same pair was prepared before.

    Raises:
        ValueError: a class or a sample on both sides; increments that do not cover the classes; another pair in the folder.
    """
    folder, asked = Path(output), json.loads(canonical(asdict(pair)))
    tuning, evaluation = folder / "tuning", folder / "evaluation"
    if (tuning / "seal.json").is_file():
        known = json.loads((evaluation / PLAN).read_text())["pair"]
        differ = [name for name in asked if known.get(name) != asked[name]]
        check(not differ, "tune", f"{', '.join(f'{n}={asked[n]!r}' for n in differ)} in {output!r}, prepared with "
              f"{', '.join(repr(known.get(n)) for n in differ)}", "be the same", "name another output")
        return {"written": False, **Seal.read(tuning / "seal.json").body}
    sides = _sides(pair)
    key = Path(nonce) if nonce else evaluation / NONCE
    places = [*_places(pair.evaluation), *_places(pair.tuning), evaluation, key]
    for place in (os.path.realpath(p) for p in places):
        inside = os.path.realpath(tuning) + "/"
        check(not inside.startswith(f"{place.rstrip('/')}/"), "tune", f"output={output!r} inside {str(place)!r}",
              "lie outside of all data", "the search may open its own folder, and nothing else of these")
    salt, samples = _check_disjoint(*sides)
    contents = [_npz(*side) for side in sides]
    secret = secrets.token_bytes(32)
    plan = {"scenario": pair.whole_scenario, "increments": [*pair.increments], "orders": pair.tuning_orders,
            "evaluation_orders": pair.new_orders, "data_sha256": sha256(contents[1]), "pair": asked,
            "tuning_folder": os.path.abspath(tuning)}
    body = {"scenario": plan["scenario"], "increments": plan["increments"], "orders": plan["orders"],
            "evaluation_orders": plan["evaluation_orders"], "data_sha256": sha256(contents[0]),
            "samples": [len(sides[0][0]["x_train"]), len(sides[0][0]["x_test"])], "classes": sides[0][1],
            "commitment": commitment(secret, plan["data_sha256"], plan)}
    write_atomically(evaluation / SEALED, ciphered(secret, contents[1]))
    write_atomically(key, secret.hex().encode())
    key.chmod(0o600)
    write_atomically(evaluation / PLAN, canonical({**plan, "commitment": body["commitment"]}))
    write_atomically(tuning / "data.npz", contents[0])
    Seal.made(places, salt, samples, body).write(tuning / "seal.json")  # last: with it, the folder is prepared
    return {"written": True, **body}


Side = tuple[dict[str, NDArray[Any]], list[str]]


def _sides(pair: ScenarioPair) -> tuple[Side, Side]:
    one = pair.tuning == pair.evaluation
    parts = {text: [load(text, train=train, image_size=pair.image_size) for train in (True, False)]
             for text in {pair.tuning, pair.evaluation}}
    names: dict[str, list[str]] = {}
    for side, half in (("tuning", 0), ("evaluation", 1)):
        known = list(parts[getattr(pair, side)][0].classes)
        chosen = list(getattr(pair, f"{side}_classes"))
        for name in chosen:
            check(name in known, "tune", f"class {name!r} in {side}_classes", "be a class of the data", nearest(name, known))
        middle = (len(known) + 1) // 2
        names[side] = chosen or (known if not one else known[:middle] if half == 0 else known[middle:])
        what = f"{len(names[side])} classes to {'tune on' if half == 0 else 'be judged on'}"
        check(len(names[side]) == sum(pair.increments), "tune", f"increments={list(pair.increments)} for {what}",
              "sum to the number of classes")
    shared = sorted({*names["tuning"]} & {*names["evaluation"]})
    numbered = all(name.isdigit() for name in shared)
    check(not shared or (numbered and not one), "tune", f"classes {shared[:5]} on both sides", "be on one side",
          "what is known of a class there is known here")
    return (_arrays(parts[pair.tuning], names["tuning"], pair.tuning),
            _arrays(parts[pair.evaluation], names["evaluation"], pair.evaluation))


def _arrays(parts: list[Source], names: list[str], text: str) -> Side:
    """The samples of some classes, labelled in the order of their names; digits as bytes from 0 to 255."""
    found: dict[str, NDArray[Any]] = {}
    for part, which in zip(parts, ("train", "test"), strict=True):
        wanted = {part.classes.index(name): label for label, name in enumerate(names)}
        ids = [i for i, target in enumerate(part.targets.tolist()) if target in wanted]
        first = one_tensor("tune", part.fetch(torch.tensor(ids[:1], dtype=torch.long))) if ids else None
        size = 0 if first is None else first.nbytes
        check_memory("tune", f"{len(ids)} samples of {part.name}", 2 * len(ids) * size, "lower image_size, or name fewer classes")
        rows = one_tensor("tune", part.fetch(torch.tensor(ids, dtype=torch.long))).numpy()
        if text == "digits":
            rows = np.round(rows.astype(np.float32) * (255 / 16)).astype(np.uint8)
        found[f"x_{which}"] = rows
        found[f"y_{which}"] = np.array([wanted[int(part.targets[i])] for i in ids], dtype=np.int64)
    return found, names


def _npz(arrays: dict[str, NDArray[Any]], names: list[str]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, classes=np.array(names), **{name: arrays[name] for name in ARRAYS})
    return file.getvalue()


def _check_disjoint(tuning: Side, evaluation: Side) -> tuple[bytes, frozenset[str]]:
    """Refuse a sample that is on both sides, by its content: one is found among any number, in another encoding too.

    Returns:
        A salt, and the hashes that the evaluation's samples are known by.
    """
    salt, names = secrets.token_bytes(16), ("x_train", "x_test")
    known = Known.of(salt, [evaluation[0][name] for name in names], [tuning[0][name] for name in names])
    for name in names:
        rows = row_hashes(salt, tuning[0][name], asking=True)
        found = [(i, row) for i, row in enumerate(rows) if not known.hashes.isdisjoint(row)]
        other = sum(row[0] not in known.numbers for _, row in found)
        how = f" ({other} of them in another encoding: other types, ranges or channels)" if other else ""
        first = [i for i, _ in found[:1]]
        what = f"{len(found)} of {len(tuning[0][name])} samples in {name} to tune on, the first is sample {first}"
        check(not found, "tune", f"{what}, in the evaluation data too{how}", "be on one side", "take them out of one")
    if known.recurring:
        tell(f"tune: {known.recurring} images are on one side in several ranges of values, so samples were compared by their "
             "numbers alone: an image in another encoding is not found")
    return salt, known.hashes


def _places(text: str) -> list[Path]:
    """Where the data of a text lies."""
    kind, _, rest = text.partition(":")
    if text == "digits":
        import sklearn.datasets

        return [Path(sklearn.datasets.__file__).parent / "data" / "digits.csv.gz"]
    if kind == "torchvision":
        return [Path(rest.partition(":")[2]).expanduser()]
    return [Path(rest if kind in ("npz", "imagefolder", "huggingface") else text).expanduser()]
