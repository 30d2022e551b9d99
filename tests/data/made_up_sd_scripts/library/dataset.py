class collator_class:
    def __init__(self, epoch, step, dataset):
        self.epoch, self.step, self.dataset = epoch, step, dataset

    def __call__(self, examples):
        return examples[0]


class DatasetGroup:
    def new_cache_text_encoder_outputs(self, models, accelerator):
        pass
