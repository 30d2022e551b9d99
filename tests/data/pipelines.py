"""Stands for diffusers' pipelines in made_up_sdxl.py: loads the scheduler of a folder, from a module that is
not the script."""

import os

from diffusers import EulerDiscreteScheduler


class StableDiffusionXLPipeline:
    def __init__(self, scheduler):
        self.scheduler = scheduler

    @classmethod
    def from_pretrained(cls, folder):
        return cls(EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"))

    def save(self, name, folder):
        self.scheduler.save_pretrained(os.path.join(folder, name))

    def save_pretrained(self, folder):
        self.save("scheduler", folder)
