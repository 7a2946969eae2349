"""GLM-4.7-Flash (30B-A3B): GLM-4's experts under DeepSeek's latent attention, without groups; one layer for MTP."""

from . import mla
from .base import Architecture, Engine, Family, Split, Wiring
from .deepseek_v3 import ARITHMETIC, architecture, wired
from .deepseekmoe import MTP_KEY
from .glm4_moe import GLM4_7
from .rope import plain_rope
from .stated import Config, expect


def read(config: Config) -> Architecture:
    """Raises `FamilyError` for a value that is not supported."""
    expect(config, "model_type", "glm4_moe_lite")
    expect(config, "first_k_dense_replace", 1)  # transformers counts on it, whatever the file says
    return architecture("glm4_moe_lite", config)


GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    reference="https://huggingface.co/zai-org/GLM-4.7-Flash",
    read=read,
    text=lambda config: config,
    arithmetic=ARITHMETIC,
    wiring=Wiring(
        modeling="transformers.models.glm4_moe_lite.modeling_glm4_moe_lite",
        configuration="transformers.models.glm4_moe_lite.configuration_glm4_moe_lite:Glm4MoeLiteConfig",
        layer_class="Glm4MoeLiteDecoderLayer",
        rotary_class="Glm4MoeLiteRotaryEmbedding",
        norm_class="Glm4MoeLiteRMSNorm",
        parameters=wired,
        shared="mlp.shared_experts",
        latent=True,
        split=Split(),
    ),
    engine=Engine(lambda name: name, mla.serving),
    talks=(GLM4_7,),
    mtp_key=MTP_KEY,
    released=plain_rope,
)
