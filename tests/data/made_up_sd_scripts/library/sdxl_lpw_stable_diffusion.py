class SdxlStableDiffusionLongPromptWeightingPipeline:
    def __call__(self, prompt, negative_prompt=None):
        return []
