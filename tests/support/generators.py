"""A small latent diffusion model for tests."""

from pathlib import Path


def write_generator(folder: Path) -> str:
    """Write a diffusers folder with random weights: 32 px images, 8 x 8 latents, texts of 8 tokens. Return its path."""
    from clipfix.models.diffusion import blank

    blank(
        str(folder),
        unet={
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [8, 16],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
        },
        vae={"patch_size": 4, "latent_channels": 4, "whitening": 1.0},
        text_encoder={
            "hidden_size": 12,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 8,
        },
        scheduler={
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
        },
    )
    return str(folder)
