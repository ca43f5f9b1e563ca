"""The models in transformers' form. Importing this registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from titans.models.cache import TitansCache
from titans.models.configuration import SIZES, VARIANTS, TitansConfig
from titans.models.modeling import TitansForCausalLM, TitansModel, TitansPreTrainedModel

AutoConfig.register("titans", TitansConfig, exist_ok=True)
AutoModel.register(TitansConfig, TitansModel, exist_ok=True)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM, exist_ok=True)

__all__ = [
    "SIZES",
    "VARIANTS",
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansModel",
    "TitansPreTrainedModel",
]
