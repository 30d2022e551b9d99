"""A made-up LoRA training of SDXL."""

import train_network
import training


class SdxlNetworkTrainer(train_network.NetworkTrainer):
    pass


if __name__ == "__main__":
    SdxlNetworkTrainer().train(training.parse())
