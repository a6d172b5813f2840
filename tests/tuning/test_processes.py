"""Ways to several processes that are refused by name. `test_distributed` has those that are right."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from test_live_cases import PICKS, loss_of, one_process, small  # noqa: F401  # a fixture
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from tuning_support import select

import neftsurgery as ns
from neftsurgery.peft import NeftConfig


@pytest.mark.usefixtures("one_process")
def test_tensor_parallelism() -> None:
    """Neurons would be other ones in each process's part. FSDP 2 puts the whole together, and is right."""
    plan = {"0": ColwiseParallel()}
    model = small()
    selection = select(model, PICKS)
    parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
    with pytest.raises(ns.UsageError, match=r"tensor 0\.weight: tensor parallelism"):
        ns.attach(model, selection)
    with pytest.raises(ns.UsageError, match=r"tensor 0\.weight: tensor parallelism"):
        get_peft_model(model, NeftConfig(neurons=2, policy="random", target_modules=["0"]))
    model = small()
    attached = ns.attach(model, select(model, PICKS))
    parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
    with pytest.raises(ns.UsageError, match=r"tensor 0\.\w+: the weight was replaced"):
        loss_of(model, 0)
    assert list(attached.parameters())


@pytest.mark.parametrize(("mark", "name"), [("ds_id", "ZeRO 3"), ("_fsdp_flattened", "FSDP 1")])
def test_engines_that_put_other_tensors_in_the_place(mark: str, name: str) -> None:
    """They mark the parameters so; neither runs here: DeepSpeed is not installed, FSDP 1 needs a GPU."""
    model = small()
    attached = ns.attach(model, select(model, PICKS))
    setattr(next(attached.parameters()), mark, 1)
    with pytest.raises(ns.UsageError, match=rf"tensor 0\.bias: {name} puts other tensors"):
        loss_of(model, 0)
    attached.detach()
    setattr(model[2].bias, mark, 1)
    with pytest.raises(ns.UsageError, match=rf"tensor 2\.bias: {name} puts other tensors") as raised:
        ns.attach(model, select(model, PICKS))
    assert "NeftConfig" in str(raised.value)
