"""Latent attention, of DeepSeek-V2 and V3 and their like: refused, since it would cost memory and save none."""

from kvpolicy.architecture import Architecture

ARCHITECTURE = Architecture(
    model_types=(
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "longcat_flash",
        "minicpm3",
        "mistral4",
        "youtu",
    ),
    covers="DeepSeek-V2, V3, R1, V3.2, GLM-4.7-Flash, LongCat-Flash, MiniCPM3",
    # DeepSeek-V3: 512 + 64 numbers a token, and unfolded 128 heads of 192 + 128, which is 71 times as many.
    refused="its cache holds one compressed vector a token for all heads, and its attention shows a policy only what "
    "that unfolds to, keys and values of every head: to store those takes many times the memory (71 times in "
    "DeepSeek-V3), so a policy would save nothing",
)
