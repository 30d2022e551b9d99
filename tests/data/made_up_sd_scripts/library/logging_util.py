class LossRecorder:
    def __init__(self):
        self.losses = []

    def add(self, *, epoch, step, loss):
        self.losses.append(loss)
