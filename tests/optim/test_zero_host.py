"""A DeepSpeed engine in one process: what is refused, by name, and what a user may do around the step.

Parity, resume and the other contracts are in tests/contract.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from processes import Zygote

if importlib.util.find_spec("deepspeed") is None:  # looked up, not imported: only the processes started here need it
    pytest.skip("needs deepspeed", allow_module_level=True)
pytestmark = pytest.mark.distributed
CLIPPING = "UnsupportedHost: DeepSpeed: gradient_clipping={} in the engine"

EXPECTED = {
    "stage 0": "ok", "stage 1": "ok", "stage 2": "ok", "stage 3": "ok",
    "default clipping": CLIPPING.format(1.0) + " (set gradient_clipping: 0, add ClipGradNorm)",
    "clipping 0.5": CLIPPING.format(0.5) + " (set gradient_clipping: 0, add ClipGradNorm)",
    "fp16": "UnsupportedHost: DeepSpeed: fp16 (use bf16) is not supported",
    "parameter offload": "UnsupportedHost: DeepSpeed: parameter offload is not supported",
    "NVMe": "UnsupportedHost: DeepSpeed: NVMe offload is not supported",
    "hpZ": "UnsupportedHost: DeepSpeed: hpZ (zero_hpz_partition_size > 1) is not supported",
    "quantized gradients": "UnsupportedHost: DeepSpeed: 1-bit or compressed communication is not supported",
    "MoE": "UnsupportedHost: DeepSpeed: MoE groups is not supported",
    "round robin": "UnsupportedHost: DeepSpeed: round_robin_gradients is not supported",
    "unmanaged": "UnsupportedHost: DeepSpeed: unmanaged gradient accumulation is not supported",
    "torch autocast": "UnsupportedHost: DeepSpeed: torch_autocast is not supported",
    "stage 0 fp32 accumulation": "UnsupportedHost: DeepSpeed: stage 0 in bf16 with fp32 accumulation is not supported",
    "pipeline": "UnsupportedHost: DeepSpeed: pipeline parallelism is not supported",
    "other base": "UnsupportedHost: DeepSpeed: the engine's optimizer is SGD, the class is built on AdamW",
    "passes of its own": "ValueError: SharpLBFGS: base LBFGS, which runs passes of its own, must update once per step",
    "complex weights": "ValueError: DeepSpeed: complex parameters ['weight', 'bias'], must be real",
    "per tensor at stage 1": "UnsupportedHost: DeepSpeed: Lars, with these options, updates an element by what else",
    "per tensor at stage 0": "ok",
    "missing internal": "UnsupportedHost: DeepSpeed: DeepSpeedZeroOptimizer.micro_step_id is missing in this version",
    "option of the base": "TypeError: Sharp.on: lr is an option of SGD; set it on the optimizer that the engine was",
    "unknown option": "TypeError: Sharp: unknown option 'roh'; did you mean 'rho'?",
    "state without weights": "CheckpointMismatch: Sharp: the state holds no weights of ['0.bias', '0.weight', '2.bias', "
                             "'2.weight']: it was saved where they are the model's own, and on ZeRO stage 1 (fp32) they are not",
    "weights from elsewhere": "ok",
    "copy": "TypeError: an optimizer on a DeepSpeed engine cannot be copied or pickled; use state_dict()",
    "added group": "UnsupportedHost: ZeRO stage 1 (fp32): a built engine takes no more parameters; initialise it with",
    "two backwards": "RuntimeError: DeepSpeed: opt.backward was called twice for one forward boundary; sum the losses, or loop",
    "as the engine accumulates": "ok",
    "4 configured, one given": "ValueError: DeepSpeed: gradient_accumulation_steps=4 in the engine and 1 micro-batch in "
                               "this step, must agree; loop over 4 of them with opt.micro_batches(...) inside the closure, or",
    "4 configured, 2 given": "ValueError: DeepSpeed: gradient_accumulation_steps=4 in the engine and 2 micro-batches in",
    "2 configured, 4 given": "ValueError: DeepSpeed: gradient_accumulation_steps=2 in the engine and 4 micro-batches in",
    "the old loop": "ok", "left over by module": "ok", "left over by engine": "ok", "left over by opt.backward": "ok",
    "loss.backward in the closure": "RuntimeError: DeepSpeed: no opt.backward(loss) followed the last forward",
    "no backward at all": "RuntimeError: DeepSpeed: no opt.backward(loss) followed the last forward",
    "torch scheduler": "ok", "engine scheduler": "ok", "hooks": "ok", "micro batches": "ok", "self-check after NaN": "ok",
    "buffers that move": "ok", "a base that ZeRO makes anew": "ok",
    "factory": "ValueError: ShrinkPerturb: the factory's model lacks parameters ['0.weight', '0.bias', '2.weight'], must be",
}


@pytest.fixture(scope="module")
def ended(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("zero") / "modes.json"
    return zygote.found(Path(__file__).parent / "zero_modes.py", out, ranks=1, limit=180)


@pytest.mark.parametrize("name", EXPECTED)
def test_engine(ended: dict[str, str], name: str) -> None:
    assert ended[name].startswith(EXPECTED[name]), ended[name]


def test_nothing_else_was_tried(ended: dict[str, str]) -> None:
    assert ended.keys() == EXPECTED.keys()
