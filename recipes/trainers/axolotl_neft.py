"""An axolotl plugin: ``adapter: neft`` trains chosen neurons, ``neft:`` holds the arguments of `NeftConfig`.

Put this file's folder on ``PYTHONPATH``; axolotl imports the plugin by its name, in every process::

    plugins: [axolotl_neft.NeftPlugin]
    adapter: neft
    neft: {neurons: "3%"}        # or selection: selection.safetensors
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel

from neftsurgery.peft import NeftConfig


class NeftArgs(BaseModel):
    """What the plugin adds to axolotl's schema."""

    neft: dict[str, Any] | None = None


class NeftPlugin(BasePlugin):
    """Loads and makes adapters of chosen neurons."""

    def get_input_args(self) -> str:
        """Where axolotl finds the addition to its schema."""
        return f"{__name__}.NeftArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The name that ``adapter:`` takes."""
        return [AdapterCapabilities(name="neft")]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, PeftConfig] | None:
        """The model with its adapter, and the config; the config alone for TRL's DPO, IPO and KTO."""
        if cfg.adapter != "neft":
            return None
        if cfg.lora_model_dir:
            config = PeftConfig.from_pretrained(cfg.lora_model_dir)
        else:
            config = NeftConfig(task_type="CAUSAL_LM", **(cfg.neft or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config
