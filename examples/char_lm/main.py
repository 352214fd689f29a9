"""Trains a character language model; writes checkpoints and TensorBoard logs to `--workdir`.

Every setting of configs/default.py is a flag: `--config.clip=autoclip --config.learning_rate=3`.
"""

import train
from absl import app, flags, logging
from configs.default import get_config
from ml_collections import config_flags

WORKDIR = flags.DEFINE_string(
    "workdir", "results/char_lm", "Folder of the run; if there is one in it, goes on with it."
)
flags.DEFINE_alias("out", "workdir")
SEED = flags.DEFINE_integer("seed", None, "Instead of config.seed.")
STEPS = flags.DEFINE_integer("steps", None, "Instead of config.steps.")
CONFIG = config_flags.DEFINE_config_dict("config", get_config(), "The settings.")


def main(argv: list[str]) -> None:
    """Trains with the settings of the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # at INFO a checkpoint takes twenty lines
    config = CONFIG.value
    for name, flag in ("seed", SEED), ("steps", STEPS):
        if flag.value is not None:
            config[name] = flag.value
    train.train(config, WORKDIR.value)


if __name__ == "__main__":
    app.run(main)
