"""What a run leaves behind: scalars (JSONL always, TensorBoard by default), figures, a progress bar and result.json.

Only rank 0 writes; on other ranks every call returns at once, so callers need no `if rank == 0`. Scalars may be 0-dim
tensors on any device: they are copied aside without waiting and read together every few steps, so a step never waits
for its own loss.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from everbatch.errors import check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Recorder", "read_scalars", "versions", "write_json"]

_PACKAGES = (
    "everbatch", "torch", "numpy", "deepspeed", "torchvision", "timm", "scikit-learn", "ray", "tensorboard",
    "safetensors", "jsonargparse",
)


class Recorder:
    """Records one run into a folder.

    The folder gets `scalars.jsonl` (an object per step, "step" and the tags; a second one if scalars of the step
    follow a flush; `read_scalars` joins them), TensorBoard event files under `tensorboard/`, `figures/TAG.png` and
    `result.json`. Use it as a context manager, or call `close`.

    Args:
        folder: of this run; made when missing.
        rank: of this process; every rank but 0 records nothing.
        progress: show a bar on stderr when that is a terminal and CI is not set.
        tensorboard: write TensorBoard events.
        every_steps: scalars are read from the device and written after this many steps, and in `flush`.
        resume: None begins afresh and drops the scalars and TensorBoard events of an earlier run in the folder; a step number
            continues after that step: later lines are dropped, as are a last line cut off by a kill and later events in
            TensorBoard. Nothing is dropped before the first scalar or figure, so `rewind` may still decide otherwise.
    """

    def __init__(
        self, folder: str | os.PathLike[str], rank: int = 0, *, progress: bool = True, tensorboard: bool = True,
        every_steps: int = 20, resume: int | None = None,
    ) -> None:
        check(every_steps > 0, "Recorder", f"every_steps={every_steps}", "be a whole number >= 1")
        self.folder = Path(folder)
        self.active = rank == 0
        self.every_steps = every_steps
        self._progress = progress and sys.stderr.isatty() and not os.environ.get("CI")
        self._tensorboard = tensorboard
        self._resume = resume
        self._writer: Any = None
        self._bar: Any = None
        self._shown: tuple[str, ...] = ()
        self._pending: list[tuple[int, str, float | Tensor]] = []
        self._file: Any = None
        if self.active:
            self.folder.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Continue after `step`, as with `resume=step`; before the first scalar or figure.

        Raises:
            RuntimeError: something was recorded already.
        """
        if self._file is not None or self._writer is not None or self._pending:
            raise RuntimeError(f"Recorder: rewind({step}) after scalars or figures were recorded, must come before them")
        self._resume = step

    def scalars(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Record named scalars of one step: tags with slashes ("loss/total"), numbers or one-element tensors."""
        if not self.active:
            return
        self._lines()
        if self._pending and step - self._pending[0][0] >= self.every_steps:
            self.flush()  # before the new step's first scalar, so that a step's scalars stay in one line
        for tag, value in values.items():
            # A copy: the caller may go on to change the tensor in place. No host synchronisation.
            kept = value.detach().reshape(()).clone() if isinstance(value, Tensor) else float(value)
            self._pending.append((step, tag, kept))

    def figure(self, tag: str, figure: Figure, step: int) -> Path | None:
        """Save a matplotlib figure as figures/TAG.png (the newest replaces older ones) and add it to TensorBoard.

        Returns the PNG's path; None on other ranks.
        """
        if not self.active:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        path = self.folder / "figures" / (tag.replace("/", "-") + ".png")
        path.parent.mkdir(exist_ok=True)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.print_png(path)
        if self._tensorboard:
            canvas.draw()
            pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
            width, height = canvas.get_width_height(physical=True)
            # Not SummaryWriter.add_figure, which imports pyplot and with it a window toolkit.
            self._events().add_image(tag, pixels.view(height, width, 4)[..., :3], step, dataformats="HWC")
        return path

    def bar(self, total: int, title: str, *, done: int = 0, show: tuple[str, ...] = ()) -> None:
        """Begin a progress bar of `total` steps, `done` of them behind us; `show`: tags whose last values follow it."""
        self.end_bar()
        if self.active and self._progress:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=title, unit="step", dynamic_ncols=True, file=sys.stderr)
            self._shown = show

    def advance(self, steps: int = 1) -> None:
        """Move the bar on."""
        if self._bar is not None:
            self._bar.update(steps)

    def end_bar(self) -> None:
        """Finish the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, text: str) -> None:
        """Print lines to stdout from rank 0, above the bar."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def result(self, values: Mapping[str, Any]) -> Path | None:
        """Write result.json atomically: the values (tensors become lists, NaN null). Returns its path on rank 0."""
        if not self.active:
            return None
        self.flush()
        path = self.folder / "result.json"
        write_json(path, values)
        return path

    def flush(self) -> None:
        """Read waiting scalars from the device (one transfer) and put them on disk. Call it before a checkpoint. Before the first
        scalar it leaves the file of an earlier run as it is."""
        if not self.active:
            return
        tensors = [value for *_, value in self._pending if isinstance(value, Tensor)]
        devices = {value.device for value in tensors}
        read: dict[int, float] = {}
        for device in devices:
            group = [value for value in tensors if value.device == device]
            numbers = torch.stack([value.to(torch.float64) for value in group]).tolist()
            read.update({id(value): number for value, number in zip(group, numbers, strict=True)})
        rows: dict[int, dict[str, float]] = {}
        for step, tag, value in self._pending:
            rows.setdefault(step, {})[tag] = read[id(value)] if isinstance(value, Tensor) else value
        self._pending.clear()
        for step, row in rows.items():
            self._file.write(json.dumps({"step": step, **{tag: _finite(value) for tag, value in row.items()}}) + "\n")
            if self._tensorboard:
                for tag, value in row.items():
                    self._events().add_scalar(tag, value, step)
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()
        if self._bar is not None and rows:
            latest = {tag: value for row in rows.values() for tag, value in row.items() if tag in self._shown}
            self._bar.set_postfix({tag: f"{value:.4g}" for tag, value in latest.items()}, refresh=False)

    def close(self) -> None:
        """Flush and close the files; the recorder is done."""
        if not self.active:
            return
        self.end_bar()
        self.flush()
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.close()
        self.active = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lines(self) -> Any:
        if self._file is None:
            self._file = _reopen(self.folder / "scalars.jsonl", self._resume)
        return self._file

    def _events(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import: only where it is used

            events = self.folder / "tensorboard"
            for old in events.glob("events.out.tfevents.*") if self._resume is None else ():
                old.unlink()
            purge = None if self._resume is None else self._resume + 1
            self._writer = SummaryWriter(str(events), purge_step=purge)
        return self._writer


def read_scalars(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The steps of a scalars.jsonl, "nan" and "inf" as numbers again, without a last line that a kill cut off."""
    rows: list[dict[str, float]] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        numbers = {key: value if key == "step" else float(value) for key, value in row.items()}
        if rows and rows[-1]["step"] == numbers["step"]:
            rows[-1].update(numbers)
        else:
            rows.append(numbers)
    return rows


def versions() -> dict[str, str | None]:
    """Versions of Python, of everbatch and of what it builds on (None: not installed); imports none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if found["everbatch"] is None:  # used from a checkout that is not installed
        from everbatch.version import __version__

        found["everbatch"] = __version__
    found["cuda"] = torch.version.cuda
    return found


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part: draft, fsync, rename, fsync."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(_jsonable(value), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reopen(path: Path, resume: int | None) -> Any:
    """Open the scalars file for appending, after dropping what lies beyond the step that the run continues from."""
    kept = []
    if resume is not None and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line)["step"]
            except json.JSONDecodeError:  # the line that a kill cut off; nothing follows it
                break
            if step <= resume:
                kept.append(line)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(draft, path)
    return open(path, "a", encoding="utf-8")


def _finite(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are written as texts that `float` reads."""
    return value if math.isfinite(value) else str(value)


def _jsonable(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors and numpy arrays and scalars
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
