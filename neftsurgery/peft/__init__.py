"""Chosen neurons as a method of PEFT: importing this registers it.

::

    from neftsurgery.peft import NeftConfig

    model = get_peft_model(model, NeftConfig(neurons="3%"))
"""

from peft.utils import register_peft_method

from .config import NeftConfig
from .layer import NeftLayer as NeftLayer
from .model import NeftModel

register_peft_method(name="neft", config_cls=NeftConfig, model_cls=NeftModel, prefix=NeftModel.prefix)
