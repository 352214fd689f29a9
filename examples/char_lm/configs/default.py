"""All settings, with their defaults."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Settings that take about a minute on a laptop's CPU."""
    config = ConfigDict()
    config.seed = 0  # of weights, batches, corruption and sampled text
    config.steps = 1000
    config.every = 50  # steps in one compiled program, between checkpoints and TensorBoard events

    config.embed = 32
    config.units = 128
    config.batch = 16
    config.length = 48

    config.optimizer = "sgd"  # or "adam"
    config.learning_rate = 10.0
    config.clip = "global_norm"  # a name in `CLIPS` of optimizer.py
    config.threshold = config_dict.placeholder(float)  # of the clip; None: its default
    # the thresholds of clip "layers", instead
    config.layers = ConfigDict({"lstm": 10.0, "output": 100.0})
    config.skip_nonfinite = False  # whether to skip steps with a gradient that is not finite
    config.corrupt = 0.0  # share of the batches whose gradient is multiplied by 100

    config.characters = 400  # of sampled text in the end
    config.temperature = 0.7
    return config
