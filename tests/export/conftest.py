from kinds import backbone, backbones, picture  # noqa: F401
