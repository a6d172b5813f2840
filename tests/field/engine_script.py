"""One of two processes that train chosen neurons by an engine and several trainers: see test_engines.

Each run is made twice: whole, and resumed from its save after half of the steps, in a new model.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tuning_support import FAMILIES, Picks, batch, llama, select

import neftsurgery as ns

STEPS, SIZE = 4, 4  # examples of a step, in all processes together
ADAM = {"lr": 1e-2, "weight_decay": 0.1}
TRAINERS = (
    "attach Trainer",
    "attach PatchTrainer",
    "attach PatchSFTTrainer",
    "peft Trainer",
    "peft SFTTrainer",
)
RUNS = {
    **dict.fromkeys(("ddp", "fsdp2", "launch fsdp2", "zero2"), TRAINERS),
    "zero1": (*TRAINERS, "attach accelerate", "peft accelerate"),
    "lightning": ("attach lightning", "peft lightning"),
    "dcp": ("attach dcp", "peft dcp"),
}

_FSDP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"use_cpu": True, "ddp_backend": "gloo"},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, **_FSDP}},
    "launch fsdp2": {},  # `accelerate launch` says it all
    "fsdp1": {
        "fsdp": True,
        "fsdp_config": {"version": 1, "use_orig_params": True, "sync_module_states": False, **_FSDP},
    },
    **{
        f"zero{stage}": {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            }
        }
        for stage in (1, 2, 3)
    },
}


def picks_of(name: str) -> Picks:
    """The neurons of a run. SFTTrainer multiplies by ``lm_head.weight`` itself: no adapter may be there."""
    picks = dict(FAMILIES["llama"][1])
    if "SFT" in name:
        del picks["lm_head.weight"]
    return picks


def examples() -> list[dict[str, Tensor]]:
    return [{key: value[0] for key, value in batch(n, size=1).items()} for n in range(STEPS * SIZE)]


def shard_on_processors() -> None:
    """accelerate shards on GPUs alone: have it take gloo for their backend."""
    from accelerate import state

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", state.DistributedType.MULTI_GPU)


def kind_of(wrapped: torch.nn.Module) -> str:
    """What really trains the model."""
    shards = {type(parameter.data).__name__ for parameter in wrapped.parameters()}
    return f"{type(wrapped).__name__} {'+'.join(sorted(shards))}"


def make_model(name: str, engine: str, out: Path) -> tuple[Any, ns.Attached | None]:
    """The model with the neurons of a run."""
    model = llama()
    if name.startswith("attach"):
        mode: Any = "overlay" if "fsdp" in engine or engine == "dcp" else "scatter"
        return model, ns.attach(model, select(model, picks_of(name)), mode=mode, base=False)
    from peft import get_peft_model

    return get_peft_model(model, adapter_config(out)), None


def adapter_config(out: Path) -> Any:
    from neftsurgery.peft import NeftConfig

    return NeftConfig(task_type="CAUSAL_LM", selection=str(out / "selection.safetensors"))


def write(how: str, out: Path, model: Any, attached: ns.Attached | None) -> None:
    """The patch of each process, or the adapter."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    rank = int(os.environ["RANK"])
    if attached is not None:
        attached.patch(out / f"{how} {rank}").close()
        return
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(out / f"{how} adapter", state_dict=whole)


def make_trainer(name: str, engine: str, out: Path) -> tuple[Any, ns.Attached | None]:
    from transformers import Trainer, TrainingArguments

    from neftsurgery.tuning.trainer import PatchSaving

    options: dict[str, Any] = {
        "output_dir": str(out / "saves"), "max_steps": STEPS, "per_device_train_batch_size": SIZE // 2,
        "learning_rate": ADAM["lr"], "weight_decay": ADAM["weight_decay"], "lr_scheduler_type": "constant",
        "save_steps": STEPS // 2, "train_sampling_strategy": "sequential", "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1, "bf16": False,
    }  # fmt: skip
    kind = name.split()[1]
    base: Any = Trainer
    more: dict[str, Any] = {"train_dataset": examples()}
    arguments: Any = TrainingArguments
    if "SFT" in kind:
        import datasets
        import trl
        from recipes_support import tokenizer

        rows = [{"input_ids": one["input_ids"].tolist()} for one in examples()]
        more = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer()}
        base, arguments = trl.SFTTrainer, trl.SFTConfig
        options["gradient_checkpointing"] = False
    cls = type(kind, (PatchSaving, base), {}) if "Patch" in kind else base
    args = arguments(**options | ENGINES[engine])
    if name == "peft SFTTrainer":
        return cls(llama(), args=args, peft_config=adapter_config(out), **more), None
    model, attached = make_model(name, engine, out)
    given = {"attached": attached} if "Patch" in kind else {"model": model}
    return cls(args=args, **given, **more), attached


def run_trainer(name: str, engine: str, out: Path) -> None:
    for how in ("whole", "resumed"):
        trainer, attached = make_trainer(name, engine, out)
        half = None if how == "whole" else str(out / "saves" / f"checkpoint-{STEPS // 2}")
        trainer.train(resume_from_checkpoint=half)
        if trainer.args.process_index == 0:
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            tell(out, how, trainer.model_wrapped, losses)
        if attached is not None:
            attached.patch(out / f"{how} {trainer.args.process_index}").close()
        else:
            trainer.save_model(str(out / f"{how} adapter"))


def tell(out: Path, how: str, wrapped: Any, losses: list[float]) -> None:
    (out / f"{how}.txt").write_text("\n".join([kind_of(wrapped), *map(str, losses)]))


def own_part(step: int) -> dict[str, Tensor]:
    """This process's half of the examples of a step."""
    first = SIZE * step + SIZE // 2 * int(os.environ["RANK"])
    rows = examples()[first : first + SIZE // 2]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trained_of(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def accelerator_of(engine: str) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    more: dict[str, Any] = {}
    if engine.startswith("zero"):
        config = ENGINES[engine]["deepspeed"] | {"train_micro_batch_size_per_gpu": SIZE // 2}
        more = {"deepspeed_plugin": DeepSpeedPlugin(config | {"gradient_clipping": 1.0})}
    elif engine == "fsdp2":
        wrapped = {"transformer_cls_names_to_wrap": _FSDP["transformer_layer_cls_to_wrap"]}
        more = {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2, **wrapped)}
    return Accelerator(cpu=engine == "ddp", **more)


def run_accelerate(name: str, engine: str, out: Path) -> None:
    """A loop of one's own, with accelerate's ``save_state`` and ``load_state``."""
    for how in ("whole", "resumed"):
        accelerator = accelerator_of(engine)
        model, attached = make_model(name, engine, out)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained_of(model), **ADAM))
        losses = []
        if how == "resumed":
            accelerator.load_state(str(out / "state"))
        for step in range(0 if how == "whole" else STEPS // 2, STEPS):
            if (how, step) == ("whole", STEPS // 2):
                accelerator.save_state(str(out / "state"))
            loss = wrapped(**own_part(step)).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained_of(wrapped), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if accelerator.is_main_process:
            tell(out, how, wrapped, losses)
        write(how, out, model, attached)


def run_dcp(name: str, engine: str, out: Path) -> None:
    """A loop of one's own under FSDP2, with torch's distributed checkpoints."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    for how in ("whole", "resumed"):
        model, attached = make_model(name, engine, out)
        for module in model.modules():
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module)
        fully_shard(model)
        optimizer, losses = torch.optim.AdamW(trained_of(model), **ADAM), []
        if how == "resumed":
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.load(state, checkpoint_id=str(out / "state"))
            set_state_dict(
                model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        for step in range(0 if how == "whole" else STEPS // 2, STEPS):
            if (how, step) == ("whole", STEPS // 2):
                state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
                dcp.save(state, checkpoint_id=str(out / "state"))
            loss = model(**own_part(step)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained_of(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach() / 2
            dist.all_reduce(mean)
            losses.append(mean.item())
        if dist.get_rank() == 0:
            tell(out, how, model, losses)
        write(how, out, model, attached)


def run_lightning(name: str, engine: str, out: Path) -> None:
    """Lightning's Trainer under DDP, with its checkpoints."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.losses, self.wrapped = model, list[float](), list[torch.nn.Module]()

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            self.wrapped = [self.trainer.strategy.model]
            loss = self.model(**batch).loss
            self.losses.append(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean").item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(trained_of(self.model), **ADAM)

    for how in ("whole", "resumed"):
        model, attached = make_model(name, engine, out)
        module = Module(model)
        saving = ModelCheckpoint(
            out / "saves", filename="{step}", every_n_train_steps=STEPS // 2, save_top_k=-1
        )
        trainer = lightning.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_steps=STEPS, gradient_clip_val=1.0,
            callbacks=[saving], logger=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        first = 0 if how == "whole" else STEPS // 2  # it does not skip what the first half saw
        parts = [own_part(step) for step in range(first, STEPS)]
        data = torch.utils.data.DataLoader(parts, batch_size=None, shuffle=False)
        half = None if how == "whole" else str(out / "saves" / f"step={STEPS // 2}.ckpt")
        trainer.fit(module, data, ckpt_path=half, weights_only=False)
        if trainer.is_global_zero:
            tell(out, how, module.wrapped[0], module.losses)
        write(how, out, model, attached)
        torch.distributed.barrier()


def train_recipe(engine: str, root: Path) -> None:
    """Whole, and stopped after some steps because one process is asked to, then resumed."""
    from neftsurgery.training.train_plan import plan_train

    more = {key: value for key, value in ENGINES[engine].items() if key not in ("use_cpu", "ddp_backend")}
    recipe = recipe_in(root) | {
        "train": RECIPE | {"more": more, "device": "cpu" if engine == "ddp" else None}
    }
    plan_train(recipe, {"out": str(root / "whole")}).run()
    plan = plan_train(recipe, {"out": str(root / "resumed")})
    asked = iter(range(100))
    stopped = plan.run(stop=lambda: os.environ["RANK"] == "1" and next(asked) == 2)
    assert (stopped.finished, stopped.step) == (False, 3)
    resumed = plan_train(recipe, {"out": str(root / "resumed")}, resume=True).run()
    assert (resumed.finished, resumed.resumed_from) == (True, 3)


RECIPE = {"steps": 6, "save_every": 4, "batch_size": 4, "learning_rate": 1e-2}


def recipe_in(root: Path) -> dict[str, Any]:
    """A recipe of a base and data in ``root``, for the oracle too."""
    return {
        "model": str(root / "base"), "data": {"train": str(root / "data.jsonl")}, "train": RECIPE,
        "select": {"neurons": "5%"}, "probe": {"steps": 2},
    }  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    engine, names, root = sys.argv[1], sys.argv[2].split(","), Path(sys.argv[3])
    if engine in ENGINES and engine != "ddp":
        shard_on_processors()
    if names == ["recipe"]:
        train_recipe(engine, root)
        sys.exit()
    ways: dict[str, Any] = {"accelerate": run_accelerate, "dcp": run_dcp, "lightning": run_lightning}
    for name in names:
        ways.get(name.split()[1], run_trainer)(name, engine, root / name)
