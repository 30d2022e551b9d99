import torch


class SdxlUNet2DConditionModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, timesteps=None, context=None, y=None):
        return self.convolution(x)
