class collator_class:
    def __init__(self, epoch, step, dataset):
        self.epoch, self.step, self.dataset = epoch, step, dataset

    def __call__(self, examples):
        return examples[0]
