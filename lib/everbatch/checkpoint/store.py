"""The folder of checkpoints: saving as a whole or not at all, finding the newest good one, keeping the last few.

Entries of a root, N being the step. Wherever a kill strikes, what is left is among these:

    step-N          a checkpoint; it got this name after all of it, manifest last, was on the disk
    .tmp-step-N     being written; worthless after a kill, removed by the next save
    .old-step-N     the earlier step-N while its successor takes the name. If there is no step-N, the kill came between
                    the two renames and this one counts: `latest` reads it here, the next save renames it back
    .del-step-N     being deleted
    failed-step-N   a checkpoint of steps that were all skipped, of a run that ended so; see `withdraw`
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from everbatch.checkpoint.files import Piece, fsync_folder, write_bytes, write_pieces
from everbatch.checkpoint.manifest import MANIFEST, Report, build, dump, json_problem, load, rank_file, report
from everbatch.checkpoint.reader import Checkpoint, verify
from everbatch.distributed import World
from everbatch.errors import CheckpointMismatch, check

__all__ = ["failed", "latest", "save", "try_writing", "withdraw"]

_ENTRY = re.compile(r"(\.tmp-|\.old-|\.del-|failed-|)step-([0-9]{8,15})")
T = TypeVar("T")


def save(
    root: str | Path, step: int, pieces: Sequence[Piece], meta: Mapping[str, Any], *, world: World, keep_last: int = 2,
    healthy: bool = True,
) -> Path:
    """Write the checkpoint of `step`; when it returns, it is on the disk and `latest` finds it. A collective.

    Args:
        root: folder of all checkpoints of one run, on a file system that all ranks share; created if missing. One job
            at a time may save to it. Entries not named like checkpoints are left alone.
        step: >= 0, the same on every rank. If it exists, it is replaced: the old one stands until the new is complete.
        pieces: what this rank contributes. Over all ranks, every element of every tensor is given exactly once.
        meta: JSON values with string keys (NaN and infinities allowed); rank 0's is kept.
        keep_last: >= 1; afterwards the oldest complete checkpoints beyond this many are deleted, but never this one.
            Damaged ones neither count nor are deleted, and the newest healthy one stays beside them. To go on from an
            older step use another root: the highest step is what `latest` returns.
        healthy: False while steps are being skipped: what is saved then does not push out the last one before.

    Returns:
        The folder, root/step-00000012.

    Raises:
        ValueError: `step` or `keep_last` out of range.
        RuntimeError: on every rank, naming the ranks, files and causes, if any rank failed (disk full, read-only, a
            piece that does not fit). Earlier checkpoints are as they were, the temporary folder is removed.

    Warns:
        UserWarning: on rank 0, when this checkpoint stands but an old one could not be deleted.

    Cost: every rank writes and hashes its pieces' bytes once, all in parallel; 1 fsync per rank and 3 on rank 0;
    3 gathers of metadata (about 100 bytes per piece, no tensor data); the manifests under `root` are read again.
    """
    root = Path(root)
    whole = isinstance(step, int) and not isinstance(step, bool)
    check(whole and 0 <= step < 10**15, "checkpoint.save", f"step={step!r}", "be an integer >= 0 and below 10**15")
    check(isinstance(keep_last, int) and keep_last >= 1, "checkpoint.save", f"keep_last={keep_last!r}",
          "be an integer >= 1", "the only good checkpoint is never deleted")
    final, partial, old = (root / f"{prefix}step-{step:08d}" for prefix in ("", ".tmp-", ".old-"))
    failure = f"{root}: step {step} was not saved, earlier checkpoints are untouched"
    first = world.rank == 0

    def begin() -> int:
        if first:
            problem = json_problem(dict(meta), "meta")
            if problem is not None:
                raise ValueError(problem)
            if not root.exists():
                root.mkdir(parents=True)
                fsync_folder(root.parent)
            _recover(root)  # what cannot be deleted now is said by `_retire`
            partial.mkdir()
        return step

    def write() -> Report:
        return report(write_pieces(partial / rank_file(world.rank), pieces), pieces)

    def commit() -> None:
        if first:
            text = dump(build(step, reports, meta, healthy))
            write_bytes(partial / MANIFEST, lambda append: append(memoryview(text)))
            fsync_folder(partial)
            if os.path.lexists(final):
                os.rename(final, old)
            os.rename(partial, final)
            fsync_folder(root)

    try:
        steps = _together(world, failure, begin)
        if len(set(steps)) > 1:
            raise RuntimeError(f"checkpoint {root}: ranks save different steps {steps}, must be the same")
        reports = _together(world, failure, write)
        _together(world, failure, commit)
    except RuntimeError:
        if first:
            with contextlib.suppress(OSError):  # the error on its way is the one to tell; the next save tidies up again
                _recover(root)
        raise
    if first:
        _retire(root, step, keep_last)
    return final


def latest(root: str | Path, *, world: World) -> Checkpoint | None:
    """The newest checkpoint under `root` that is complete and undamaged; None if there is none at all. A collective.

    Every rank gets the same. Nothing under `root` is changed, so that others may look while a job saves.

    Raises:
        CheckpointMismatch: on every rank, if there are checkpoints and all are damaged: to start afresh in silence
            would end in overwriting them.
        RuntimeError: on every rank, if the folder cannot be listed.

    Warns:
        UserWarning: on rank 0, for each damaged checkpoint newer than the one returned: the file, what is wrong with
            it, and which one is used.

    Cost: every file of a candidate is read and hashed once, divided by the ranks; 1 gather for the list and 1 for each
    candidate (there is one, unless some are damaged).
    """
    root = Path(root)

    def candidates() -> list[tuple[int, str]]:
        entries = _entries(root) if world.rank == 0 and root.exists() else []
        # downwards, and "step-" before ".old-step-" of the same step, as "s" sorts after "."
        return sorted(((step, path.name) for prefix, step, path in entries if prefix in ("", ".old-")), reverse=True)

    problems: list[str] = []
    for step, name in _together(world, f"{root}: cannot be listed", candidates)[0]:
        outcome = verify(root / name, world)
        if not isinstance(outcome, str) and outcome.step != step:
            outcome = f"{root / name}: its manifest is of step {outcome.step}"
        gap = None if isinstance(outcome, str) else outcome.gap()
        outcome = outcome if gap is None else f"{root / name}: {gap}"
        if not isinstance(outcome, str):
            for problem in problems if world.rank == 0 else []:
                warnings.warn(f"damaged checkpoint skipped: {problem}; {root / name} is used", stacklevel=2)
            return Checkpoint(root / name, outcome)
        problems.append(outcome)
    if problems:
        raise CheckpointMismatch(f"checkpoint {root}: none is good: {'; '.join(problems)}; to start afresh move them "
                                 "away")
    return None


def try_writing(root: str | Path, *, world: World) -> None:
    """Write and delete a small file in `root`, which is created, from every rank: before a run, not after it. A collective.

    Raises:
        RuntimeError: on every rank, naming the ranks that could not.
    """
    root = Path(root)

    def attempt() -> None:
        probe = root / f".probe-{world.rank:05d}"
        root.mkdir(parents=True, exist_ok=True)
        probe.unlink(missing_ok=True)  # of a process that was killed in between
        write_bytes(probe, lambda append: append(memoryview(b"everbatch")))
        probe.unlink()

    _together(world, f"{root}: cannot be written to", attempt)


def withdraw(root: str | Path) -> None:
    """Rename checkpoints that are not healthy and newer than the last healthy one, so that `latest` does not find them: call it
    on one rank, when a run has ended because step after step was skipped. The next `save` deletes them.

    Warns:
        UserWarning: one could not be renamed; the next run then goes on from it.
    """
    for step, path, healthy in reversed(_found(Path(root))):
        if healthy:
            break
        try:
            doomed = path.with_name(f"failed-{path.name}")
            _remove(doomed)
            os.rename(path, doomed)
        except OSError as error:
            warnings.warn(f"checkpoint {root}: step {step}, of skipped steps, could not be set aside: {error}", stacklevel=2)


def failed(root: str | Path) -> list[int]:
    """Steps of the checkpoints under `root` that `withdraw` renamed, ascending."""
    root = Path(root)
    return [step for prefix, step, _ in _entries(root) if prefix == "failed-"] if root.exists() else []


def _together(world: World, failure: str, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and gather the results; if it failed anywhere, raise the same error on all of them."""
    result: T | None = None
    cause: Exception | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the other ranks wait in the gather below
        cause = error
    outcomes: list[Any] = world.gather((result, None if cause is None else f"{type(cause).__name__}: {cause}"))
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]
    if failed:
        more = f"; and {len(failed) - 3} more ranks" if len(failed) > 3 else ""
        raise RuntimeError(f"checkpoint {failure}: {'; '.join(failed[:3])}{more}") from cause
    return [outcome[0] for outcome in outcomes]


def _entries(root: Path) -> list[tuple[str, int, Path]]:
    """(prefix, step, path) of everything under `root` that is named like ours, by step."""
    named = [(match, path) for path in root.iterdir() if (match := _ENTRY.fullmatch(path.name))]
    return sorted(((match[1], int(match[2]), path) for match, path in named), key=lambda entry: entry[1])


def _recover(root: Path) -> list[str]:
    """Bring `root` into a state without a trace of an interrupted save; see the table at the top. Returns what would not go."""
    problems = []
    for prefix, _, path in _entries(root):
        final = path.with_name(path.name.removeprefix(prefix))
        if prefix == ".old-" and not os.path.lexists(final):
            os.rename(path, final)
            continue
        try:
            if prefix == ".old-":
                _delete(path, final.name)
            elif prefix:
                _remove(path)
        except OSError as error:
            problems.append(str(error))
    return problems


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _delete(path: Path, name: str) -> None:
    """Delete a checkpoint; renamed first, so that a kill halfway leaves no part of one under a name that counts."""
    doomed = path.with_name(f".del-{name}")
    _remove(doomed)
    os.rename(path, doomed)
    _remove(doomed)


def _found(root: Path) -> list[tuple[int, Path, bool]]:
    """(step, path, healthy) of the checkpoints that are complete, by step: their manifest is good and all files have their
    size, which shows without reading everything again."""
    result = []
    for prefix, step, path in _entries(root):
        try:
            manifest = None if prefix else load(path)
            if manifest and all((path / file).lstat().st_size == size for file, (size, _) in manifest.files.items()):
                result.append((step, path, manifest.healthy))
        except (CheckpointMismatch, OSError):
            continue
    return result


def _retire(root: Path, saved: int, keep_last: int) -> None:
    """Delete what the save replaced and the oldest complete checkpoints; a failure only costs space, so it warns."""
    problems = []
    try:
        problems = _recover(root)
        complete = _found(root)
        last_healthy = max((step for step, _, healthy in complete if healthy), default=None)
        for step, path, _ in complete[:-keep_last]:
            if step not in (saved, last_healthy):
                _delete(path, path.name)
    except OSError as error:
        problems.append(str(error))
    if problems:
        what = f"checkpoint {root}: step {saved} is saved, but an old one could not be deleted: {'; '.join(problems[:3])}"
        warnings.warn(what, stacklevel=3)
