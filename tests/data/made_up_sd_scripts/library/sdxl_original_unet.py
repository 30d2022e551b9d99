import torch


class BasicTransformerBlock(torch.nn.Module):
    def forward_body(self, hidden_states, context=None, timestep=None):
        return hidden_states

    def forward(self, hidden_states, context=None, timestep=None):
        return self.forward_body(hidden_states, context, timestep)


class SdxlUNet2DConditionModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.block = BasicTransformerBlock()

    def forward(self, x, timesteps=None, context=None, y=None):
        x = self.block(x)
        return self.convolution(x)
